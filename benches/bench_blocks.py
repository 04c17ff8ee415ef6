"""Frozen encoder blocks in bfloat16 on a GPU: PyTorch's calls, torch.compile of these, and ours.

What decides whether the blocks are left to torch.compile: the same blocks and tokens in one run.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttta.models.blocks.layers import Linear, ModalityBlock, run_blocks

TOKENS = {"K50": (8, 512, 768), "VGG": (32, 512, 768), "batch 64": (64, 512, 768)}
BLOCKS, HEADS = 4, 12
IMPLEMENTATIONS = [pytest.param("compiled", marks=pytest.mark.compiled), "default"]


def plain(blocks: list[ModalityBlock], x: Tensor) -> Tensor:
    """The blocks in PyTorch's calls: residual in the type of x, products in that of the weights."""
    for block in blocks:
        n = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
        kind = block.attn.qkv.weight.dtype
        qkv = F.linear(n.to(kind), block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(out, block.attn.proj.weight, block.attn.proj.bias)
        n = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
        hidden = F.gelu(F.linear(n.to(kind), block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return x


def _blocks(width: int, device: torch.device, dtype: torch.dtype) -> list[ModalityBlock]:
    torch.manual_seed(0)
    blocks = [ModalityBlock(width, HEADS, 4 * width).to(device) for _ in range(BLOCKS)]
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Linear):
                module.to(dtype)
                module.compute_dtype = dtype
        block.requires_grad_(False)
    return blocks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="blocks are fused on a GPU alone")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_blocks(implementation, tokens, device, full, measure):
    shape = TOKENS[tokens] if full else (2, 5, 24)
    blocks = _blocks(shape[-1], device, torch.bfloat16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    wide = [block.double() for block in _blocks(shape[-1], device, torch.float64)]
    run = run_blocks
    if implementation == "compiled":
        torch._dynamo.reset()
        run = torch.compile(plain, dynamic=False)
    b, t, width = shape
    with torch.no_grad():
        measure(
            lambda: (run(blocks, x),),
            lambda: (plain(blocks, x),),
            exact=(plain(wide, x[:1].double()),),
            memory=True,
            headline=(implementation, tokens) == ("default", "VGG"),
            samples=b,
            shape="x".join(map(str, shape)),
            dtype=torch.bfloat16,
            # tokens read and written once a block, and the weights
            bytes=BLOCKS * (8 * x.numel() + 24 * width**2),
            # the weights' products of a token, and its row of the two products of attention
            flops=BLOCKS * b * t * (24 * width**2 + 4 * t * width),
        )

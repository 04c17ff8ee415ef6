"""Attention of packed class prompts after what all begin with: one by one, padded, ours."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fasttta import functional as F

HEADS, CHANNELS, PREFIX = 8, 64, 5  # CLIP ViT-B/16's text tower; SOT and four words
# classes, mean tokens of a name, the most: Pets and ImageNet (a full stop and EOT follow)
CASES = {"37 classes": (37, 2.16, 4), "1000 classes": (1000, 2.17, 12)}


def padded(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: list[int],
    heads: int,
) -> Tensor:  # fmt: skip
    """All sequences at once, filled up to the longest, each with a copy of the prefix: a mask."""
    count, most, prefix = len(lengths), max(lengths), prefix_k.shape[1]
    starts = torch.tensor([0, *lengths[:-1]], device=q.device).cumsum(0)
    column = torch.arange(most, device=q.device)
    real = column < torch.tensor(lengths, device=q.device)[:, None]
    rows = torch.where(real, starts[:, None] + column, 0).flatten()

    def sequences(x: Tensor) -> Tensor:
        x = x.index_select(1, rows).view(len(x) * count, most, heads, -1)
        return x.transpose(1, 2)

    def joined(shared: Tensor, own: Tensor) -> Tensor:
        shared = shared.unflatten(-1, (heads, -1)).transpose(1, 2)
        return torch.cat((shared.repeat_interleave(count, 0), sequences(own)), 2)

    causal = torch.ones(most, prefix + most, dtype=torch.bool, device=q.device).tril(prefix)
    out = nnf.scaled_dot_product_attention(
        sequences(q), joined(prefix_k, k), joined(prefix_v, v), attn_mask=causal
    )
    out = out.transpose(1, 2).reshape(len(q), count * most, -1)
    return out.index_select(1, real.flatten().nonzero()[:, 0])


IMPLEMENTATIONS = {
    "reference": functools.partial(F.shared_prefix_attention, backend="reference"),
    "plain": padded,
    "default": F.shared_prefix_attention,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("implementation", ["plain", "default"])
def bench_shared_prefix_attention(
    implementation, direction, case, device, full, threads, measure
):  # fmt: skip
    classes, mean, most = CASES[case]
    classes = classes if full else 7
    generator = torch.Generator().manual_seed(classes)
    names = 1 + torch.poisson(torch.full((classes,), mean - 1), generator=generator)
    lengths = sorted((2 + names.clamp(max=most).long()).tolist())
    width, tokens = HEADS * CHANNELS, sum(lengths)
    qkv, shared = (
        torch.randn(1, n, 3 * width, generator=generator).to(device) for n in (tokens, PREFIX)
    )
    backward = direction == "forward+backward"
    # parts of packed projections, as the tower has them
    inputs = [x.detach() for x in (*qkv.chunk(3, -1), *shared.chunk(3, -1)[1:])]
    along = torch.randn(inputs[0].shape, generator=generator).to(device) / tokens

    def outputs(of, inputs):
        out = of(*inputs, lengths, HEADS)
        if not backward:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, inputs, along.to(out))

    exact = [x.double().requires_grad_(backward) for x in inputs]
    for x in inputs:
        x.requires_grad_(backward)
    pairs = sum(n * PREFIX + n * (n + 1) // 2 for n in lengths)  # of tokens, those that are seen
    moved = sum(x.numel() for x in inputs)
    measure(
        functools.partial(outputs, IMPLEMENTATIONS[implementation], inputs),
        functools.partial(outputs, IMPLEMENTATIONS["reference"], inputs),
        exact=outputs(IMPLEMENTATIONS["reference"], exact),
        memory=True,
        threads=threads,
        rounds=None if classes < 1000 else 5,
        headline=False,
        shape=f"{tokens} tokens",
        dtype=torch.float32,
        bytes=4 * (moved + along.numel() + (2 * moved + 2 * along.numel() if backward else 0)),
        flops=(7 if backward else 2) * 2 * pairs * width,
    )

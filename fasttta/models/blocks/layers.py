"""Transformer layers whose compute precision is set apart from that of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ...ops import processor
from ...ops.gelu import gelu, linear_gelu
from ...ops.quick_gelu import quick_gelu
from ...ops.residual_layer_norm import KERNEL_DEVICES, fuses
from ...ops.softmax_attention import attend
from . import onednn
from .residual import advances, normalised, product_type, unpacked_heads

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": gelu}
_ONEDNN_ROWS = 64  # with fewer rows the calls cost more than the products


class QueriesAndKeys(NamedTuple):
    """Queries and keys of one attention layer, whose raw scores are ``scale * q @ k.T``."""

    q: Tensor  # [B, H, T, d]
    k: Tensor  # [B, H, T, d]
    scale: float


class Linear(nn.Linear):
    """A linear layer that multiplies in ``compute_dtype`` (None: in the type of its weight).

    A tuned weight stays an fp32 master while the product runs in bf16.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor, gelu: bool = False, add: Tensor | None = None) -> Tensor:
        """The product [..., out] of x [..., in], its GELU, or its sum with ``add``."""
        dtype = self.compute_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if _suits_onednn(x, weight, bias) and (add is None or add.dtype == dtype):
            return onednn.onednn_linear(x, weight, bias, gelu, add)
        # a weight that this layer keeps in bf16: not a master, which changes, and is cast in a call
        kept = weight is self.weight and self.compute_dtype is not None
        if kept and _suits_packed(x, weight, bias):
            x = onednn.packed_linear(x, weight, bias, gelu)
        elif gelu and x.device.type in KERNEL_DEVICES:
            x = linear_gelu(x, weight, bias)
        else:
            x = F.linear(x, weight, bias)
            x = F.gelu(x) if gelu else x
        return x if add is None else add + x

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """x [..., in] -> the output channels ``rows`` of the product."""
        dtype = self.compute_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias[rows].to(dtype)
        return F.linear(x.to(dtype), self.weight[rows].to(dtype), bias)


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``onednn_linear`` serves: no gradient, float32 on a CPU, enough rows."""
    return (
        not torch.is_grad_enabled()
        and bias is not None
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and _suits_layout(x, weight, bias)
        and onednn.works()
    )


def _suits_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a weight is to be packed: frozen, in bf16, on a processor that multiplies bf16."""
    return (
        bias is not None
        and x.dtype == weight.dtype == bias.dtype == torch.bfloat16
        and not (weight.requires_grad or bias.requires_grad)
        and _suits_layout(x, weight, bias)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not weight.is_inference()  # its changes would go unseen
        and (processor.bf16_vectors() or processor.bf16_tiles())
        and onednn.packing_works()
    )


def _suits_layout(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and weight.is_contiguous()  # a strided weight takes a thousand times longer,
        and bias.is_contiguous()  # and the strides of a bias are ignored
        and x.numel() >= _ONEDNN_ROWS * x.shape[-1]
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
    )


def embed_patches(x: Tensor, conv: nn.Conv2d, dtype: torch.dtype | None = None) -> Tensor:
    """Non-overlapping patches as one matrix product.

    Args:
        x: [B, C, h, w].
        conv: a convolution from C to D channels whose stride is its kernel.
        dtype: multiply in this type; None: in the type of the weight.

    Returns:
        [B, tokens, D], tokens row by row.
    """
    dtype = dtype or conv.weight.dtype
    (ph, pw), (b, c, h, w) = conv.kernel_size, x.shape
    x = x.reshape(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 1, 3, 5)
    x = x.to(dtype, memory_format=torch.contiguous_format)  # cast and moved in one pass
    x = x.reshape(b, (h // ph) * (w // pw), c * ph * pw)  # [B, tokens, c ph pw]
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return F.linear(x, conv.weight.flatten(1).to(dtype), bias)


class PatchEmbed(nn.Module):
    """Non-overlapping patches [B, C, h, w] -> [B, tokens, D], tokens row by row."""

    def __init__(self, channels: int, patch: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, tokens, D]."""
        return embed_patches(x, self.proj, self.compute_dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed qkv projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, QueriesAndKeys]:
        """x [B, T, D] -> the output [B, T, D], plus ``add``, and the queries and keys."""
        b, t, dim = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, dim // self.heads)
        if qkv.device.type in KERNEL_DEVICES:
            q, k, v, scored_q, scored_k = unpacked_heads(qkv)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            scored_q, scored_k = q, k
        out = attend(q, k, v, self.scale)
        out = self.proj(out.transpose(1, 2).reshape(b, t, dim), add=add)
        return out, QueriesAndKeys(scored_q, scored_k, self.scale)


class MLP(nn.Module):
    """Two linear layers around an erf GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D], plus ``add``."""
        return self.fc2(self.fc1(x, gelu=True), add=add)


class ModalityBlock(nn.Module):
    """Pre-norm transformer block with LayerNorms for both modalities together and for each alone.

    Parameter names are those of CAV-MAE's checkpoints.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm1_a, self.norm1_v = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = SelfAttention(dim, heads)
        self.norm2, self.norm2_a, self.norm2_v = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor, modality: str = "") -> tuple[Tensor, QueriesAndKeys]:
        """Runs the block.

        Args:
            x: [B, T, D].
            modality: "a" or "v" takes the LayerNorms of audio or video alone, "" the shared ones.

        Returns:
            [B, T, D], and the queries and keys of its attention.
        """
        x, branch, attention = self.advance(x, None, modality)
        return x if branch is None else x + branch, attention

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The type of its products; None: that of their weights."""
        return self.attn.qkv.compute_dtype

    def norms(self, modality: str = "") -> tuple[nn.LayerNorm, nn.LayerNorm]:
        """The LayerNorms before attention and MLP of a modality; "" the shared ones."""
        suffix = f"_{modality}" if modality else ""
        return getattr(self, f"norm1{suffix}"), getattr(self, f"norm2{suffix}")

    def advance(
        self, x: Tensor, branch: Tensor | None, modality: str = ""
    ) -> tuple[Tensor, Tensor | None, QueriesAndKeys]:
        """Runs the block on x + branch as its forward does, but leaves what its MLP returns to be
        added by the LayerNorm that follows, where that is one pass.

        Returns:
            The residual stream and what is still to be added to it, [B, T, D] each (None: nothing),
            and the queries and keys.
        """
        norm1, norm2 = self.norms(modality)
        if not (may_fuse(x, self) and fuses(x, product_type(self.attn, "qkv"))):
            x = x if branch is None else x + branch
            x, attention = self.attn(norm1(x), add=x)
            return self.mlp(norm2(x), add=x), None, attention
        x, n = normalised(norm1, x, branch, product_type(self.attn, "qkv"))
        branch, attention = self.attn(n)
        x, n = normalised(norm2, x, branch, product_type(self.mlp, "fc1"))
        return x, self.mlp(n), attention


def may_fuse(x: Tensor, layer: object) -> bool:
    """Whether an addition to x may wait for the LayerNorm before a layer: on a GPU, or where the
    layer multiplies in bf16. ``fuses`` decides; a pass in float32 on a CPU does not ask it."""
    if x.device.type in KERNEL_DEVICES:
        return True
    return getattr(layer, "compute_dtype", None) is torch.bfloat16


def normed(
    norm: nn.Module, layer: nn.Module | None, x: Tensor, branch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + branch, [..., D] each (None: nothing), and its LayerNorm, which the layer multiplies."""
    if may_fuse(x, layer):
        return normalised(norm, x, branch, None if layer is None else product_type(layer))
    x = x if branch is None else x + branch
    return x, norm(x)


def samples_at_once(tokens: Tensor) -> int:
    """How many samples of tokens [B, T, D] to compute at a time.

    On a CPU about 4 MiB of float32 tokens, so that the MLP's buffers (four times as wide) stay in
    reach of the caches; elsewhere all of them.
    """
    if tokens.device.type != "cpu":
        return len(tokens)
    return max(1, 2**20 // tokens[0].numel())


def run_blocks(
    blocks: Iterable[nn.Module],
    tokens: Tensor,
    branch: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Runs the blocks, one after another, on tokens [B, T, D] and returns the result.

    Without gradients a large batch goes through all blocks a few samples at a time, and the result
    overwrites ``tokens``: then no more than a few samples' buffers exist at once.

    Args:
        branch: [B, T, D], what is to be added to the tokens before; None: nothing.
        out: [B, T, D], where the result is written, without gradients; None: it has its own memory.
    """
    size = samples_at_once(tokens)
    if torch.is_grad_enabled() or branch is not None or len(tokens) <= size:
        x, branch, _ = advance_blocks(blocks, tokens, branch)
        if out is None:
            return x if branch is None else x + branch
        return out.copy_(x) if branch is None else torch.add(x, branch, out=out)
    for part in tokens.split(size):
        x, branch, _ = advance_blocks(blocks, part)
        part.copy_(x if branch is None else x + branch)
    return tokens if out is None else out.copy_(tokens)


def advance_blocks(
    blocks: Iterable[nn.Module], x: Tensor, branch: Tensor | None = None, modality: str = ""
) -> tuple[Tensor, Tensor | None, QueriesAndKeys | None]:
    """Runs the blocks on x + branch, [B, T, D] each; None: no branch waits.

    A block that is not ours, or has hooks, is called and gets the sum.

    Returns:
        The residual stream and what is still to be added to it, [B, T, D] each (None: nothing), and
        the queries and keys of the last block (None: there is no block).
    """
    attention, alone = None, (modality,) if modality else ()
    for block in blocks:
        if may_fuse(x, block) and advances(block):
            x, branch, attention = cast(ModalityBlock, block).advance(x, branch, modality)
        else:
            (x, attention), branch = block(x if branch is None else x + branch, *alone), None
    return x, branch, attention


class PackedAttention(nn.Module):
    """Multi-head self-attention in two halves, ``project`` and ``combine``, so that the caller
    decides which tokens attend to which. Parameter names are those of OpenAI's CLIP."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)

    def project(self, x: Tensor, which: str = "qkv") -> list[Tensor]:
        """x [..., D] -> a tensor [..., D] each for consecutive letters of "qkv"."""
        dim, first = self.in_proj_bias.shape[0] // 3, "qkv".index(which)
        rows = slice(first * dim, (first + len(which)) * dim)
        dtype = self.compute_dtype or self.in_proj_weight.dtype
        weight, bias, x = self.in_proj_weight, self.in_proj_bias, x.to(dtype)
        kept = which == "qkv" and self.compute_dtype is not None
        if kept and _suits_packed(x, weight, bias):
            return list(onednn.packed_linear(x, weight, bias).chunk(3, -1))
        return list(F.linear(x, weight[rows].to(dtype), bias[rows].to(dtype)).chunk(len(which), -1))

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, d], a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def combine(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """[B, H, T, d] -> [B, T, D], projected, plus ``add``."""
        return self.out_proj(x.transpose(1, 2).flatten(2), add=add)

    def forward(self, x: Tensor, causal: bool = False, add: Tensor | None = None) -> Tensor:
        """x [B, T, D], under its LayerNorm -> [B, T, D], plus ``add``."""
        q, k, v = map(self.split, self.project(x))
        if not causal:
            return self.combine(attend(q, k, v, self.scale), add)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.combine(out, add)


class FeedForward(nn.Module):
    """Two linear layers around an activation of ``ACTIVATIONS``; names are those of CLIP."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Linear(dim, hidden), Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D], plus ``add``."""
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)), add=add)


class ResidualAttentionBlock(nn.Module):
    """The block of CLIP's towers: x + attention(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = PackedAttention(dim, heads)
        self.mlp = FeedForward(dim, hidden, activation)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[B, T, D] -> [B, T, D]; causal: a token attends to itself and to those before it."""
        x, branch = self.advance(x, None, causal)
        return x if branch is None else x + branch

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The type of its products; None: that of their weights."""
        return self.attn.compute_dtype

    def advance(
        self, x: Tensor, branch: Tensor | None, causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the block on x + branch; as ``ModalityBlock.advance``."""
        if not (may_fuse(x, self.attn) and fuses(x, product_type(self.attn))):
            x = x if branch is None else x + branch
            x = self.attn(self.ln_1(x), causal=causal, add=x)
            return self.mlp(self.ln_2(x), add=x), None
        x, n = self.before_attention(x, branch)
        return self.after_attention(x, self.attn(n, causal=causal))

    def before_attention(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + branch, [B, T, D] each, and its first LayerNorm; None: no branch waits."""
        return normed(self.ln_1, self.attn, x, branch)

    def after_attention(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + branch, [B, T, D] each, branch the attention's output (None: x has it already), and
        what the MLP returns, which is still to be added."""
        x, n = normed(self.ln_2, getattr(self.mlp, "c_fc", None), x, branch)
        return x, self.mlp(n)

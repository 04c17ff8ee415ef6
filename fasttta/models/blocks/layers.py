"""Transformer layers whose compute precision is set apart from the weights' own."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.softmax_attention import attend
from . import linear as products


class Attention(NamedTuple):
    """Queries and keys of one attention layer, as its scores ``scale * q @ k.T`` use them."""

    q: Tensor  # [B, H, T, d]
    k: Tensor  # [B, H, T, d]
    scale: float


class Linear(nn.Linear):
    """A linear layer that multiplies in ``compute_dtype`` (None: in the weight's own).

    A tuned weight stays an fp32 master while the product runs in bf16.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor, gelu: bool = False, add: Tensor | None = None) -> Tensor:
        """The product, its erf GELU, or its sum with ``add``."""
        dtype = self.compute_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if products.suits(x, weight, bias) and (add is None or add.dtype == dtype):
            return products.fused(x, weight, bias, gelu, add)
        x = F.linear(x, weight, bias)
        x = F.gelu(x) if gelu else x
        return x if add is None else add + x


class PatchEmbed(nn.Module):
    """Non-overlapping patches [B, C, h, w] -> [B, tokens, D], tokens row by row.

    The convolution of the checkpoints has stride = kernel, so it is one matrix product.
    """

    def __init__(self, channels: int, patch: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None  # made with one
        dtype = self.compute_dtype or weight.dtype
        ph, pw = self.proj.kernel_size
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(b, (h // ph) * (w // pw), c * ph * pw)  # [B, tokens, c ph pw]
        return F.linear(x.to(dtype), weight.flatten(1).to(dtype), bias.to(dtype))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed qkv projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, Attention]:
        """Attention's output, plus ``add``, and its queries and keys."""
        b, t, dim = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, d], views of the packed product
        out = attend(q, k, v, self.scale)
        out = self.proj(out.transpose(1, 2).reshape(b, t, dim), add=add)
        return out, Attention(q, k, self.scale)


class MLP(nn.Module):
    """Two linear layers around an erf GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True), add=add)

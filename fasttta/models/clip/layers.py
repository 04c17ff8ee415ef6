"""The transformer block of CLIP, both towers; parameter names are those of OpenAI's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.quick_gelu import quick_gelu
from ...ops.softmax_attention import attend
from ..blocks.layers import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    """Multi-head self-attention with packed projections: ``project`` and ``combine`` are its two
    halves, so that callers choose which tokens attend to which."""

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
        weight, bias = self.in_proj_weight[rows].to(dtype), self.in_proj_bias[rows].to(dtype)
        return list(F.linear(x.to(dtype), weight, bias).chunk(len(which), -1))

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, d], a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def combine(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """[B, H, T, d] -> [B, T, D], projected, plus ``add``."""
        return self.out_proj(x.transpose(1, 2).flatten(2), add=add)

    def forward(self, x: Tensor, causal: bool = False, add: Tensor | None = None) -> Tensor:
        """x [B, T, D], already normalised -> [B, T, D], plus ``add``."""
        q, k, v = map(self.split, self.project(x))
        if not causal:
            return self.combine(attend(q, k, v, self.scale), add)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.combine(out, add)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Linear(dim, hidden), Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)), add=add)


class Block(nn.Module):
    """x + attention(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.mlp = MLP(dim, hidden, activation)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = self.attn(self.ln_1(x), causal=causal, add=x)
        return self.mlp(self.ln_2(x), add=x)


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(dim, heads, hidden, activation) for _ in range(depth))

    @property
    def blocks(self) -> list[Block]:
        """``resblocks``, with their type."""
        return cast("list[Block]", list(self.resblocks))

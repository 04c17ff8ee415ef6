"""CLIP's vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.layers import embed_patches
from .layers import Transformer


class PatchConv(nn.Conv2d):
    """Non-overlapping patches as one matrix product, in ``compute_dtype``."""

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, G*G, D], row by row."""
        return embed_patches(x, self, self.compute_dtype)


class VisionTransformer(nn.Module):
    """Patches, class token, blocks; the image's feature is read off the class token.

    Args:
        resolution: R, pixels a side.
        patch: pixels of a patch a side.
        embed_dim: E, of the joint space.
    """

    def __init__(
        self,
        resolution: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        embed_dim: int,
        activation: str = "quick_gelu",
        patch_bias: bool = False,
    ) -> None:
        super().__init__()
        self.resolution, self.grid = resolution, resolution // patch
        self.conv1 = PatchConv(3, dim, patch, patch, bias=patch_bias)
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.positional_embedding = nn.Parameter(torch.zeros(self.grid**2 + 1, dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = Transformer(dim, depth, heads, hidden, activation)
        self.proj = nn.Parameter(torch.zeros(dim, embed_dim))

    def embed(self, x: Tensor) -> Tensor:
        """Normalised pixels [N, 3, R, R] -> tokens [N, T, D] that enter the first block."""
        x = self.conv1(x).to(self.positional_embedding.dtype)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat((first, x), 1) + self.positional_embedding)

    def finish(self, cls: Tensor) -> Tensor:
        """Class tokens [N, D] after the last block -> features [N, E], not normalised."""
        return self.ln_post(cls) @ self.proj

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels [N, 3, R, R] -> features [N, E], not normalised."""
        *blocks, last = self.transformer.blocks
        x = self.embed(x)
        for block in blocks:
            x = block(x)
        # of the last block only the class token is read: 7 % of a ViT-B/16's forward
        n = last.ln_1(x)
        (q,), (k, v) = last.attn.project(n[:, :1], "q"), last.attn.project(n, "kv")
        q, k, v = map(last.attn.split, (q, k, v))
        cls = x[:, :1] + last.attn.combine(
            F.scaled_dot_product_attention(q, k, v, scale=last.attn.scale)
        )
        return self.finish((cls + last.mlp(last.ln_2(cls)))[:, 0])

"""Inputs of the tests of softmax attention, its formula, and what near to it means."""

from __future__ import annotations

import torch

# samples, heads, queries, keys, channels: of ViT-B's modalities with and without prompts, and
# what fills no vector, panel or unit of rows
SHAPES = [
    (2, 3, 98, 108, 64),
    (1, 2, 196, 196, 64),
    (1, 1, 101, 515, 80),
    (2, 2, 16, 1, 5),
    (3, 1, 49, 33, 1),
    (1, 1, 17, 4096, 24),
    (0, 2, 20, 20, 8),
]


def heads(*shape, seed=0, scale=1.0):
    """[B, H, T, d], a view of [B, T, 2, H, d] as packed projections give it."""
    b, h, t, d = shape
    generator = torch.Generator().manual_seed(seed + t)
    return scale * torch.randn(b, t, 2, h, d, generator=generator)[:, :, 1].transpose(1, 2)


def formula(q, k, v, scale):
    return (scale * q @ k.transpose(-2, -1)).softmax(-1) @ v


def near(computed, expected, tolerance=4e-6):
    assert computed.shape == expected.shape
    limit = tolerance * max(1e-3, expected.abs().max().item()) if expected.numel() else 0
    assert computed.numel() == 0 or (computed.double() - expected).abs().max() <= limit

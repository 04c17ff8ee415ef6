"""RAda heads for tests."""

from __future__ import annotations

import torch
from torch import nn

from fasttta.models import RationalHead


def some_head(dim=12, heads=3, seed=0, dtype=torch.float64, **options) -> RationalHead:
    """A head whose mask is far from 1."""
    torch.manual_seed(seed)
    head = RationalHead(dim, heads, **options)
    nn.init.normal_(head.out_proj.weight, std=0.6)
    nn.init.normal_(head.out_proj.bias, std=0.6)
    return head.to(dtype)

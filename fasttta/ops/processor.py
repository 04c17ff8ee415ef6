"""What the processor multiplies in bf16. Where it has nothing for bf16, bf16 is emulated."""

from __future__ import annotations

import functools

import torch


def _has(feature: str) -> bool:
    # private functions of PyTorch; without them nothing is said to be there
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())


@functools.cache
def bf16_vectors() -> bool:
    """Whether it multiplies vectors of bf16 (avx512_bf16)."""
    return _has("avx512_bf16")


@functools.cache
def bf16_tiles() -> bool:
    """Whether it multiplies tiles of bf16 (AMX)."""
    return _has("amx_tile")

"""Tokens through transformer blocks, by the way that suits the device."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import workers


def portion(tokens: Tensor) -> int:
    """Samples to compute at a time: on a CPU about 4 MiB of float32 tokens, which keeps the MLP's
    buffers (four times as wide) in reach of the caches; elsewhere all."""
    if tokens.device.type != "cpu":
        return len(tokens)
    return max(1, 2**20 // tokens[0].numel())


def _replace(blocks: Iterable[nn.Module], tokens: Tensor) -> None:
    """Tokens [B, T, D] become what blocks make of them."""
    x = tokens
    for block in blocks:
        x, _ = block(x)
    tokens.copy_(x)


def through(*pairs: tuple[nn.ModuleList, Tensor]) -> list[Tensor]:
    """Of each pair (blocks, tokens [B, T, D]) the tokens behind the blocks; without gradients
    samples side by side, or where they are many a portion at a time, in place."""
    grad = torch.is_grad_enabled()
    modules = [block for blocks, _ in pairs for block in blocks]
    if not grad and workers.suit(pairs[0][1], modules):
        workers.run([
            functools.partial(_replace, blocks, part)
            for blocks, tokens in pairs
            for part in tokens.split(1)
        ])  # fmt: skip
        return [tokens for _, tokens in pairs]
    found = []
    for blocks, tokens in pairs:
        if grad or len(tokens) <= portion(tokens):
            for block in blocks:
                tokens, _ = block(tokens)
        else:
            for part in tokens.split(portion(tokens)):
                _replace(blocks, part)
        found.append(tokens)
    return found

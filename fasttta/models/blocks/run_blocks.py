"""Runs transformer blocks on tokens, in the way that suits the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def samples_at_once(tokens: Tensor) -> int:
    """How many samples of tokens [B, T, D] to compute at a time.

    On a CPU about 4 MiB of float32 tokens, so that the MLP's buffers (four times as wide) stay in
    reach of the caches; elsewhere all of them.
    """
    if tokens.device.type != "cpu":
        return len(tokens)
    return max(1, 2**20 // tokens[0].numel())


def run_blocks(blocks: Iterable[nn.Module], tokens: Tensor) -> Tensor:
    """Runs the blocks, one after another, on tokens [B, T, D] and returns the result.

    Without gradients a large batch goes through all blocks a few samples at a time, and the result
    overwrites ``tokens``: then no more than a few samples' buffers exist at once.
    """
    size = samples_at_once(tokens)
    if torch.is_grad_enabled() or len(tokens) <= size:
        for block in blocks:
            tokens, _ = block(tokens)
        return tokens
    for part in tokens.split(size):
        x = part
        for block in blocks:
            x, _ = block(x)
        part.copy_(x)
    return tokens

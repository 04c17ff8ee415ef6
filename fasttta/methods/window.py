"""The encoder outputs of the current and the last batches, as an objective reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def or_zeros(tokens: Tensor, counts: Tensor) -> Tensor:
    """The tokens of samples that count, else zeros: what a weight of 0 multiplies must be finite.

    Args:
        tokens: [B, ...].
        counts: 0-d for the batch or [B].
    """
    if counts.device.type == "cpu" and counts.all():
        return tokens  # on a GPU the question would wait for the device
    return torch.where(counts.reshape(counts.shape + (1,) * (tokens.ndim - 1)) > 0, tokens, 0)


class Queue:
    """A list of past batches, which may differ in size, oldest first; the current one is last.

    On a CPU each is fused on its own (no copy, smaller buffers, and the pass over the newest past
    batch is the last step's prediction), on a GPU all together.

    Attributes:
        batches: what to fuse, [b, ...] each; ``order``: in which.
        weight: [n], 1 where a sample counts.
    """

    def __init__(
        self, tokens: Tensor, valid: Tensor, size: int, state: Mapping[str, Tensor]
    ) -> None:
        past = range(min(size - 1, sum(key.startswith("queue.") for key in state)))
        self.tokens, self.size = (
            [*(state[f"queue.{i}"] for i in past), or_zeros(tokens, valid)],
            size,
        )
        self.counts = [*(state[f"valid.{i}"] for i in past), valid]
        self.weight = torch.cat(
            [c.expand(len(t)) for t, c in zip(self.tokens, self.counts, strict=True)]
        )
        together = tokens.device.type != "cpu" and len(self.tokens) > 1
        self.batches = [torch.cat(self.tokens)] if together else self.tokens

    @property
    def order(self) -> list[int]:
        """In which to fuse: the newest past batch first, as where its pass is already there, so
        that gradients add up in one order and to the same bits."""
        *past, current = range(len(self.batches))
        return [*past[-1:], *past[:-1], current]

    def current(self, logits: Tensor) -> Tensor:
        """Rows of the current batch among those of the window, [n, C] -> [B, C]."""
        return logits[-len(self.tokens[-1]) :]

    def after(self, kept: Tensor) -> dict[str, Tensor]:
        """The state for the next batch; ``kept``: whether the current one counts then."""
        tokens, counts = (
            [*self.tokens[:-1], or_zeros(self.tokens[-1], kept)],
            [*self.counts[:-1], kept],
        )
        first = max(0, len(tokens) - (self.size - 1))
        return {f"queue.{i}": t for i, t in enumerate(tokens[first:])} | {
            f"valid.{i}": c for i, c in enumerate(counts[first:])
        }


class Ring:
    """Fixed places for the whole window, as captured steps need them; nothing is copied or
    concatenated. The step has written the current batch to its place.

    The state holds ``ring`` [places, B, ...], ``counts`` [places, B] (0 for places that are still
    empty) and ``place`` [1], the index of the current batch's.
    """

    def __init__(
        self, tokens: Tensor, valid: Tensor, size: int, state: Mapping[str, Tensor]
    ) -> None:
        self.shape, self.place = state["counts"].shape, state["place"]
        self.batches, self.order = [state["ring"].flatten(0, 1)], [0]
        self.weight = state["counts"].flatten(0, 1)

    def current(self, logits: Tensor) -> Tensor:
        return logits.unflatten(0, self.shape).index_select(0, self.place)[0]

    def after(self, kept: Tensor) -> dict[str, Tensor]:
        return {"kept": kept}

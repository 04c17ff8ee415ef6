"""The encoder outputs of the current and the last batches, as an objective reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..protocols import FusionModel


def finite(tokens: Tensor, counts: Tensor, past: Sequence[Tensor]) -> Tensor:
    """The tokens [B, ...] of a batch that counts; else those of a past batch, or zeros: what a
    weight of 0 multiplies must be finite, and something that a model can take.

    Args:
        counts: 0-d, or [B] where rows only fill a captured batch. Those rows repeat a sample, so
            that they are finite whenever the batch is: the batch is kept or replaced as a whole.
    """
    counts = counts.amax()
    if counts.device.type == "cpu" and counts:
        return tokens  # on a GPU the question would wait for the device
    fill = next((p[: len(tokens)] for p in past if len(p) >= len(tokens)), torch.zeros_like(tokens))
    return torch.where(counts > 0, tokens, fill)


def pieces(model: FusionModel, tokens: Tensor) -> Sequence[Tensor]:
    """Encoder outputs in the portions that the model is best fused in."""
    return model.pieces(tokens)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat, without a copy of a single part."""
    return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]


class Queue:
    """A list of past batches, which may differ in size, oldest first; the current one is last.

    On a CPU each is fused on its own (no copy, smaller buffers, and the pass over the newest past
    batch is the last step's prediction), on a GPU all together.

    Attributes:
        portions: what to fuse, [b, ...] each.
        order: in which, as indices: the newest past batch first, as where its pass is already
            there, so that gradients add up in one order and to the same bits.
        weight: [n], 1 where a sample counts.
    """

    def __init__(
        self,
        model: FusionModel,
        tokens: Tensor,
        valid: Tensor,
        size: int,
        state: Mapping[str, Tensor],
    ) -> None:
        past = range(min(size - 1, sum(key.startswith("queue.") for key in state)))
        self.size = size
        self.tokens = [state[f"queue.{i}"] for i in past]
        self.tokens.append(finite(tokens, valid, self.tokens))
        self.counts = [*(state[f"valid.{i}"] for i in past), valid]
        self.weight = torch.cat(
            [c.expand(len(t)) for t, c in zip(self.tokens, self.counts, strict=True)]
        )
        if tokens.device.type != "cpu":
            self.portions, self.order = [joined(self.tokens)], [0]
            return
        numbers, self.portions = [], []
        for batch in self.tokens:
            parts = pieces(model, batch)
            numbers.append(range(len(self.portions), len(self.portions) + len(parts)))
            self.portions += parts
        self.order = [i for n in (*numbers[-2:-1], *numbers[:-2], numbers[-1]) for i in n]

    def current(self, logits: Tensor) -> Tensor:
        """Rows of the current batch among those of the window, [n, C] -> [B, C]."""
        return logits[-len(self.tokens[-1]) :]

    def after(self, kept: Tensor) -> dict[str, Tensor]:
        """The state for the next batch, to be completed by ``dropped``; ``kept``: whether the
        current one counts then."""
        counts = [*self.counts[:-1], kept]
        first = max(0, len(counts) - (self.size - 1))
        return {f"queue.{i}": t for i, t in enumerate(self.tokens[first:])} | {
            f"valid.{i}": c for i, c in enumerate(counts[first:])
        }


class Ring:
    """Fixed places for the whole window, as captured steps need them; nothing is copied or
    concatenated. The step has written the current batch to its place.

    The state holds ``ring`` [places, B, ...], ``counts`` [places, B] (0 for places that are still
    empty) and ``place`` [1], the index of the current batch's.
    """

    def __init__(
        self,
        model: FusionModel,
        tokens: Tensor,
        valid: Tensor,
        size: int,
        state: Mapping[str, Tensor],
    ) -> None:
        self.shape, self.place = state["counts"].shape, state["place"]
        self.portions, self.order = [state["ring"].flatten(0, 1)], [0]
        self.weight = state["counts"].flatten(0, 1)

    def current(self, logits: Tensor) -> Tensor:
        return logits.unflatten(0, self.shape).index_select(0, self.place)[0]

    def after(self, kept: Tensor) -> dict[str, Tensor]:
        return {"kept": kept}


def dropped(
    state: dict[str, Tensor], counts: Tensor, before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state that ``after`` returned, without the newest batch where 0-d ``counts`` is 0. That
    batch keeps its place; its weight becomes 0, and in a queue tokens of the state before stand
    in for its own (in a ring the step replaces them)."""
    if "kept" in state:
        return {"kept": state["kept"] * counts}
    newest = sum(name.startswith("queue.") for name in state) - 1
    if newest < 0:  # no queue of past batches
        return state
    past = [tokens for name, tokens in before.items() if name.startswith("queue.")]
    kept = state[f"valid.{newest}"] * counts
    tokens = finite(state[f"queue.{newest}"], kept, past)
    return {**state, f"queue.{newest}": tokens, f"valid.{newest}": kept}


def check_queue(
    state: Mapping[str, Tensor], window: int, sample: tuple[int, ...] | None = None
) -> None:
    """Whether a saved state (finite) is a window's: ``queue.0`` to the newest, ``valid.0`` to the
    newest, and ``place`` where steps were captured.

    Args:
        window: batches, the current one included.
        sample: shape of a sample's tokens; None: not known.

    Raises:
        ValueError: it is not; names the tensor.
    """
    count = sum(name.startswith("queue.") for name in state)
    if count > window - 1:
        raise ValueError(f"method.queue holds {count} batches, needed at most {window - 1}")
    names = [f"{kind}.{i}" for i in range(count) for kind in ("queue", "valid")]
    odd = sorted(state.keys() - {*names, "place"}) + [name for name in names if name not in state]
    if odd:
        raise ValueError(f"method.{odd[0]} is missing, or of another method")
    for i in range(count):
        tokens, valid = state[f"queue.{i}"], state[f"valid.{i}"]
        sample = tuple(tokens.shape[1:]) if sample is None else sample
        good = tokens.ndim > 1 and len(tokens) and tokens.is_floating_point()
        if not good or tuple(tokens.shape[1:]) != sample:
            raise ValueError(
                f"method.queue.{i} is {tokens.dtype} {list(tokens.shape)}, needed samples "
                f"{list(sample)} of floating point"
            )
        if valid.shape not in ((), tokens.shape[:1]) or not valid.is_floating_point():
            raise ValueError(f"method.valid.{i} has shape {list(valid.shape)}, needed []")
        if not ((valid == 0) | (valid == 1)).all():
            raise ValueError(f"method.valid.{i}: needed 0 or 1")
    place = state.get("place")
    if place is not None and not (
        place.dtype == torch.int64 and not place.ndim and 0 <= int(place) < max(window, 1)
    ):
        raise ValueError(f"method.place: needed an integer from 0 to {window - 1}")

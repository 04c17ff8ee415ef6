"""The queue of recent batches' encoder outputs, and methods whose loss is over all of them.

The method state holds ``queue.0`` (the oldest) and so on, [B, ...], and of each batch ``valid.0``
and so on: 1 if it counts, else 0. A captured step keeps the same batches in a ring of fixed places.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.checks import all_finite
from ..protocols import FusionModel
from .base import Method, joined


@dataclass(frozen=True)
class WindowedMethod(Method, abstract=True):
    """A method whose loss is over the last ``window`` batches, the current one included, an option
    of every subclass. Its objective makes a ``batches`` object and returns its ``after`` as the
    ``Objective.state``."""

    if TYPE_CHECKING:  # a field of every subclass, which decides its position

        @property
        def window(self) -> int:
            """Number of batches in the loss, an option of every subclass."""

    def batches(
        self, model: FusionModel, tokens: Tensor, valid: Tensor, state: Mapping[str, Tensor]
    ) -> Queue | Ring:
        """The batches in the loss.

        Args:
            tokens, valid, state: as ``objective`` gets them.
        """
        of = Ring if "ring" in state else Queue
        return of(model, tokens, valid, self.window, state)

    def after_update(
        self, state: dict[str, Tensor], finite: Tensor, before: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state for the next batch. Finite tokens may overflow later on the way to the loss:
        such a batch must not spoil later windows.

        Args:
            state: what the last objective returned as its ``state``.
            finite: 0-d float, 0 if the loss or a gradient overflowed, so that the update was
                skipped.
            before: the state before this batch.
        """
        return without_newest(state, finite, before)


def finite(tokens: Tensor, counts: Tensor, past: Sequence[Tensor]) -> Tensor:
    """Tokens [B, ...] of a batch if it counts; else those of a past batch, or zeros: values with
    weight 0 must also be finite, and valid input of the model.

    Args:
        counts: 0-d, or [B] where rows only fill a captured batch. Those rows repeat a sample, so
            they are finite whenever the batch is: the batch is kept or replaced as a whole.
        past: tokens of the past batches.
    """
    counts = counts.amax()
    if counts.device.type == "cpu" and counts:
        return tokens  # on a GPU this check would wait for the device
    zero = tokens.new_zeros(())
    fill = next((p[: len(tokens)] for p in past if len(p) >= len(tokens)), zero)
    return torch.where(counts > 0, tokens, fill)


class Queue:
    """The past batches, which may differ in size, oldest first, and the current one last.

    On a CPU each batch is fused on its own (no copy, smaller buffers, and the pass over the newest
    past batch is the prediction of the last step), on a GPU all of them at once.

    Attributes:
        portions: what to fuse, tokens [b, ...] each.
        order: indices of the portions in the order in which they are fused. The newest past batch
            comes first, also where its pass is kept from the last step, so that gradients add up
            in one order, to the same bits.
        weight: [n], 1 for samples that count, else 0.
        valid: as given, and 0 if the tokens have non-finite values.
    """

    def __init__(
        self,
        model: FusionModel,
        tokens: Tensor,
        valid: Tensor,
        size: int,
        state: Mapping[str, Tensor],
    ) -> None:
        self.valid = valid = valid * all_finite(tokens)
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
        numbers, self.portions, pieces = [], [], model.pieces
        for batch in self.tokens:
            parts = pieces(batch)
            numbers.append(range(len(self.portions), len(self.portions) + len(parts)))
            self.portions += parts
        self.order = [i for n in (*numbers[-2:-1], *numbers[:-2], numbers[-1]) for i in n]

    def current(self, logits: Tensor) -> Tensor:
        """Logits of all samples [n, C] -> those of the current batch [B, C]."""
        return logits[-len(self.tokens[-1]) :]

    def after(self, kept: Tensor) -> dict[str, Tensor]:
        """The state for the next batch, to be completed by ``without_newest``.

        Args:
            kept: whether the current batch counts then.
        """
        counts = [*self.counts[:-1], kept]
        first = max(0, len(counts) - (self.size - 1))
        return {f"queue.{i}": t for i, t in enumerate(self.tokens[first:])} | {
            f"valid.{i}": c for i, c in enumerate(counts[first:])
        }


class Ring:
    """The same batches in fixed places, as captured steps need them; nothing is copied or
    concatenated. The step has written the current batch to its place.

    The state holds ``ring`` [places, B, ...], ``counts`` [places, B] (0 for empty places) and
    ``place`` [1], the index of the place of the current batch. Attributes as of ``Queue``.
    """

    def __init__(
        self,
        model: FusionModel,
        tokens: Tensor,
        valid: Tensor,
        size: int,
        state: Mapping[str, Tensor],
    ) -> None:
        self.valid = valid  # the step has checked the tokens
        self.shape, self.place = state["counts"].shape, state["place"]
        self.portions, self.order = [state["ring"].flatten(0, 1)], [0]
        self.weight = state["counts"].flatten(0, 1)

    def current(self, logits: Tensor) -> Tensor:
        """Logits of all samples [n, C] -> those of the current batch [B, C]."""
        return logits.unflatten(0, self.shape).index_select(0, self.place)[0]

    def after(self, kept: Tensor) -> dict[str, Tensor]:
        """As of ``Queue``; the step itself writes the ring."""
        return {"kept": kept}


def without_newest(
    state: dict[str, Tensor], counts: Tensor, before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state that ``after`` returned, without the newest batch if ``counts`` (0-d) is 0.

    That batch keeps its place and gets the weight 0. In a queue, tokens of the state before replace
    its tokens; in a ring the step replaces them.
    """
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
    """Checks a saved state of finite tensors: ``queue.0`` to the newest, ``valid.0`` to the newest,
    and ``place`` if steps were captured.

    Args:
        window: number of batches, the current one included.
        sample: shape of the tokens of one sample; None: unknown.

    Raises:
        ValueError: it is no state of a queue; names the tensor.
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


class KeptPasses:
    """A model that keeps the fusion pass of the last prediction, with its graph, and returns it to
    the next step. This saves one of the ``window`` forward passes of a step.

    Versions of tensors tell whether a kept pass is still valid: reset, load and every other change
    in place increases them.
    """

    def __init__(self, model: FusionModel, leaves: Sequence[Tensor]) -> None:
        self._model, self._leaves = model, leaves
        self._kept: list[tuple[Tensor, list[int], Any]] = []

    def predict(self, tokens: Tensor) -> Tensor:
        """Logits [B, C] of tokens, from passes that are kept."""
        self._kept = []
        for part in self._model.pieces(tokens):
            with torch.enable_grad():
                output = self._model.fuse_attention(part)
            self._kept.append((part, self._versions(part), output))
        return joined([output[0].detach() for _, _, output in self._kept])

    def fuse_attention(self, tokens: Tensor) -> Any:
        """The model's ``fuse_attention``, or the kept result of a pass over the same tokens."""
        for i, (kept, versions, output) in enumerate(self._kept):
            # Same pointer and shape: same tensor. It is held here, so its memory is not reused.
            if kept.data_ptr() == tokens.data_ptr() and kept.shape == tokens.shape:
                del self._kept[i]  # its graph allows one backward pass
                if versions == self._versions(tokens):
                    return output
                break
        return self._model.fuse_attention(tokens)

    def _versions(self, tokens: Tensor) -> list[int]:
        return [x._version for x in (tokens, *self._leaves)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)

    def __deepcopy__(self, memo: dict) -> KeptPasses:
        return KeptPasses(copy.deepcopy(self._model, memo), copy.deepcopy(self._leaves, memo))

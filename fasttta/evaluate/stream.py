"""One pass of an adapted model over a labelled stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapted.base import Adapted
from ..adapted.images import as_list
from ..methods.base import updates_tensors
from ..ops.checks import class_count, class_labels


def measure_stream(
    adapted: Adapted, batches: Iterable[tuple[Tensor, ...]], classes: int
) -> dict[str, Any]:
    """Adapts on a stream and records what a report shows; labels are only compared with.

    Args:
        adapted: in the state to start from; it is left in the state after the last batch.
        batches: each the model's inputs and, last, labels [b].
        classes: their number, C.

    Returns:
        JSON-ready. Top-1 accuracy in percent over all samples ``"before"`` and ``"after"`` each
        batch's update, the one the method is ``"score"``d with, and ``"samples_per_s"`` of its own
        steps (predictions made only for the record are not timed). On a GPU the time is the
        device's, and nothing of a batch is read before the stream ends, so that batches overlap.
        ``"series"``, a value a batch: ``"samples"``, ``"hits_before"``, ``"hits_after"``, and
        counts [C] of ``"predicted"`` classes (of the scored prediction) and of ``"labels"``.

    Raises:
        ValueError, TypeError: the stream is empty, a batch or its labels cannot be used, or
            ``classes`` is not the width of the logits. Labels are checked before the batch is
            adapted on, so that nothing is learnt from one that is refused.
    """
    method, width = adapted.options, None
    class_count(classes)
    watch = Stopwatch(adapted.device)
    truth: list[Tensor] = []  # labels [b], on the host
    chosen: dict[str, list[Tensor]] = {"before": [], "after": [], "scored": []}  # on the device
    for batch in batches:
        inputs, labels = _split(batch)
        labels = class_labels(labels, _samples(adapted, inputs), classes)
        if width is None:
            width = _check_width(adapted, inputs, classes)
        truth.append(labels.cpu())
        with watch:
            result = adapted.step(*inputs)
        is_final = method.score_at == "after" or not updates_tensors(method)
        after = result.logits if is_final else adapted.predict(*inputs)
        chosen["before"].append(result.logits_before.argmax(dim=1))
        chosen["after"].append(after.argmax(dim=1))
        chosen["scored"].append(result.logits.argmax(dim=1))
    if not truth:
        raise ValueError("batches: the stream is empty; needed at least one batch")
    series = _series(truth, {name: _read(parts) for name, parts in chosen.items()}, classes)
    samples = sum(series["samples"])
    accuracy = {
        when: 100 * sum(series[f"hits_{when}"]) / samples for when in ("before", "after")
    }  # fmt: skip
    return {
        **accuracy,
        "score": accuracy["after" if method.score_at == "after" else "before"],
        "samples_per_s": samples / watch.seconds(),
        "series": series,
    }


def _split(batch: Any) -> tuple[list, Any]:
    """Inputs and labels of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        what = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"a batch is (*inputs, labels), found {what}")
    *inputs, labels = batch
    return inputs, labels


def _samples(adapted: Adapted, inputs: list) -> int | None:
    """How many samples a batch has; None: the step will say that it has none."""
    if adapted.takes_images:
        single, items = as_list(inputs[0])
        return 1 if single else len(items)
    return len(inputs[0]) if isinstance(inputs[0], Tensor) and inputs[0].ndim else None


def _check_width(adapted: Adapted, inputs: list, classes: int) -> int:
    """The width of the logits, from the source model, so that nothing is adapted."""
    with adapted.source():
        width = adapted.step(*inputs).logits.shape[1]
    if width != classes:
        raise ValueError(f"classes={classes}, but the model gives logits of {width} classes")
    return width


class Stopwatch:
    """Adds up the seconds of ``with`` blocks: on a GPU those of the device, by events, so that no
    block waits for its work to end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(self._device))
            self._events.append((start, end))
        else:
            self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self._events[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """The sum; waits for the work of the blocks."""
        for _, end in self._events:
            end.synchronize()
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1e3


def _read(parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [b] on the host, in one copy."""
    return list(torch.cat(list(parts)).cpu().split([len(part) for part in parts]))


def _series(
    truth: Sequence[Tensor], chosen: dict[str, list[Tensor]], classes: int
) -> dict[str, list]:
    """What ``measure_stream`` returns of each batch, from labels and chosen classes [b] of it."""

    def hits(name: str) -> list[int]:
        return [int((c == y).sum()) for c, y in zip(chosen[name], truth, strict=True)]

    def counts(parts: Sequence[Tensor]) -> list[list[int]]:
        return [torch.bincount(part, minlength=classes).tolist() for part in parts]

    return {
        "samples": [len(part) for part in truth],
        "hits_before": hits("before"),
        "hits_after": hits("after"),
        "predicted": counts(chosen["scored"]),
        "labels": counts(truth),
    }


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the runs of every number, ``"score_std"``, and the runs' ``"series"`` as a list.

    The spread is the standard deviation over runs (divisor n - 1; 0 for a single run).

    Raises:
        ValueError: there are no runs.
    """
    if not len(runs):
        raise ValueError("runs: needed at least one result of measure_stream, found none")
    means: dict[str, Any] = {
        key: statistics.fmean(run[key] for run in runs) for key in runs[0] if key != "series"
    }
    scores = [run["score"] for run in runs]
    means["score_std"] = statistics.stdev(scores) if len(scores) > 1 else 0.0
    means["series"] = [run["series"] for run in runs]
    return means

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
        steps (predictions made only for the record are not timed). ``"series"``, a value a batch:
        ``"samples"``, ``"hits_before"``, ``"hits_after"``, and counts [C] of ``"predicted"``
        classes (of the scored prediction) and of ``"labels"``.

    Raises:
        ValueError, TypeError: the stream is empty, a batch or its labels cannot be used, or
            ``classes`` is not the width of the logits. Labels are checked before the batch is
            adapted on, so that nothing is learnt from one that is refused.
    """
    method, width = adapted.options, None
    class_count(classes)
    names = ("samples", "hits_before", "hits_after", "predicted", "labels")
    series: dict[str, list] = {name: [] for name in names}
    seconds = 0.0
    for batch in batches:
        inputs, labels = _split(batch)
        labels = class_labels(labels, _samples(adapted, inputs), classes)
        if width is None:
            width = _check_width(adapted, inputs, classes)
        start = time.perf_counter()
        result = adapted.step(*inputs)
        if result.logits.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        is_final = method.score_at == "after" or not updates_tensors(method)
        after = result.logits if is_final else adapted.predict(*inputs)
        labels = labels.to(after.device)
        series["samples"].append(len(labels))
        series["hits_before"].append(_hits(result.logits_before, labels))
        series["hits_after"].append(_hits(after, labels))
        series["predicted"].append(_counts(result.logits.argmax(dim=1), classes))
        series["labels"].append(_counts(labels, classes))
    samples = sum(series["samples"])
    if not samples:
        raise ValueError("batches: the stream is empty; needed at least one batch")
    accuracy = {
        when: 100 * sum(series[f"hits_{when}"]) / samples for when in ("before", "after")
    }  # fmt: skip
    return {
        **accuracy,
        "score": accuracy["after" if method.score_at == "after" else "before"],
        "samples_per_s": samples / seconds,
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


def _hits(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(dim=1) == labels).sum())


def _counts(classes: Tensor, n: int) -> list[int]:
    return torch.bincount(classes, minlength=n).tolist()


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

"""Class labels of callers, checked before anything is computed with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dense import dense

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def class_labels(labels: Any, samples: int | None, classes: int) -> Tensor:
    """Labels as plain int64 [n], on the device that they are on.

    Args:
        samples: n; None: not known.
        classes: labels are 0 to this number less one.

    Raises:
        TypeError: no dense tensor of integers.
        ValueError: another shape than [n], or a label outside of the classes.
    """
    size = "n" if samples is None else samples
    needed = f"must be a tensor [{size}] of integers from 0 to {classes - 1}"
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels {needed}, found {labels!r:.80}")
    labels = dense("labels", labels).detach()
    if labels.ndim == 2 and labels.shape[1] == classes:
        raise ValueError(
            f"labels {needed}, found shape {list(labels.shape)}: of one-hot rows or probabilities "
            "take labels.argmax(1)"
        )
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels {needed}, found {labels.dtype}; of whole numbers: labels.long()")
    if labels.ndim != 1 or (samples is not None and len(labels) != samples):
        raise ValueError(f"labels {needed}, one a sample, found shape {list(labels.shape)}")
    if len(labels):
        low, high = (int(x) for x in torch.aminmax(labels))
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels must lie in 0 to {classes - 1}, there are {classes} classes; found {low} "
                f"to {high}"
            )
    return labels.long()


def class_count(classes: Any) -> int:
    """A number of classes.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(classes, bool) or not isinstance(classes, int):
        raise TypeError(f"classes must be their number, found {classes!r:.80}")
    if classes < 1:
        raise ValueError(f"classes={classes}: needed at least 1")
    return classes

"""What a step returns, and warnings at the line of the caller."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import FrameType

from torch import Tensor


def warn(message: str, category: type[Warning]) -> None:
    """A warning at the caller's line, however deep inside fasttta and torch it is raised."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("fasttta", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@dataclass(repr=False)
class StepResult:
    """What a step returns: fresh tensors on the model's device; nothing synchronises.

    Attributes:
        logits: [B, C], the prediction (before or after the update, as the method scores).
        logits_before: [B, C], of the current batch before the update.
        losses: 0-d tensors of the first inner step, unweighted except ``"total"``.
        stats: tensors the method's docstring describes.
        n_used: 0-d int64, samples in the loss of the update (past batches of a window included).
            At 0 nothing was learnt from the batch: no update, or (SAR) one by momentum alone.
        grads: with ``trace=True``: gradients of the first inner step, named as ``tuned``.
        trace: with ``trace=True``: the method's intermediates.
    """

    logits: Tensor
    logits_before: Tensor
    n_used: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] | None = None
    trace: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        """Shapes, and the values of single numbers."""
        parts = [f"{x.name}={_brief(getattr(self, x.name))}" for x in fields(self)]
        return f"StepResult({', '.join(parts)})"


def _brief(value: Tensor | Mapping[str, Tensor] | None) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}" if value.ndim else f"{value.item():.4g}"
    if value is None:
        return "None"
    return "{" + ", ".join(f"{name}: {_brief(x)}" for name, x in value.items()) + "}"

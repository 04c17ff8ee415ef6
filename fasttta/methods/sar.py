"""SAR: sharpness-aware entropy minimisation on reliable samples, with recovery."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from .. import functional as F
from ..protocols import FusionModel
from .base import Objective
from .options import Finite, Positive
from .special_bases import StatefulMethod, TwoPassMethod


@dataclass(frozen=True)
class SAR(TwoPassMethod, StatefulMethod):
    """Minimise the entropy of reliable samples at weights perturbed towards higher loss.

    Two passes a step: the gradient at the weights perturbs them by ``rho`` along it, the gradient
    there updates them. Samples count if their entropy is below the margin, in the second pass if
    it still is. When the moving average of the second loss falls below ``reset_below``, weights,
    optimiser and average go back to their start. Where no sample counts the gradient is 0 and Adam
    goes on by momentum, as in the official code.

    Args:
        rho: length of the perturbation.
        e_margin: entropy margin in nats; None: 0.4 ln C.
        reset_below: bound on the moving average (0.9 old + 0.1 new) of the second loss.
        lr: Adam's learning rate.

    ``losses``: ``"entropy"`` (first pass), ``"sharp"`` (second pass), ``"total"`` = the first.
    ``stats``: ``"used"`` [B] bool (second pass); ``"average"`` 0-d, the moving average, nan before
    the first; ``"recovered"`` 0-d bool. The prediction is the one before the update.

    Source: Niu et al., "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023, as
    re-implemented for the audio-visual benchmark by the BriMPR code: SAM over Adam, LayerNorms of
    the encoders' blocks 0 to 8. Differences from official code: ``reset_below`` counts (theirs is
    fixed at 0.2), and a recovery also forgets the average (theirs writes the stale one back and
    recovers at every step from then on).
    """

    name: ClassVar[str] = "sar"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "read-benchmark": {"lr": 1e-4, "rho": 0.05, "reset_below": 0.2}
    }
    group: ClassVar[str | None] = "encoder_norm"
    frozen_encoder: ClassVar[bool] = False

    rho: Annotated[float, Positive()] = 0.05
    e_margin: Annotated[float, Positive()] | None = None
    reset_below: Annotated[float, Finite()] = 0.2
    lr: float = 1e-4

    def _mean_entropy(self, logits: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of the samples below the margin and ``among`` these, and their mask."""
        margin = 0.4 * math.log(logits.shape[1]) if self.e_margin is None else self.e_margin
        entropy = F.entropy(logits)
        used = (entropy.detach() < margin) & among
        return torch.where(used, entropy, 0).sum() / used.sum().clamp_min(1), used

    def blank_state(self, features: Tensor, num_classes: int) -> dict[str, Tensor]:
        """``"average"``, 0-d: the moving average of the second loss, -1 before the first."""
        return {"average": -features.new_ones(())}

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """Mean entropy of the reliable samples."""
        logits = self.logits(model, features)
        loss, used = self._mean_entropy(logits, valid > 0)
        return Objective(
            losses={"entropy": loss, "total": loss},
            logits=logits,
            n_used=used.sum(),
            stats={"used": used},
        )

    def second_objective(
        self, model: FusionModel, features: Any, first: Objective, *, state: Mapping[str, Tensor]
    ) -> tuple[Objective, Tensor]:
        """Mean entropy of those that are still reliable, and whether to recover."""
        logits = self.logits(model, features)
        loss, used = self._mean_entropy(logits, first.stats["used"])
        average = state.get("average", -torch.ones_like(loss.detach()))  # negative at first
        new = loss.detach()
        moved = torch.where(average < 0, new, 0.9 * average + 0.1 * new)
        average = torch.where(used.any() & torch.isfinite(new), moved, average)
        recover = (average >= 0) & (average < self.reset_below)
        second = Objective(
            losses={**first.losses, "sharp": loss, "total": loss},
            logits=first.logits,
            n_used=used.sum(),
            stats={
                "used": used,
                "average": torch.where(average < 0, torch.nan, average),
                "recovered": recover,
            },
            state={"average": torch.where(recover, -1, average)},
        )
        return second, recover

"""TENT: entropy minimisation of the normalisation layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .. import functional as F
from ..protocols import FusionModel
from .base import Method, Objective, sample_weight, samples_used, weighted_mean


@dataclass(frozen=True)
class Tent(Method):
    """Minimise the mean prediction entropy over all LayerNorm weights and biases on the path.

    Args:
        lr: Adam's learning rate.

    ``losses``: ``"entropy"``, ``"total"``. The prediction is the one before the update.

    Source: Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021, as
    re-implemented for the audio-visual benchmark by the BriMPR code (Adam 1e-4, LayerNorm in
    place of the original's BatchNorm). Preset ``"read-benchmark"`` is those settings.
    """

    name: ClassVar[str] = "tent"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"read-benchmark": {"lr": 1e-4}}
    group: ClassVar[str | None] = "norm"
    frozen_encoder: ClassVar[bool] = False

    lr: float = 1e-4

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """Mean entropy of one batch."""
        logits = self.logits(model, features)
        entropy = weighted_mean(F.entropy(logits), sample_weight(valid))
        return Objective(
            losses={"entropy": entropy, "total": entropy},
            logits=logits,
            n_used=samples_used(valid, logits),
        )

"""READ: reliable fusion by adapting the fusion block's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from .. import functional as F
from ..protocols import FusionModel
from .base import Objective, WeightedMethod, balance_warning, sample_weight, samples_used


@dataclass(frozen=True)
class READ(WeightedMethod):
    """Tune the fusion block's q, k, v with a confidence-aware loss and a class-balance term.

    The confidence loss with its fixed threshold 1/e is -p_max ln p_max, i.e. principal entropy
    with k = 1 and no epsilon; the balance term is the entropy of softmax(sum of predictions).

    Args:
        lr: Adam's learning rate.

    ``losses``: ``"entropy"`` (the confidence loss), ``"balance"`` (the positive entropy),
    ``"total"`` = entropy - balance. The prediction is the one after the update.

    Source: Yang et al., "Test-time Adaptation against Multi-modal Reliability Bias", ICLR 2024,
    and its code. Preset ``"paper"`` is its settings (batch 64). The second forward pass here
    reuses the frozen encoders' output, which the official code computes again; same numbers.
    """

    name: ClassVar[str] = "read"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"lr": 1e-4}}
    group: ClassVar[str | None] = "fusion_qkv"
    frozen_encoder: ClassVar[bool] = True

    lr: float = 1e-4
    score_at: str = field(default="after", kw_only=True)

    def weights(self) -> tuple[float, ...]:
        """Of confidence and balance; they are fixed."""
        return 1.0, 1.0

    def single_sample(self) -> str:
        """A warning: the class balance of one sample works against its confidence."""
        return balance_warning(self)

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """Confidence loss and class balance of one batch."""
        logits = self.logits(model, features)
        total, entropy, balance = F.adaptation_head(
            logits, 1, balance="softmax-sum", eps=0.0, weight=sample_weight(valid)
        )
        losses = {"entropy": entropy, "balance": balance, "total": total}
        return Objective(losses=losses, logits=logits, n_used=samples_used(valid, logits))

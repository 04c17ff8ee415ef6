"""The unadapted model, as a method: the baseline of every table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Method, Objective


@dataclass(frozen=True)
class Source(Method):
    """Predict with the source model and change nothing; lr and steps have no effect."""

    name: ClassVar[str] = "source"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    families: ClassVar[tuple[str, ...]] = ("fusion", "vision-language")
    group: ClassVar[str | None] = None
    frozen_encoder: ClassVar[bool] = True

    lr: float = 0.0

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        return Objective(losses={}, logits=self.logits(model, features), n_used=0)

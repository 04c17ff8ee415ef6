"""The unadapted model, as a method: the baseline of every table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..protocols import FusionModel
from .base import Method, Objective
from .prompt_text import split_prompt


@dataclass(frozen=True)
class Source(Method):
    """Predict with the source model and change nothing; lr and steps have no effect.

    Args:
        prompt: of vision-language models, as in ``TPT``.
    """

    name: ClassVar[str] = "source"
    captured_by_default: ClassVar[bool] = True
    RESOURCES: ClassVar[tuple[str, ...]] = ("tokenizer",)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    families: ClassVar[tuple[str, ...]] = ("fusion", "vision-language", "features")
    group: ClassVar[str | None] = None
    frozen_encoder: ClassVar[bool] = True

    lr: float = 0.0
    prompt: str = field(default="a photo of a", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        split_prompt(self.prompt)

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """The prediction, without a loss."""
        return Objective(losses={}, logits=self.logits(model, features), n_used=0)

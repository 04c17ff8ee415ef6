"""fasttta's own models whose scores a rational head weighs, and bare features under such a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from ..models import ModelWithHead, RationalCLIP
from ..protocols import FusionModel
from .base import FusionFamily
from .refusals import altered


@dataclass
class RationalFamily(FusionFamily):
    """A ``FeatureClassifier``, ``RationalCAVMAE`` or ``RationalCLIP``, which runs as it is."""

    default_method: ClassVar[str] = "rada"
    no_classes: ClassVar[str] = "this model has its own; adapt its .model for others"

    @classmethod
    def of(cls, model: ModelWithHead, prefix: str) -> RationalFamily:
        """The family of a model of fasttta's own."""
        module = model if altered(model) else None
        # it lacks attention, the part of a fusion model that "rada" does not use
        fusion = cast(FusionModel, model)
        name = f"fasttta.models.{type(model).__name__}"
        images = isinstance(model, RationalCLIP)
        return cls(name, fusion, prefix, module, takes_images=images)

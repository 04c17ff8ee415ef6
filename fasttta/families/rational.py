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

    @classmethod
    def of(cls, model: ModelWithHead, prefix: str) -> RationalFamily:
        """The family of a model of fasttta's own."""
        module = model if altered(model) else None
        # "rada" asks for no attention, which is what it lacks of a fusion model
        fusion = cast(FusionModel, model)
        return cls(f"fasttta.models.{type(model).__name__}", fusion, prefix, module)

    @property
    def takes_images(self) -> bool:
        """Of a RationalCLIP; features and a CAV-MAE's inputs have no views."""
        return isinstance(self.model, RationalCLIP)

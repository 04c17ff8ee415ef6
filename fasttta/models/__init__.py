"""Models that fasttta builds itself, from official checkpoints."""

from .cavmae.model import CAVMAE
from .clip.model import CLIP
from .rational.head import FeatureAdapter, RationalHead
from .rational.models import FeatureClassifier, ModelWithHead, RationalCAVMAE, RationalCLIP

__all__ = [
    "CAVMAE",
    "CLIP",
    "FeatureAdapter",
    "FeatureClassifier",
    "ModelWithHead",
    "RationalCAVMAE",
    "RationalCLIP",
    "RationalHead",
]

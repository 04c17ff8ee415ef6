"""Models that fasttta builds itself, from official checkpoints."""

from .cavmae.model import CAVMAE
from .clip.model import CLIP
from .rational.head import FeatureAdapter, FeatureClassifier, RationalHead
from .rational.models import RationalCAVMAE, RationalCLIP

__all__ = [
    "CAVMAE", "CLIP", "FeatureAdapter", "FeatureClassifier", "RationalCAVMAE", "RationalCLIP",
    "RationalHead",
]  # fmt: skip

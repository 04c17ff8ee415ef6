"""Models that fasttta builds itself, from official checkpoints."""

from .cavmae import CAVMAE
from .clip import CLIP
from .rational import FeatureAdapter, FeatureClassifier, RationalHead
from .rational_models import RationalCAVMAE, RationalCLIP

__all__ = [
    "CAVMAE", "CLIP", "FeatureAdapter", "FeatureClassifier", "RationalCAVMAE", "RationalCLIP",
    "RationalHead",
]  # fmt: skip

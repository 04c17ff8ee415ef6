"""Models that fasttta builds itself, from official checkpoints."""

from .cavmae import CAVMAE
from .clip import CLIP
from .rational import FeatureAdapter, FeatureClassifier, RationalHead

__all__ = ["CAVMAE", "CLIP", "FeatureAdapter", "FeatureClassifier", "RationalHead"]

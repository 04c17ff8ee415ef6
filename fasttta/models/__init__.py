"""Models that fasttta builds itself, from official checkpoints."""

from .cavmae import CAVMAE
from .rational import FeatureAdapter, FeatureClassifier, RationalHead

__all__ = ["CAVMAE", "FeatureAdapter", "FeatureClassifier", "RationalHead"]

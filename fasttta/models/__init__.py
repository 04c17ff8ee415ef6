"""Models that fasttta builds itself, from official checkpoints."""

from .cavmae import CAVMAE
from .clip import CLIP

__all__ = ["CAVMAE", "CLIP"]

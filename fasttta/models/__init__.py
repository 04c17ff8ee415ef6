"""Models that fasttta builds itself, from official checkpoints."""

from .cavmae import CAVMAE

__all__ = ["CAVMAE"]

"""Views of an image: crops, augmentation chains, attention regions and mixing, batched."""

from .types import Views

__all__ = ["Views"]

"""Views of an image: crops, augmentation chains, attention regions and mixing, batched."""

from .make import make_views
from .regions import mix_views, region_map
from .types import Views

__all__ = ["Views", "make_views", "mix_views", "region_map"]

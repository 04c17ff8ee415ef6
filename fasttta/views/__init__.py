"""Views of an image: crops, augmentation chains, attention regions and mixing, batched."""

from .image import Views
from .make import make_views
from .regions import mix_views, region_map

__all__ = ["Views", "make_views", "mix_views", "region_map"]

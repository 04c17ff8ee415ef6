"""Views of an image: crops, augmentation chains, attention regions and mixing, batched."""

from .make import make_views
from .views import Views, mix_views, region_map

__all__ = ["Views", "make_views", "mix_views", "region_map"]

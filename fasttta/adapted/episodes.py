"""Images of a call as episodes, and episodes as one result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.step import StepResult
from ..methods.base import Method
from ..methods.episodic import Episode
from ..ops.checks import dense
from ..views import Views, make_views


def as_list(images: Any) -> tuple[bool, Sequence[Any]]:
    """Whether it is one image, and the images as a sequence.

    Raises:
        ValueError: there are none.
        TypeError: a tensor that is not dense.
    """
    if isinstance(images, (list, tuple)):
        if not len(images):
            raise ValueError("images is an empty list; needed at least one image")
        return False, images
    if isinstance(images, Tensor):
        images = dense("images", images)
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        if not len(images):
            raise ValueError(f"images is an empty batch {list(images.shape)}")
        return False, list(images)
    return True, [images]


def made_views(
    image: Any,
    index: int,
    method: Method | None,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Views:
    """The views of an image that a method asks for (None: the anchor alone), from this seed.

    Raises:
        ValueError, TypeError: it is no image, or on another device.
    """
    if isinstance(image, Tensor) and image.device != device:
        raise ValueError(f"image {index} is on {image.device}, the model on {device}")
    try:
        views = make_views(
            image,
            getattr(method, "view_count", 1),
            generator=torch.Generator().manual_seed(seed),
            resolution=size,
            base_view=getattr(method, "base_view", "crop"),
            augment=getattr(method, "augmented", False),
            device=device,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"image {index}: {error}") from error
    assert isinstance(views, Views)  # of one image
    return _cast(views, dtype)


def given_views(views: Views, size: int, device: torch.device, dtype: torch.dtype) -> Views:
    """A user's views, fit for the model.

    Raises:
        ValueError: they are not.
    """
    if views.resolution != size:
        raise ValueError(f"views are {views.resolution} pixels a side, the model takes {size}")
    if views.base.device != device:
        raise ValueError(f"views are on {views.base.device}, the model on {device}")
    return _cast(views, dtype)


def _cast(views: Views, dtype: torch.dtype) -> Views:
    def own(x: Tensor) -> Tensor:
        x = x.detach()
        return x.clone() if x.is_inference() else x

    with torch.inference_mode(False), torch.no_grad():
        alike = views.mix.data_ptr() == views.base.data_ptr()  # without augmentation
        base = own(views.base).to(dtype)
        mix = base if alike else own(views.mix).to(dtype)
        region = None if views.region is None else own(views.region)
        return Views.trusted(base, mix, own(views.weight), region)


def result(parts: list[Episode], single: bool, trace: bool) -> StepResult:
    """Episodes of all images; ``single``: no leading B in what is not logits."""

    def joined(name: str, fold: bool = True) -> Any:
        found = [getattr(part, name) for part in parts]
        if isinstance(found[0], Tensor):
            return torch.cat(found)
        out = {key: torch.cat([each[key] for each in found]) for key in found[0]}
        return {key: x[0] if single and fold else x for key, x in out.items()}

    used = joined("used")
    return StepResult(
        logits=joined("logits"),
        logits_before=joined("logits_before"),
        n_used=used.sum(),
        losses={name: x.mean() for name, x in joined("losses", fold=False).items()},
        stats={name: x.clone() for name, x in joined("stats").items()},
        grads={name: x.clone() for name, x in joined("grads").items()} if trace else None,
        trace={name: x.clone() for name, x in joined("trace").items()} if trace else None,
    )

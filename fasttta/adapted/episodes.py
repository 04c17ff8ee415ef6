"""Images of a call as views and episodes, and episodes as one result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..engine.episode import Episodes
from ..engine.result import StepResult
from ..ops.checks import dense
from ..views import Views, make_views


class MakesViews(Protocol):
    """A method that says which views it wants of an image."""

    @property
    def view_count(self) -> int:
        """The views of an image, the original included."""

    @property
    def augmented(self) -> bool:
        """Whether views are made with AugMix."""

    @property
    def base_view(self) -> str:
        """How the base of a view is made: ``"crop"`` or ``"flip"``."""


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


def items_of(images: Any, views: Any) -> tuple[bool, Sequence[Any]]:
    """Whether it is a single image, and images or views, one for each episode."""
    if (images is None) == (views is None):
        raise TypeError("needed images, or views= of one image; found both or neither")
    if views is None:
        return as_list(images)
    if not isinstance(views, Views):
        raise TypeError(f"views must be fasttta.data.Views, found {type(views).__name__}")
    return True, [views]


def as_views(
    item: Any,
    index: int,
    method: MakesViews | None,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Views:
    """The views of an image that a method asks for (None: the image alone), from this seed; or a
    user's views, fit for the model.

    Args:
        index: of the image in its call, for messages.
        size: of the model's images.

    Raises:
        ValueError, TypeError: it is no image, or on another device, or views do not fit.
    """
    if isinstance(item, Views):
        if item.resolution != size:
            raise ValueError(f"views are {item.resolution} pixels a side, the model takes {size}")
        if item.base.device != device:
            raise ValueError(f"views are on {item.base.device}, the model on {device}")
        return _cast(item, dtype)
    if isinstance(item, Tensor) and item.device != device:
        raise ValueError(f"image {index} is on {item.device}, the model on {device}")
    options: dict[str, Any] = {"augment": False}
    if method is not None:
        options = {"base_view": method.base_view, "augment": method.augmented}
    try:
        views = make_views(
            item,
            1 if method is None else method.view_count,
            generator=torch.Generator().manual_seed(seed),
            resolution=size,
            device=device,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"image {index}: {error}") from error
    assert isinstance(views, Views)  # of one image
    return _cast(views, dtype)


def _cast(views: Views, dtype: torch.dtype) -> Views:
    def owned(x: Tensor) -> Tensor:
        x = x.detach()
        return x.clone() if x.is_inference() else x

    with torch.inference_mode(False), torch.no_grad():
        alike = views.mix.data_ptr() == views.base.data_ptr()  # without augmentation
        base = owned(views.base).to(dtype)
        mix = base if alike else owned(views.mix).to(dtype)
        region = None if views.region is None else owned(views.region)
        return Views.trusted(base, mix, owned(views.weight), region)


def as_episodes(result: StepResult) -> Episodes:
    """The result of one episode as that of B = 1."""

    def rows(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {name: x.unsqueeze(0) for name, x in (tensors or {}).items()}

    return Episodes(
        result.logits, result.logits_before, result.n_used.unsqueeze(0), rows(result.losses),
        rows(result.stats), rows(result.grads), rows(result.trace),
    )  # fmt: skip


def as_result(parts: Sequence[Episodes], single: bool, trace: bool) -> StepResult:
    """Episodes of all images; ``single``: no leading B in what is not logits."""

    def joined(name: str) -> dict[str, Tensor]:
        groups = [getattr(part, name) for part in parts]
        tensors = {key: torch.cat([group[key] for group in groups]) for key in groups[0]}
        return {key: x[0] if single else x for key, x in tensors.items()}

    losses = [part.losses for part in parts]
    return StepResult(
        logits=torch.cat([part.logits for part in parts]),
        logits_before=torch.cat([part.logits_before for part in parts]),
        n_used=torch.cat([part.used for part in parts]).sum(),
        losses={name: torch.cat([loss[name] for loss in losses]).mean() for name in losses[0]},
        stats={name: x.clone() for name, x in joined("stats").items()},
        grads={name: x.clone() for name, x in joined("grads").items()} if trace else None,
        trace={name: x.clone() for name, x in joined("trace").items()} if trace else None,
    )

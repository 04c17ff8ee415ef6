"""One image as a tensor [3, H, W]: 8-bit levels stay levels, floats stay floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.checks import dense
from .types import check_range


def _is_pil(image: Any) -> bool:
    return all(hasattr(image, name) for name in ("mode", "convert", "tobytes", "size"))


def _from_pil(image: Any, name: str) -> Tensor:
    if image.mode[0] in "IF":  # PIL would clip 16-bit levels to 255 without a word
        raise ValueError(
            f"{name} is a PIL image of mode {image.mode!r}; needed 8 bits per channel, e.g. 'RGB'"
        )
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width}x{image.height}; needed at least one pixel")
    levels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return levels.view(image.height, image.width, 3).permute(2, 0, 1)


def layout_advice(shape: Sequence[int], levels: bool, array: bool) -> str:
    """What to type where only the order of an image's axes is wrong; else an empty string.

    Args:
        levels: whether the image is of 8-bit levels, which lie as [H, W, 3].
        array: whether it is a NumPy array, whose axes ``transpose`` reorders.
    """
    call = "transpose" if array else "permute"
    if len(shape) == 3 and shape[0 if levels else 2] == 3:
        order, layout = ("1, 2, 0", "[3, H, W]") if levels else ("2, 0, 1", "[H, W, 3]")
        return f"; if it is {layout}, give image.{call}({order})"
    return ""


def read_image(image: Any, name: str, device: torch.device | str | None = None) -> Tensor:
    """A PIL image or tensor as uint8 levels or floats in [0, 1], [3, H, W] either way.

    Args:
        image: a PIL image with 8 bits per channel, a uint8 tensor or array [H, W, 3], or a floating
            one [3, H, W] in [0, 1]. Half precision becomes float32.
        name: what errors call it.
        device: where the result lies; None: where the image is, a PIL image on the CPU.

    Raises:
        TypeError: it is none of these.
        ValueError: its shape or its values are wrong.
    """
    array = isinstance(image, np.ndarray)
    if array:
        image = torch.from_numpy(image.copy())  # writable, without negative strides
    if isinstance(image, Tensor):
        image = dense(name, image)
    if _is_pil(image):
        pixels = _from_pil(image, name)
    elif not isinstance(image, Tensor):
        raise TypeError(
            f"{name} is a {type(image).__name__}; needed a PIL image, a floating tensor [3, H, W] "
            "in [0, 1] or a uint8 tensor [H, W, 3]"
        )
    elif image.dtype == torch.uint8:
        if image.ndim != 3 or image.shape[2] != 3 or image.numel() == 0:
            raise ValueError(
                f"{name} is uint8 with shape {list(image.shape)}; needed [H, W, 3] with at least "
                f"one pixel{layout_advice(image.shape, True, array)}"
            )
        pixels = image.permute(2, 0, 1)
    elif image.is_floating_point():
        if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(
                f"{name} has shape {list(image.shape)}; needed [3, H, W] with at least one pixel"
                f"{layout_advice(image.shape, False, array)}"
            )
        pixels = image.detach()
        if check_range(**{name: pixels}):
            pixels = pixels.clamp(0.0, 1.0)
        if pixels.dtype != torch.float64:
            pixels = pixels.float()
    else:
        raise TypeError(f"{name} is {image.dtype}; needed uint8 or floating point")
    return (pixels if device is None else pixels.to(device)).contiguous()


def to_levels(pixels: Tensor) -> Tensor:
    """Floats in [0, 1] as uint8 levels, cut and not rounded, as official code stores them.

    Levels divided by 255 in float32 come back unchanged.
    """
    return pixels if pixels.dtype == torch.uint8 else (pixels * 255).to(torch.uint8)


def to_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 levels as floats in [0, 1]; floats as they are."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images

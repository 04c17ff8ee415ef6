"""CAV-MAE's video input: one image, resized, cropped and normalised."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import dense
from ..views.make import layout_advice
from ..views.views import ROUNDING, shown


def _resized(height: int, width: int, size: int) -> tuple[int, int]:
    """torchvision's rule: the short side becomes ``size``, the long one is rounded down."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _crop(pixels: Tensor, size: int) -> Tensor:
    """The centre [..., size, size]; round() goes to the even neighbour, as in torchvision."""
    height, width = pixels.shape[-2:]
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return pixels[..., top : top + size, left : left + size].contiguous()


def _is_pil(image: Any) -> bool:
    return all(hasattr(image, name) for name in ("mode", "convert", "resize", "tobytes"))


def _resize_pil(image: Any, size: int) -> Tensor:
    """A PIL image as float32 [3, h, w] in [0, 1], its short side ``size``."""
    from PIL import Image

    if image.mode[0] in "IF":  # PIL would clip 16-bit levels to 255 without a word
        raise ValueError(
            f"image is a PIL image of mode {image.mode!r}; needed 8 bits per channel, e.g. 'RGB'"
        )
    if 0 in image.size:
        raise ValueError(f"image is {image.width}x{image.height}; needed at least one pixel")
    height, width = _resized(image.height, image.width, size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.view(height, width, 3).permute(2, 0, 1).float() / 255


def _pixels(image: Any) -> tuple[Tensor, bool]:
    """A tensor or array as float32 [3, H, W] in [0, 1], and whether it came in 8-bit levels."""
    array = not isinstance(image, Tensor)
    if array:
        if not hasattr(image, "__array_interface__"):
            raise TypeError(
                f"image is a {type(image).__name__}; needed a PIL image, a torch tensor "
                "or a numpy array"
            )
        image = torch.from_numpy(image.copy())  # the copy is writable and has positive strides
    image = dense("image", image)
    shape = list(image.shape)
    if image.dtype == torch.uint8:
        if image.ndim != 3 or shape[2] != 3:
            raise ValueError(
                f"image is uint8 with shape {shape}; needed [H, W, 3]"
                f"{layout_advice(shape, True, array)}"
            )
        pixels = image.permute(2, 0, 1).float() / 255
    elif image.is_floating_point():
        if image.ndim != 3 or shape[0] != 3:
            raise ValueError(
                f"image is {image.dtype} with shape {shape}; needed [3, H, W]"
                f"{layout_advice(shape, False, array)}"
            )
        pixels = image.float()
    else:
        raise TypeError(f"image is {image.dtype}; needed uint8 or floating point")
    if pixels.numel() == 0:
        raise ValueError(f"image has shape {shape}; needed at least one pixel")
    low, high = (bound.item() for bound in torch.aminmax(pixels))
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # written so that NaN fails too
        raise ValueError(
            f"image has pixels {shown(low, high)}; needed [0, 1]. "
            "Is it already normalised, or in 0..255? Pass it before normalising, divided by 255"
        )
    return pixels.clamp(0.0, 1.0), image.dtype == torch.uint8


def _resize_tensor(pixels: Tensor, size: int, levels: bool) -> Tensor:
    """Antialiased bicubic [3, H, W] -> [3, h, w]: first the width, then the height.

    PIL stores 8-bit levels between its two passes; clamping only once at the end is off by tens
    of levels on images of hard edges, where bicubic overshoots.
    """
    rows, columns = pixels.shape[-2:]
    height, width = _resized(rows, columns, size)
    for shape in ((pixels.shape[-2], width), (height, width)):
        if shape != pixels.shape[-2:]:
            pixels = F.interpolate(pixels[None], shape, mode="bicubic", antialias=True)[0]
            if levels:
                pixels = (pixels * 255).round() / 255
            pixels = pixels.clamp(0.0, 1.0)
    return pixels


def cavmae_frame(
    image: Any,
    *,
    size: int = 224,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
) -> Tensor:
    """CAV-MAE's video input from one frame [3, size, size] float32.

    Short side to ``size`` (bicubic, antialiased), centre crop, levels to [0, 1], normalised.

    Args:
        image: a PIL image with 8 bits per channel, resized by PIL itself; or a uint8 tensor or
            array [H, W, 3]; or a floating one [3, H, W] in [0, 1]. Channels are RGB. A tensor
            stays on its device; uint8 is within one level of what PIL gives.
        size: height and width of the result in pixels.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides them after that.

    Raises:
        TypeError: image is none of the above.
        ValueError: image has the wrong shape, no pixel, or floats outside [0, 1], as those that
            are already normalised; a PIL image has more than 8 bits per channel; size, mean or
            std cannot be used.

    Source: Gong et al., "Contrastive Audio-Visual Masked Autoencoder", ICLR 2023, evaluation
    loader: torchvision's Resize, CenterCrop, ToTensor, Normalize. Where that one puts 0.01 in
    place of an image it cannot read, this raises. Floats are clamped to [0, 1] after resizing,
    which torchvision does not do.
    """
    if size < 1:
        raise ValueError(f"size is {size}; needed at least 1 pixel")
    if len(mean) != 3:
        raise ValueError(f"mean is {mean}; needed three numbers, for red, green and blue")
    if len(std) != 3 or not all(value > 0 for value in std):
        raise ValueError(f"std is {std}; needed three numbers above zero")
    if _is_pil(image):
        pixels = _resize_pil(image, size)
    else:
        pixels, levels = _pixels(image)
        pixels = _resize_tensor(pixels, size, levels)
    pixels = _crop(pixels, size)
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]

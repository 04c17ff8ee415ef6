"""Crops and resizing. uint8 images follow Pillow's fixed point; floating ones are not rounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BITS = 22  # Pillow's fixed point: 32 bits less 8 of the level and 2 of overshoot


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


_FILTERS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}


def _taps(length: int, size: int, mode: str) -> tuple[Tensor, Tensor]:
    """First input index [size] and fixed-point weights int32 [size, K] of each output pixel.

    The filter widens with the reduction; a window over the edge is cut and normalised again.
    """
    kernel, radius = _FILTERS[mode]
    scale = length / size
    stretch = max(scale, 1.0)
    centre = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = (centre - radius * stretch + 0.5).trunc().clamp(min=0).long()
    last = (centre + radius * stretch + 0.5).trunc().clamp(max=length).long()
    taps = torch.arange(int((last - first).max()), device="cpu")
    i_in = first[:, None] + taps  # [size, K]
    weights = kernel((i_in - centre[:, None] + 0.5) * (1 / stretch))
    weights = weights.masked_fill(i_in >= last[:, None], 0.0)
    weights = weights / weights.sum(1, keepdim=True)
    fixed = weights * (1 << _BITS)
    return first, (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc().to(torch.int32)


def _resize_levels(levels: Tensor, size: int, dim: int, mode: str) -> Tensor:
    """uint8 [3, H, W] -> the same with ``size`` along ``dim``, rounded and clipped as Pillow."""
    length = levels.shape[dim]
    if length == size:
        return levels
    first, weights = (x.to(levels.device) for x in _taps(length, size, mode))
    shape = [1, 1, 1]
    shape[dim] = size
    # int32: 255 * 2^22 times a cubic's sum of |weights| (1.3) stays below 2^31
    total = torch.zeros((), dtype=torch.int32, device=levels.device)
    for k in range(weights.shape[1]):
        tap = levels.index_select(dim, (first + k).clamp(max=length - 1)).int()
        tap *= weights[:, k].view(shape)
        total = tap if k == 0 else total.add_(tap)
    return (total + (1 << (_BITS - 1)) >> _BITS).clamp(0, 255).to(torch.uint8)


def resize(image: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Antialiased [3, H, W] -> [3, height, width]: first the width, then the height, clipped after
    each (a cubic overshoots, and Pillow stores levels between the two).

    Up to 12 Pillow always took the width first; 13 takes the cheaper order, a level or two apart.

    Args:
        mode: "bilinear" or "bicubic".
    """
    if image.dtype == torch.uint8:
        return _resize_levels(_resize_levels(image, width, 2, mode), height, 1, mode)
    if mode == "bilinear":  # nothing to clip between the passes
        image = F.interpolate(image[None], (height, width), mode=mode, antialias=True)[0]
        return image.clamp(0.0, 1.0)
    for shape in ((image.shape[1], width), (height, width)):
        if shape != image.shape[1:]:
            image = F.interpolate(image[None], shape, mode=mode, antialias=True)[0].clamp(0.0, 1.0)
    return image


def centre_view(image: Tensor, size: int) -> Tensor:
    """[3, H, W] -> the anchor [3, size, size]: short side to ``size``, bicubic, centre crop.

    The long side is rounded down and the crop's corner to the even neighbour, as in torchvision.
    """
    height, width = image.shape[1:]
    if height <= width:
        height, width = size, int(size * width / height)
    else:
        height, width = int(size * height / width), size
    image = resize(image, height, width, "bicubic")
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return image[:, top : top + size, left : left + size]

"""Operations on levels: autocontrast, equalise, posterise, solarise, one channel at a time.

uint8 images follow Pillow's look-up tables. Floats in [0, 1] are rounded only where an operation
is defined on levels (which of 256 bins, which side of a threshold): to the nearest level and not
down, so that a value that ought to be a level is one on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _nearest(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def _look_up(levels: Tensor, table: Tensor) -> Tensor:
    """uint8 levels [n, 3, R, R] through tables [n, 3, 256]."""
    return table.gather(2, levels.flatten(2).long()).view(levels.shape)


def _stretch_levels(levels: Tensor) -> Tensor:
    low, high = (x.double()[..., None] for x in torch.aminmax(levels.flatten(2), dim=2))
    scale = torch.full_like(low, 255) / (high - low)  # 255.0 / x would round 1 / x first
    steps = torch.arange(256, dtype=torch.float64, device=levels.device)
    table = torch.where(high > low, (steps * scale + -low * scale).trunc(), steps)
    return _look_up(levels, table.clamp(0, 255).to(torch.uint8))


def autocontrast(images: Tensor) -> Tensor:
    """Images [n, 3, R, R] with each channel stretched to the whole range.

    A channel of less than one level's range stays: stretching it would show rounding errors.
    """
    if images.dtype == torch.uint8:
        return _stretch_levels(images)
    low, high = (x[..., None, None] for x in torch.aminmax(images.flatten(2), dim=2))
    flat = high - low < 1 / 255
    stretched = (images - low) / (high - low).masked_fill(flat, 1.0)
    return torch.where(flat, images, stretched).clamp_(0.0, 1.0)


def equalize(images: Tensor) -> Tensor:
    """Images [n, 3, R, R] with each channel's histogram made flat; always whole levels.

    With h the histogram and s = (pixels - h[brightest]) // 255, level i becomes
    (s // 2 + h[0] + ... + h[i-1]) // s. A channel of one level, or with s = 0, stays.
    """
    levels = _nearest(images)
    flat = levels.flatten(2).long()
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=flat.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = histogram.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255  # [n, 3, 1]
    below = histogram.cumsum(2) - histogram
    table = (step // 2 + below) // step.clamp(min=1)
    steps = torch.arange(256, device=flat.device)
    table = torch.where(step > 0, table, steps).clamp(max=255).to(torch.uint8)
    equal = table.gather(2, flat).view(levels.shape)
    return equal if images.dtype == torch.uint8 else equal.to(images.dtype) / 255


def posterize(images: Tensor, bits: int) -> Tensor:
    """Images [n, 3, R, R] with only the upper ``bits`` bits of each level."""
    levels = _nearest(images) & (256 - (1 << (8 - bits)))
    return levels if images.dtype == torch.uint8 else levels.to(images.dtype) / 255


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Images [n, 3, R, R] with levels from thresholds [n] (int64) on inverted."""
    dark = _nearest(images) < thresholds.to(images.device)[:, None, None, None]
    return torch.where(dark, images, (255 if images.dtype == torch.uint8 else 1) - images)

"""Affine warps of batches, bilinear, black outside. uint8 images follow Pillow."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 32  # images a piece where coordinates are float64: 32 * 50176 * 8 B = 13 MB each


def rotation(degrees: int, size: int) -> tuple[float, ...]:
    """Output to input coordinates of a counter-clockwise rotation about the centre."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    half = size / 2
    return (cos, sin, cos * -half + sin * -half + half,
            -sin, cos, -sin * -half + cos * -half + half)  # fmt: skip


def shear_x(amount: float) -> tuple[float, ...]:
    """Output to input coordinates of a shear: each row moves left by ``amount`` times its y."""
    return (1.0, amount, 0.0, 0.0, 1.0, 0.0)


def shear_y(amount: float) -> tuple[float, ...]:
    """Output to input coordinates of a shear: each column moves up by ``amount`` times its x."""
    return (1.0, 0.0, 0.0, amount, 1.0, 0.0)


def translation(x: int, y: int) -> tuple[float, ...]:
    """Output to input coordinates of a move by x pixels to the left and y pixels up."""
    return (1.0, 0.0, float(x), 0.0, 1.0, float(y))


def _warp_levels(levels: Tensor, matrices: Tensor) -> Tensor:
    """Pillow's affine transform: coordinates and blending in float64, the blend cut to a level."""
    n, channels, size = levels.shape[:3]
    centre = torch.arange(size, dtype=torch.float64, device=levels.device) + 0.5
    a, b, c, d, e, f = (column[:, None, None] for column in matrices.unbind(1))
    x = a * centre + b * centre[:, None] + c  # [n, size, size]
    y = d * centre + e * centre[:, None] + f
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    dx, dy = (x - left)[:, None], (y - top)[:, None]
    columns = [(left + i).clamp(0, size - 1).long() for i in (0, 1)]
    rows = [(top + i).clamp(0, size - 1).long() * size for i in (0, 1)]
    flat = levels.flatten(2)

    def tap(i_row: int, i_column: int) -> Tensor:
        index = (rows[i_row] + columns[i_column]).view(n, 1, -1).expand(-1, channels, -1)
        return flat.gather(2, index).view_as(levels).double()

    def blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        return first + (second - first) * share

    upper = blend(tap(0, 0), tap(0, 1), dx)
    lower = blend(tap(1, 0), tap(1, 1), dx)
    return (blend(upper, lower, dy) * inside[:, None]).to(torch.uint8)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Images [n, 3, R, R] with output pixel (x, y) taken from (a x + b y + c, d x + e y + f).

    Coordinates are of pixel centres, (0.5, 0.5) the first. Within half a pixel of the border the
    border's value is used; beyond the image it is black.

    Args:
        images: uint8 levels or floats in [0, 1].
        matrices: float64 [n, 6] on the CPU: a, b, c, d, e, f.
    """
    if images.dtype == torch.uint8:
        matrices = matrices.to(images.device)
        pieces = zip(images.split(_CHUNK), matrices.split(_CHUNK), strict=True)
        return torch.cat([_warp_levels(*piece) for piece in pieces])
    # grid_sample counts from -1 to 1: the constant terms change, the linear ones do not
    size = images.shape[-1]
    linear, constant = matrices.view(-1, 2, 3).split((2, 1), dim=2)
    constant = linear.sum(2, keepdim=True) + constant * (2 / size) - 1
    theta = torch.cat([linear, constant], 2).to(images.device, images.dtype)[..., None, None]
    centre = torch.arange(1 - size, size, 2, device=images.device, dtype=images.dtype) / size
    grid = theta[:, :, 0] * centre + (theta[:, :, 1] * centre[:, None] + theta[:, :, 2])
    inside = (grid >= -1) & (grid < 1)  # [n, 2, size, size]
    inside = inside[:, :1] & inside[:, 1:]
    warped = F.grid_sample(
        images, grid.movedim(1, 3).contiguous(), padding_mode="border", align_corners=False
    )
    return warped.mul_(inside).clamp_(max=1.0)

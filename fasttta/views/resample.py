"""Crops of one image on a GPU: what their resizing needs of the host, and all resized at once, in a
few kernels in place of three a crop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .operations import Crop, LevelTaps, anchor_size, level_taps

# Products of a pixel and a weight, up to which this is less work than one interpolation a crop:
# it goes through all rows of the image for every crop. 63 crops of 500 x 375 to 224 are 1.4e8.
_PRODUCTS = 2**28


class FloatTaps(NamedTuple):
    """Which pixels of an image, and with which weights, make those of n resized crops.

    Attributes:
        columns, column_weights: [K, n, R], K pixels of a row for each of R columns of a crop.
        rows, row_weights: [K', R, n, 1] the same of a column.
    """

    columns: Tensor
    column_weights: Tensor
    rows: Tensor
    row_weights: Tensor


class Taps(NamedTuple):
    """What the views of an image need for their resizing.

    Attributes:
        floats: of all crops; None: one is resized after the other, which needs nothing.
        levels: of the anchor and of each crop, for 8-bit levels; else empty.
    """

    floats: FloatTaps | None
    levels: list[LevelTaps]


def taps_of(crops: Sequence[Crop], shape: Sequence[int], size: int, dtype: torch.dtype) -> Taps:
    """For the anchor and crops of an image of a shape (H, W) and a type, on the CPU."""
    height, width = shape
    if dtype != torch.uint8:
        return Taps(_float_taps(crops, height, width, size, dtype), [])
    anchor = level_taps((height, width), *anchor_size(height, width, size), "bicubic")
    each = [level_taps((c.height, c.width), size, size, "bilinear") for c in crops]
    return Taps(None, [anchor, *each])


def _float_taps(
    crops: Sequence[Crop], height: int, width: int, size: int, dtype: torch.dtype
) -> FloatTaps | None:
    """Weights are computed in float64. None: one crop after the other is less work."""
    if not crops:
        return None
    numbers = torch.tensor([crop[:4] for crop in crops], device="cpu")
    top, left, high, wide = numbers.unbind(1)
    columns, column_weights = _triangles(left, wide, size)
    mirrored = torch.tensor([crop.flip for crop in crops], device="cpu")[None, :, None]
    columns = torch.where(mirrored, columns.flip(2), columns)
    column_weights = torch.where(mirrored, column_weights.flip(2), column_weights)
    rows, row_weights = _triangles(top, high, size)
    values = 3 * len(crops) * size
    if values * (height * len(columns) + size * len(rows)) > _PRODUCTS:
        return None
    return FloatTaps(
        columns.clamp(max=width - 1), column_weights.to(dtype),
        rows.clamp(max=height - 1).transpose(1, 2).unsqueeze(-1),
        row_weights.to(dtype).transpose(1, 2).unsqueeze(-1),
    )  # fmt: skip


def _triangles(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices and weights [K, n, size] of an antialiased bilinear resizing of n stretches of
    pixels: a triangle that widens with the reduction, cut at the edge and normalised again."""
    scale = length.double()[:, None] / size
    stretch = scale.clamp(min=1.0)
    centre = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * scale  # [n, size]
    first = (centre - stretch + 0.5).trunc().clamp(min=0).long()
    last = torch.minimum((centre + stretch + 0.5).trunc().long(), length[:, None])
    taps = torch.arange(int((last - first).max()), device="cpu")[:, None, None]
    i_in = first + taps  # [K, n, size]
    weights = (1 - ((i_in - centre + 0.5) / stretch).abs()).clamp(min=0)
    weights = weights.masked_fill(i_in >= last, 0.0)
    return start[:, None] + i_in, weights / weights.sum(0, keepdim=True)


def resampled(image: Tensor, taps: FloatTaps) -> Tensor:
    """Floats [3, H, W] -> the crops [n, 3, R, R], clipped to [0, 1]; taps lie on its device."""
    _, n, size = taps.columns.shape
    total: Tensor | None = None  # [3, H, n, R]
    for index, weight in zip(taps.columns, taps.column_weights, strict=True):
        part = image.index_select(2, index.flatten()).view(3, -1, n, size)
        total = part.mul_(weight) if total is None else total.addcmul_(part, weight)
    assert total is not None  # there is a tap
    crops: Tensor | None = None  # [3, R, n, R]
    for index, weight in zip(taps.rows, taps.row_weights, strict=True):
        part = total.gather(1, index.expand(3, size, n, size))
        crops = part.mul_(weight) if crops is None else crops.addcmul_(part, weight)
    assert crops is not None
    return crops.permute(2, 0, 1, 3).contiguous().clamp_(0.0, 1.0)

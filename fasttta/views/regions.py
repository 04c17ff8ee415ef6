"""Attention-guided mixing: where a view's attention is high it keeps its own pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .image import Views

_LOW, _BETWEEN, _HIGH = 0, 1, 2
_MASKS = ("quantile", "top")


def _order_statistic(maps: Tensor, rank: int) -> Tensor:
    """[N, P] -> the value of that rank, 0 the smallest, [N, 1]."""
    return maps.kthvalue(rank + 1, dim=1, keepdim=True).values


def quantile(maps: Tensor, q: float) -> Tensor:
    """[N, P] -> quantiles [N, 1] with linear interpolation between order statistics.

    The rank is computed in float64; one within 1e-6 of an integer is that integer, so that the
    threshold is a pixel's own value (0.8 of 224^2 pixels) and `>` leaves that pixel out.
    """
    rank = q * (maps.shape[1] - 1)
    low = math.floor(rank)
    share = rank - low
    if abs(rank - round(rank)) < 1e-6:
        return _order_statistic(maps, round(rank))
    return torch.lerp(_order_statistic(maps, low), _order_statistic(maps, low + 1), share)


def _upsample(attention: Tensor, resolution: int) -> Tensor:
    """[N, G, G'] -> [N, R * R], bilinear on pixel centres."""
    size = (resolution, resolution)
    if attention.shape[1:] != size:
        attention = F.interpolate(attention[:, None], size, mode="bilinear", align_corners=False)
    return attention.reshape(len(attention), -1)


def _check_share(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; needed a number in [0, 1]")


@torch.no_grad()
def region_map(
    attention: Tensor,
    resolution: int,
    mask: str = "quantile",
    high: float = 0.2,
    low: float = 0.8,
) -> Tensor:
    """Where the attention of each view is high (2), between (1) or low (0): uint8 [N, R, R].

    Args:
        attention: [N, G, G] maps, upsampled bilinearly (align_corners=False) to R.
        resolution: R.
        mask: "quantile": high is above the (1 - high)-quantile of a view's pixels, low at most its
            ``low``-quantile, so pixels tied at a threshold go together. "top": high are the
            ceil(high R²) largest pixels, low the ceil(low R²) smallest of the others; of equal
            pixels the first in reading order count as larger.
        high, low: shares of pixels; high + low <= 1. Both 0: everything is between.

    On a GPU, maps are not looked at; NaN is then between.

    Raises:
        TypeError: attention is not a floating tensor.
        ValueError: a shape or setting cannot be used, or (on the CPU) attention is not finite.

    Source: A-TPT; "quantile" its code, "top" its paper.
    """
    if not isinstance(attention, Tensor) or not attention.is_floating_point():
        kind = getattr(attention, "dtype", type(attention).__name__)
        raise TypeError(f"attention is {kind}; needed a floating tensor [N, G, G]")
    if attention.ndim != 3 or attention.numel() == 0:
        raise ValueError(f"attention has shape {list(attention.shape)}; needed [N, G, G]")
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}; needed at least 1 pixel")
    if mask not in _MASKS:
        raise ValueError(f"mask is {mask!r}; needed one of {_MASKS}")
    _check_share(high=high, low=low)
    if high + low > 1 + 1e-9:
        raise ValueError(f"high is {high} and low {low}; needed high + low <= 1")
    if attention.device.type == "cpu" and not attention.isfinite().all():
        raise ValueError("attention holds NaN or infinity; needed finite maps")
    if attention.dtype not in (torch.float32, torch.float64):
        attention = attention.float()
    maps = _upsample(attention, resolution)  # [N, P]
    region = torch.full(maps.shape, _BETWEEN, dtype=torch.uint8, device=maps.device)
    if high or low:
        if mask == "quantile":
            above = quantile(maps, 1 - high)
            below = above if math.isclose(1 - high, low) else quantile(maps, low)
            region.masked_fill_(maps <= below, _LOW).masked_fill_(maps > above, _HIGH)
        else:
            n_pixels = maps.shape[1]
            order = maps.sort(dim=1, descending=True, stable=True).indices
            n_high = _count(high, n_pixels)
            n_low = min(_count(low, n_pixels), n_pixels - n_high)
            region.scatter_(1, order[:, :n_high], _HIGH)
            region.scatter_(1, order[:, n_pixels - n_low :], _LOW)
    return region.view(-1, resolution, resolution)


def _count(share: float, n_pixels: int) -> int:
    return math.ceil(share * n_pixels - 1e-6)  # 0.2 * 35 is 7, not 7.000000000000001


def mix_views(views: Views, region: Tensor, mix_high: float = 0.8, mix_low: float = 0.2) -> Tensor:
    """Views mixed by region: M * base + (1 - M) * mix, [N, 3, R, R] of the views' type.

    M is ``mix_high`` where attention is high, ``mix_low`` where it is low, and the view's own
    AugMix weight between. View 0, the anchor, is returned as it is.

    Args:
        views: N views.
        region: uint8 [N, R, R] of 2 (high), 1 (between) and 0 (low).
        mix_high, mix_low: weights of the base view, in [0, 1]. Both 0 means plain AugMix views,
            as in the official code.

    Raises:
        TypeError, ValueError: region is not uint8 [N, R, R], or a weight lies outside [0, 1].

    Source: A-TPT's code. Its paper mixes with the AugMix view in the place of ``mix``:
    ``dataclasses.replace(views, mix=views.augmix)``.
    """
    shape = [len(views), views.resolution, views.resolution]
    if region.dtype != torch.uint8:
        raise TypeError(f"region is {region.dtype}; needed uint8")
    if list(region.shape) != shape:
        raise ValueError(f"region has shape {list(region.shape)}; needed {shape}")
    _check_share(mix_high=mix_high, mix_low=mix_low)
    if not (mix_high or mix_low):
        mixed = views.augmix
    else:
        share = views.weight.to(views.base.dtype)[:, None, None]
        share = torch.where(region == _HIGH, mix_high, torch.where(region == _LOW, mix_low, share))
        share = share[:, None]
        mixed = share * views.base + (1 - share) * views.mix
    mixed[0] = views.base[0]
    return mixed

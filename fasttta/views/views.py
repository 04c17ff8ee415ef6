"""``Views``, the views of one image that methods adapt on, and attention-guided mixing of them.

Where a view's attention is high the mixed view has the pixels of the view, where it is low mostly
those of its augmentations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import dense

_LOW, _BETWEEN, _HIGH = 0, 1, 2
_MASKS = ("quantile", "top")
_RANGES = {
    "weight": "needed [0, 1]",
    "region": "needed 2 (high), 1 (between) or 0 (low)",
}
_PIXELS = (
    "needed [0, 1]. Is it already normalised, or in 0..255? Normalisation is inside the model: "
    "pass pixels before normalising, divided by 255"
)


# what rounding may be off by: 1 + 2^-23, the float above 1, is still an image
ROUNDING = 1e-6


def shown(low: float, high: float, top: float = 1.0) -> str:
    """ "from .. to .." in few digits, or in as many as show what lies outside [0, top]."""

    def digits(value: float) -> str:
        short = f"{value:.4g}"
        hidden = not 0 <= value <= top and 0 <= float(short) <= top
        return f"{value:.7g}" if hidden else short

    return f"from {digits(low)} to {digits(high)}"


def check_range(**tensors: Tensor) -> bool:
    """Every value in [0, 1], up to rounding, a region's in 0..2; NaN is not. One read from the
    device for all.

    Returns:
        Whether some value lies outside by rounding, so that it has to be clamped.

    Raises:
        ValueError: some value is outside; the message names the argument.
    """
    bounds = [bound.double() for x in tensors.values() for bound in torch.aminmax(x.detach())]
    bounds = torch.stack(bounds).view(-1, 2).tolist()
    rounded = False
    for name, (low, high) in zip(tensors, bounds, strict=True):
        top = 2 if name == "region" else 1
        # written so that NaN fails too
        if not (low >= -ROUNDING and high <= top + ROUNDING):
            kind = "values" if name in _RANGES else "pixels"
            raise ValueError(
                f"{name} has {kind} {shown(low, high, top)}; {_RANGES.get(name, _PIXELS)}"
            )
        rounded = rounded or low < 0 or high > top
    return rounded


def _check_tensor(value: Tensor, name: str, shape: list[int | None], layout: str) -> Tensor:
    """The tensor, without a class of the caller's."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; needed a tensor {layout}")
    value = dense(name, value)
    sizes = list(value.shape)
    fits = len(sizes) == len(shape) and all(
        needed in (None, size) for size, needed in zip(sizes, shape, strict=True)
    )
    if not fits or value.numel() == 0:
        raise ValueError(f"{name} has shape {sizes}; needed {layout}, none of them empty")
    return value


@dataclass(frozen=True, eq=False)
class Views:
    """N square views of one image, each before and after heavy augmentation.

    Args:
        base: [N, 3, R, R] floating point in [0, 1], crops of the image. View 0 is the anchor:
            the resized and centre-cropped image, where base and mix are the same.
        mix: [N, 3, R, R] of base's type, the Dirichlet mixture of three augmentation chains of
            each base view.
        weight: [N] floating point in [0, 1], the Beta weight of the base view: an AugMix view is
            ``weight * base + (1 - weight) * mix``.
        region: uint8 [N, R, R], for attention-guided mixing: 2 where attention is high, 1
            between, 0 low. None: the method finds out.

    Raises:
        TypeError: something is not a tensor, or of the wrong type.
        ValueError: shapes or devices do not agree, or values lie outside their range. Looking
            at the values is one read from the device.

    Source: A-TPT's basic and aggressive views; Hendrycks et al., "AugMix", ICLR 2020.
    """

    base: Tensor
    mix: Tensor
    weight: Tensor
    region: Tensor | None = None

    def __post_init__(self) -> None:
        def check(name: str, shape: list[int | None], layout: str) -> None:
            value = _check_tensor(getattr(self, name), name, shape, layout)
            object.__setattr__(self, name, value)

        check("base", [None, 3, None, None], "[N, 3, R, R]")
        n, _, rows, columns = self.base.shape
        if rows != columns:
            raise ValueError(f"base has shape {list(self.base.shape)}; needed square views")
        check("mix", [n, 3, rows, rows], f"[{n}, 3, {rows}, {rows}] as base")
        check("weight", [n], f"[{n}], one a view")
        for name in ("base", "mix", "weight"):
            if not getattr(self, name).is_floating_point():
                raise TypeError(f"{name} is {getattr(self, name).dtype}; needed floating point")
        if self.mix.dtype != self.base.dtype:
            raise TypeError(f"mix is {self.mix.dtype} and base {self.base.dtype}; needed one type")
        if self.region is not None:
            check("region", [n, rows, rows], f"[{n}, {rows}, {rows}]")
            if self.region.dtype != torch.uint8:
                raise TypeError(f"region is {self.region.dtype}; needed uint8")
        for name in ("mix", "weight", "region"):
            value = getattr(self, name)
            if value is not None and value.device != self.base.device:
                raise ValueError(
                    f"{name} is on {value.device} and base on {self.base.device}; needed one device"
                )
        region = {} if self.region is None else {"region": self.region}
        if check_range(base=self.base, mix=self.mix, weight=self.weight, **region):
            for name in ("base", "mix", "weight"):
                object.__setattr__(self, name, getattr(self, name).clamp(0.0, 1.0))

    @classmethod
    def trusted(
        cls, base: Tensor, mix: Tensor, weight: Tensor, region: Tensor | None = None
    ) -> Views:
        """Views that are right by construction: nothing checked, nothing read from the device."""
        views = object.__new__(cls)
        for name, value in (("base", base), ("mix", mix), ("weight", weight), ("region", region)):
            object.__setattr__(views, name, value)
        return views

    def __len__(self) -> int:
        return self.base.shape[0]

    @property
    def resolution(self) -> int:
        """R, the views' height and width in pixels."""
        return self.base.shape[-1]

    @property
    def augmix(self) -> Tensor:
        """The AugMix views [N, 3, R, R], what every method but A-TPT uses."""
        weight = self.weight.to(self.base.dtype)[:, None, None, None]
        return weight * self.base + (1 - weight) * self.mix

    def to(self, device: torch.device | str) -> Views:
        """These views on another device."""
        region = None if self.region is None else self.region.to(device)
        return Views.trusted(
            self.base.to(device), self.mix.to(device), self.weight.to(device), region
        )


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

"""The views of one image that vision-language methods adapt on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RANGES = {
    "weight": "needed [0, 1]",
    "region": "needed 2 (high), 1 (between) or 0 (low)",
}
_PIXELS = (
    "needed [0, 1]. Is it already normalised, or in 0..255? Normalisation is inside the model: "
    "pass pixels before normalising, divided by 255"
)


def check_range(**tensors: Tensor) -> None:
    """Every value in [0, 1], a region's in 0..2; NaN is not. One read from the device for all.

    Raises:
        ValueError: some value is outside; the message names the argument.
    """
    bounds = [bound.double() for x in tensors.values() for bound in torch.aminmax(x.detach())]
    bounds = torch.stack(bounds).view(-1, 2).tolist()
    for name, (low, high) in zip(tensors, bounds, strict=True):
        top = 2 if name == "region" else 1
        if not (low >= 0 and high <= top):  # written so that NaN fails too
            kind = "values" if name in _RANGES else "pixels"
            raise ValueError(
                f"{name} has {kind} from {low:.4g} to {high:.4g}; {_RANGES.get(name, _PIXELS)}"
            )


def _check_tensor(value: Tensor, name: str, shape: list[int | None], layout: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; needed a tensor {layout}")
    found = list(value.shape)
    fits = len(found) == len(shape) and all(
        needed in (None, size) for size, needed in zip(found, shape, strict=True)
    )
    if not fits or value.numel() == 0:
        raise ValueError(f"{name} has shape {found}; needed {layout}, none of them empty")


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
        _check_tensor(self.base, "base", [None, 3, None, None], "[N, 3, R, R]")
        n, _, rows, columns = self.base.shape
        if rows != columns:
            raise ValueError(f"base has shape {list(self.base.shape)}; needed square views")
        _check_tensor(self.mix, "mix", [n, 3, rows, rows], f"[{n}, 3, {rows}, {rows}] as base")
        _check_tensor(self.weight, "weight", [n], f"[{n}], one a view")
        for name in ("base", "mix", "weight"):
            if not getattr(self, name).is_floating_point():
                raise TypeError(f"{name} is {getattr(self, name).dtype}; needed floating point")
        if self.mix.dtype != self.base.dtype:
            raise TypeError(f"mix is {self.mix.dtype} and base {self.base.dtype}; needed one type")
        if self.region is not None:
            _check_tensor(self.region, "region", [n, rows, rows], f"[{n}, {rows}, {rows}]")
            if self.region.dtype != torch.uint8:
                raise TypeError(f"region is {self.region.dtype}; needed uint8")
        for name in ("mix", "weight", "region"):
            value = getattr(self, name)
            if value is not None and value.device != self.base.device:
                raise ValueError(
                    f"{name} is on {value.device} and base on {self.base.device}; needed one device"
                )
        region = {} if self.region is None else {"region": self.region}
        check_range(base=self.base, mix=self.mix, weight=self.weight, **region)

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

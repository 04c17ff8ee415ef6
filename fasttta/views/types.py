"""The views of one image that vision-language methods adapt on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def check_pixels(pixels: Tensor, name: str) -> None:
    """Every pixel in [0, 1]; NaN is not. Reads two numbers from the device.

    Raises:
        ValueError: some pixel is outside.
    """
    low, high = torch.stack(torch.aminmax(pixels.detach())).tolist()
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ValueError(
            f"{name} has pixels from {low:.4g} to {high:.4g}; needed [0, 1]. "
            "Is it already normalised, or in 0..255? Normalisation is inside the model: "
            "pass pixels before normalising, divided by 255"
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
        ValueError: shapes or devices do not agree, or values lie outside their range.

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
        self._check_values()

    def _check_values(self) -> None:
        check_pixels(self.base, "base")
        check_pixels(self.mix, "mix")
        low, high = torch.stack(torch.aminmax(self.weight.detach())).tolist()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"weight runs from {low:.4g} to {high:.4g}; needed [0, 1]")
        if self.region is not None and (top := int(self.region.max())) > 2:
            raise ValueError(f"region holds {top}; needed 2 (high), 1 (between) or 0 (low)")

    def __len__(self) -> int:
        return self.base.shape[0]

    @property
    def resolution(self) -> int:
        """R, the views' height and width in pixels."""
        return self.base.shape[-1]

    @property
    def augmix(self) -> Tensor:
        """The AugMix views [N, 3, R, R], what every method but A-TPT uses."""
        weight = self.weight.double()  # rounded once, as a Python float would be
        kept = weight.to(self.base.dtype)[:, None, None, None]
        left = (1 - weight).to(self.base.dtype)[:, None, None, None]
        return kept * self.base + left * self.mix

    def to(self, device: torch.device | str) -> Views:
        """These views on another device."""
        region = None if self.region is None else self.region.to(device)
        return Views(self.base.to(device), self.mix.to(device), self.weight.to(device), region)

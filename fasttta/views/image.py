"""An image as a tensor, and ``Views``: the views of one image that methods adapt on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.checks import dense

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

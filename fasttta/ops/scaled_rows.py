"""Rows in float8 (e4m3) with a scale each: what products in float8 multiply.

The scales follow from the values on the device, row by row (a token of activations, an output
channel of a weight), so that no calibration is needed and no sample changes another's numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cost import Cost
from .quick_gelu import quick_gelu_reference
from .registry import define, ops
from .triton import is_far

E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_LEAST = 2.0**-126
_WIDEST = 16384  # values of a row, as of kernels/scaled_rows_plan.py
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x, "gelu": F.gelu, "quick_gelu": quick_gelu_reference
}  # fmt: skip
_TYPES = (torch.float16, torch.bfloat16, torch.float32)

NO_GRADIENT = (
    'a gradient would run through a layer in float8, which has none: use precision="bf16", '
    "or say in the method which blocks it differentiates (Episodic.differentiated_blocks)"
)
SCHEMA = "scaled_rows(Tensor x, str activation) -> (Tensor values, Tensor scale)"


@dataclass(frozen=True)
class ScaledRows:
    """Rows ``values * scale``; an index chooses among them."""

    values: Tensor  # [..., D] float8_e4m3fn
    scale: Tensor  # [..., 1] float32

    def __getitem__(self, index: Any) -> ScaledRows:
        """Some of the rows."""
        return ScaledRows(self.values[index], self.scale[index])

    def detach(self) -> ScaledRows:
        """The rows, which have no gradient."""
        return self

    def requires_grad_(self) -> ScaledRows:
        """RuntimeError: rows in float8 have no gradient."""
        raise RuntimeError(NO_GRADIENT)


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised values and scales of rows like x [..., D]; for fakes."""
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _fake(x, activation):
    return empty_rows(x)


def scaled_rows_reference(x: Tensor, activation: str = "") -> tuple[Tensor, Tensor]:
    """Values and scales in PyTorch's calls, of x [..., D].

    A scale is the row's largest absolute value / 448, the largest e4m3: nothing saturates, and an
    outlier takes digits from its own row only. NaN or infinity anywhere in a row make its scale
    NaN, so that every product of that row, and of no other, is NaN.
    """
    y = _ACTIVATIONS[activation](x.float())
    if not y.shape[-1]:
        return y.to(E4M3), y.new_full((*y.shape[:-1], 1), _LEAST)
    largest = y.abs().amax(-1, keepdim=True)
    scale = (largest * (1 / _LARGEST)).clamp_min(_LEAST) + largest * 0  # infinity -> NaN
    return (y * (1 / scale)).contiguous().to(E4M3), scale


def scaled_rows(x: Tensor, activation: str = "") -> ScaledRows:
    """Rows of x [..., D] after an activation, in float8; not differentiable.

    Args:
        x: [..., D], computed in float32.
        activation: ``""`` (none), ``"gelu"`` (erf) or ``"quick_gelu"``.
    """
    return ScaledRows(*ops.scaled_rows(x, activation))


@functools.cache
def _emulated(index: int) -> str | None:
    if torch.version.hip:
        return "AMD's float8 products have not been tried"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= (8, 9):
        return None
    return f"compute capability {major}.{minor} has no float8 products, 8.9 and 9.0 and later do"


def emulated(device: torch.device) -> str | None:
    """Why products in float8 are emulated on a device; None: the device has them."""
    if device.type != "cuda":
        return f"{device.type} has no fast float8 products"
    return _emulated(device.index if device.index is not None else torch.cuda.current_device())


def no_triton_for_rows(x: Tensor) -> str | None:
    """Says why no kernel makes rows in float8 of x [..., D]; None: there is one."""
    if x.dtype not in _TYPES:
        return f"it needs float16, bfloat16 or float32, found {x.dtype}"
    if x.ndim < 1 or x.shape[-1] > _WIDEST:
        return f"it needs rows of at most {_WIDEST} values, found shape {list(x.shape)}"
    if x.is_cuda and (reason := emulated(x.device)):
        return reason
    return "it needs samples within 2^31 elements" if x.ndim > 1 and is_far(x) else None


def _no_triton(x, activation) -> str | None:
    return no_triton_for_rows(x)


def _cost(x, activation) -> Cost:
    return Cost()


define(
    SCHEMA,
    _fake,
    scaled_rows_reference,
    kernels="scaled_rows",
    no_triton=_no_triton,
    cost=_cost,
)

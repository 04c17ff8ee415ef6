"""Precision of a step: its number types, and the working copy of the model in them."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch import nn

from ..models.computed_weights import how_to_unwrap
from ..models.copies import own_buffers, structural_copy
from ..ops.scaled_rows import emulated

PRECISIONS = ("auto", "fp64", "fp32", "tf32", "bf16", "fp8")


@dataclass(frozen=True)
class Precision:
    """name: as asked for, "auto" resolved; master: type of tuned tensors, the residual stream and
    the losses; compute: type of the matrix products, under "fp8" of those that are not float8."""

    name: str
    master: torch.dtype
    compute: torch.dtype


def resolve(name: str, device: torch.device, model_dtype: torch.dtype) -> Precision:
    """The precision of a name on a device.

    ``"auto"`` keeps a float64 model in float64, else takes bf16 on GPUs that have it, else fp32.
    """
    if name not in PRECISIONS:
        names = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision={name!r} is unknown; known: {names}")
    if name == "auto":
        if model_dtype == torch.float64:
            name = "fp64"
        elif device.type == "cuda" and _has_bf16(device):
            name = "bf16"
        else:
            name = "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f'precision="tf32" needs CUDA, the model is on {device}; use "fp32"')
    if name == "fp64":
        return Precision(name, torch.float64, torch.float64)
    if name == "fp8" and (reason := emulated(device)):
        _warn_of_emulation(reason)
    half = name in ("bf16", "fp8")
    return Precision(name, torch.float32, torch.bfloat16 if half else torch.float32)


@functools.cache  # said once
def _warn_of_emulation(reason: str) -> None:
    text = f'precision="fp8" is emulated, slower than "bf16": {reason}'
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


class _Multiplies(Protocol):
    def set_compute_dtype(self, dtype: torch.dtype | None) -> None: ...


Model = TypeVar("Model", bound=_Multiplies)


def working_copy(
    model: Model, tuned: set[str], precision: Precision, differentiated: int | None = 0
) -> tuple[Model, dict[str, nn.Parameter]]:
    """A copy of the module tree that shares frozen weights and has separate tuned ones.

    The user's module is not changed, hooks and flags of its parameters included.

    Args:
        differentiated: as of ``quantise_encoders``, for ``"fp8"``.

    Returns:
        The copy in evaluation mode, and its tuned parameters by name.

    Raises:
        ValueError: a name of ``tuned`` is no parameter of the model, or nothing of the model can
            be in float8.
    """
    shared: dict[int, nn.Parameter] = {}
    leaves: dict[str, nn.Parameter] = {}
    copy = structural_copy(model)
    for path, child in cast(nn.Module, copy).named_modules():
        for leaf, parameter in child._parameters.items():
            name = f"{path}.{leaf}" if path else leaf
            if parameter is None:
                continue
            if name in tuned:
                value = parameter.detach().to(precision.master, copy=True)
                child._parameters[leaf] = leaves[name] = nn.Parameter(value.contiguous())
                continue
            if id(parameter) not in shared:  # tied parameters stay tied
                value = parameter.detach()
                value = value.clone() if value.is_inference() else value
                if value.is_floating_point():
                    value = value.to(precision.master)
                shared[id(parameter)] = nn.Parameter(value, requires_grad=False)
            child._parameters[leaf] = shared[id(parameter)]
    for name in sorted(tuned - leaves.keys()):
        reason = how_to_unwrap(cast(nn.Module, model), name)
        raise ValueError(f"{name} cannot be tuned: {reason}")
    # a forward may write to buffers: that must not reach the user's module
    own_buffers(cast(nn.Module, copy), precision.master)
    if precision.name == "fp8":  # from the weights as they are, before they are rounded to bf16
        from ..models.float8 import quantise_encoders

        quantise_encoders(copy, differentiated)
    copy.set_compute_dtype(None if precision.compute == precision.master else precision.compute)
    return copy, leaves

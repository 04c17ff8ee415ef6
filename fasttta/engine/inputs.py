"""One batch, from a caller or a loader, made fit for a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.checks import dense
from ..protocols import FusionModel


def as_inputs(batch: object) -> tuple:
    """What a loader yields -> the inputs of one call."""
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def prepare(
    model: FusionModel, inputs: tuple, dtype: torch.dtype, check_finite: bool
) -> tuple[Tensor, ...]:
    """Checked inputs in a precision, usable by autograd; the caller's tensors are kept.

    Raises:
        ValueError, TypeError: they cannot be one batch, are no dense tensors, or (check_finite) are
            not finite.
    """
    names = model.input_names
    required = model.required_inputs
    if not required <= len(inputs) <= len(names):
        needed = str(required) if required == len(names) else f"{required} to {len(names)}"
        raise TypeError(
            f"needed {needed} inputs ({', '.join(names)}), found {len(inputs)}; "
            "labels and the like stay out of it"
        )
    inputs = tuple(
        dense(name, x) if isinstance(x, Tensor) else x
        for name, x in zip(names, inputs, strict=False)
    )
    model.check_inputs(*inputs)
    prepared = []
    with torch.inference_mode(False), torch.no_grad():
        for name, x in zip(names, inputs, strict=False):
            x = x.detach().to(dtype) if x.is_floating_point() else x.detach()
            if check_finite and not torch.isfinite(x).all():
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(f"{name} holds non-finite values (NaN or infinity in {kind})")
            prepared.append(x.clone() if x.is_inference() else x)
    return tuple(prepared)

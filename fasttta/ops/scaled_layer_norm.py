"""A branch added to the residual stream, and the LayerNorm of the sum in float8, in one pass.

What is read is residual and branch, what is written the sum and one byte a value: in PyTorch's
calls the normalised tokens would be written and read twice more in between. Not differentiable:
what follows multiplies frozen weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cost import Cost
from .registry import define, ops
from .scaled_rows import ScaledRows, empty_rows, no_triton_for_rows, scaled_rows_reference

SCHEMA = (
    "scaled_layer_norm(Tensor residual, Tensor? branch, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor total, Tensor values, Tensor scale)"
)


def _total(residual: Tensor, branch: Tensor | None) -> Tensor:
    if branch is None:
        return residual.new_empty(0)
    kind = torch.promote_types(residual.dtype, branch.dtype)
    return torch.empty(residual.shape, dtype=kind, device=residual.device)


def _fake(residual, branch, weight, bias, eps):
    return _total(residual, branch), *empty_rows(residual)


def scaled_layer_norm_reference(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum ([0] without a branch), values and scales in PyTorch's calls; arguments as in
    ``scaled_layer_norm``."""
    x = residual if branch is None else (residual + branch).contiguous()
    affine = weight.float(), bias.float()
    normed = F.layer_norm(x.float(), x.shape[-1:], *affine, eps)
    total = residual.new_empty(0) if branch is None else x
    return total, *scaled_rows_reference(normed)


def scaled_layer_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, ScaledRows]:
    """The residual stream after a branch, and its LayerNorm over the last axis in float8.

    Args:
        residual: [..., D].
        branch: [..., D], what is added to it, in its type or another; None: nothing is added.
        weight, bias: [D] of the LayerNorm.
        eps: what is added to the variance.

    Returns:
        The sum [..., D] in the wider type of the two, itself the residual without a branch; and its
        LayerNorm, computed in float32, as rows in float8.
    """
    total, *rows = ops.scaled_layer_norm(residual, branch, weight, bias, eps)
    return residual if branch is None else total, ScaledRows(*rows)


def _no_triton(residual, branch, weight, bias, eps) -> str | None:
    for x in (residual, branch):
        if x is not None and (reason := no_triton_for_rows(x)):
            return reason
    if not (weight.is_contiguous() and bias.is_contiguous()):
        return f"it needs weights without gaps, found strides {weight.stride()}, {bias.stride()}"
    return None


def _cost(residual, branch, weight, bias, eps) -> Cost:
    return Cost()


define(
    SCHEMA,
    _fake,
    scaled_layer_norm_reference,
    kernels="scaled_layer_norm",
    no_triton=_no_triton,
    cost=_cost,
)

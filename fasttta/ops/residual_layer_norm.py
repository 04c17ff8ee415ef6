"""The addition of a branch to the residual stream and the LayerNorm that follows, in one pass.

PyTorch's calls are an addition, a LayerNorm and a cast: 24 bytes a value where a float32 residual
and a bfloat16 branch meet; in one pass it is 12. Source of the formula: Ba et al., "Layer
Normalization", 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import trace
from ..kernels import residual_layer_norm_plan as plan
from . import native, triton
from .cost import Cost
from .registry import define, ops, refuse_second_derivative, wide

WIDEST = 4096  # channels of a row: with twice as many, gradients of a tuned weight spill on sm_120
#: types of devices with kernels for a block; callers look here before they ask ``fuses``
KERNEL_DEVICES = {"cuda"}

FORWARD = (
    "residual_layer_norm(Tensor residual, Tensor? branch, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType dtype) -> (Tensor total, Tensor normed, Tensor stats)"
)
BACKWARD = (
    "residual_layer_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total,"
    " Tensor stats, Tensor? weight, ScalarType branch_dtype, bool to_total, bool to_branch,"
    " bool to_affine) -> (Tensor grad, Tensor grad_branch, Tensor grad_affine)"
)


def _fake(residual, branch, weight, bias, eps, dtype):
    total = residual.new_empty(0)
    if branch is not None:
        promoted = torch.promote_types(residual.dtype, branch.dtype)
        total = residual.new_empty(residual.shape, dtype=promoted)
    kind = torch.promote_types(residual.dtype if branch is None else total.dtype, torch.float32)
    rows = residual.numel() // residual.shape[-1] if residual.shape[-1] else 0
    stats = residual.new_empty((2, rows), dtype=kind)
    return total, residual.new_empty(residual.shape, dtype=dtype), stats


def _fake_backward(
    grad_normed, grad_total, total, stats, weight, branch_dtype, to_total, to_branch, to_affine
):
    nothing, shape = (0,), total.shape
    return (
        total.new_empty(shape if to_total else nothing),
        total.new_empty(shape if to_branch else nothing, dtype=branch_dtype),
        stats.new_empty((2, total.shape[-1]) if to_affine else nothing),
    )


def residual_layer_norm_reference(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's calls; arguments and results as in ``residual_layer_norm``."""
    total = residual if branch is None else residual + branch
    normed = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return total, normed if dtype is None else normed.to(dtype)


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, branch, weight, bias, eps, dtype):
        with trace.span("residual_layer_norm"):
            total, normed, stats = ops.residual_layer_norm(
                residual, branch, weight, bias, eps, dtype
            )
        total = residual if branch is None else total
        ctx.branch_dtype = total.dtype if branch is None else branch.dtype
        ctx.save_for_backward(total, stats, weight)
        ctx.set_materialize_grads(False)
        # as a view: so the gradients of both uses of the residual meet in the kernel
        return total.view_as(total) if branch is None else total, normed

    @staticmethod
    def backward(ctx, grad_total, grad_normed):
        if torch.is_grad_enabled():
            refuse_second_derivative("residual_layer_norm")
        total, stats, weight = ctx.saved_tensors
        to_residual, to_branch, *to_affine = ctx.needs_input_grad[:4]
        alike = ctx.branch_dtype == total.dtype  # then one gradient serves both
        grad, grad_branch, affine = grad_total, None, (None, None)
        if grad_normed is not None:
            with trace.span("residual_layer_norm_backward"):
                grad, grad_branch, affine = ops.residual_layer_norm_backward(
                    grad_normed, grad_total, total, stats, weight, ctx.branch_dtype,
                    to_residual or (to_branch and alike), to_branch and not alike, any(to_affine),
                )  # fmt: skip
        elif grad is not None and to_branch and not alike:
            grad_branch = grad.to(ctx.branch_dtype)
        grad_weight, grad_bias = (
            row if wanted else None
            for row, wanted in zip(affine if len(affine) else (None,) * 2, to_affine, strict=True)
        )
        return (
            grad if to_residual else None,
            (grad if alike else grad_branch) if to_branch else None,
            grad_weight,
            grad_bias,
            None,
            None,
        )


def residual_layer_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream after a branch, and its LayerNorm over the last axis, differentiably.

    Args:
        residual: [..., D], of any strides, also expanded.
        branch: [..., D], what is added to it, in its type or another; None: nothing is added.
        weight, bias: [D] of the LayerNorm, tuned or frozen; None: 1 and 0.
        eps: what is added to the variance.
        dtype: of the normalised tokens, in which the next product runs; None: that of the sum.

    Returns:
        The sum [..., D] in the wider type of the two, itself the residual without a branch; and its
        LayerNorm [..., D] in ``dtype``. Sums and statistics are computed at least in float32, and
        a row that holds NaN spoils no other row.
    """
    if not fuses(residual, dtype):
        return residual_layer_norm_reference(residual, branch, weight, bias, eps, dtype)
    if dtype is None:
        dtype = residual.dtype if branch is None else torch.promote_types(
            residual.dtype, branch.dtype
        )  # fmt: skip
    tensors = (residual, branch, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _ResidualLayerNorm.apply(residual, branch, weight, bias, eps, dtype)
    with trace.span("residual_layer_norm"):
        total, normed, _ = ops.residual_layer_norm(residual, branch, weight, bias, eps, dtype)
    return residual if branch is None else total, normed


def fuses(residual: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether addition and LayerNorm are one pass here: on a GPU in a type of its kernels, on a CPU
    where a float32 residual lies between products in bfloat16.

    Args:
        residual: the residual stream. dtype: of the products between which it lies; None: unknown.

    Elsewhere a caller that can leave the addition to a matrix product does better. A call that is
    traced, transformed, differentiated forward or cast is left to PyTorch's own operations, which
    torch.compile fuses.
    """
    return (
        _has_kernels(residual, dtype)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled(residual.device.type)
    )


def _has_kernels(residual: Tensor, dtype: torch.dtype | None) -> bool:
    if residual.device.type == "cpu":
        mixed = residual.dtype == torch.float32 and dtype == torch.bfloat16
        return mixed and (native.loaded or native.load())
    types = (torch.float32, torch.float16, torch.bfloat16)
    return residual.device.type in KERNEL_DEVICES and residual.dtype in types


def _default(residual, branch, weight, bias, eps, dtype):
    total = residual if branch is None else (residual + branch).contiguous()
    x = wide(total)
    affine = [None if a is None else a.to(x) for a in (weight, bias)]
    normed, *moments = torch.native_layer_norm(x, x.shape[-1:], *affine, eps)
    stats = torch.stack(moments).flatten(1)
    total = residual.new_empty(0) if branch is None else total
    return total, normed.to(dtype).contiguous(), stats


def _default_backward(
    grad_normed, grad_total, total, stats, weight, branch_dtype, to_total, to_branch, to_affine
):
    x, inner = wide(total).contiguous(), to_total or to_branch
    mean, rstd = stats.view(2, *x.shape[:-1], 1)
    if weight is None:
        weight = x.new_ones(x.shape[-1])
    grad, *affine = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(x).contiguous(), x, x.shape[-1:], mean, rstd, weight.to(x), weight.to(x),
        [inner, to_affine, to_affine],
    )  # fmt: skip
    if inner and grad_total is not None:
        grad = grad + grad_total
    return (
        grad.to(total.dtype) if to_total else total.new_empty(0),
        grad.to(branch_dtype, copy=to_total) if to_branch else total.new_empty(0).to(branch_dtype),
        torch.stack(affine) if to_affine else stats.new_empty(0),
    )


def _no_triton(*tensors: Tensor | None) -> str | None:
    for x in tensors:
        if x is not None and x.ndim == 1 and not x.is_contiguous():
            return f"it needs weights without gaps, found strides {x.stride()}"
        if x is not None and x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return triton.unsuitable(x)
    first = tensors[0]
    assert first is not None
    width = first.shape[-1]
    if width and first.numel() // width >= 2**30:  # so that 32 bits hold a row, past the last too
        return f"it needs fewer than 2^30 rows, found {first.numel() // width}"
    return f"it needs at most {WIDEST} channels, found {width}" if width > WIDEST else None


def _no_triton_forward(residual, branch, weight, bias, eps, dtype) -> str | None:
    return _no_triton(residual, branch, weight, bias)


def _no_triton_backward(
    grad_normed, grad_total, total, stats, weight, branch_dtype, to_total, to_branch, to_affine
) -> str | None:
    return _no_triton(grad_normed, grad_total, total, weight)


def _cost(residual, branch, weight, bias, eps, dtype) -> Cost:
    return Cost()


def _cost_backward(
    grad_normed, grad_total, total, stats, weight, branch_dtype, to_total, to_branch, to_affine
) -> Cost:
    if not to_affine:
        return Cost()
    rows, width = total.numel() // total.shape[-1], total.shape[-1]
    parts = plan.gradient(rows, width, True).grid[0]  # of weight and bias, added by PyTorch
    return Cost(launches=2, workspace=2 * parts * 2 * width * 4)


define(
    FORWARD,
    _fake,
    _default,
    cpp=True,
    kernels="residual_layer_norm",
    no_triton=_no_triton_forward,
    cost=_cost,
)
define(
    BACKWARD,
    _fake_backward,
    _default_backward,
    cpp=True,
    kernels="residual_layer_norm",
    no_triton=_no_triton_backward,
    cost=_cost_backward,
)

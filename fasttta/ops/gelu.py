"""The GELU, x Φ(x) with the normal distribution's Φ, and its gradient, one pass over memory each.

Only what comes before the activation is kept for the gradient; the GELU itself is computed again.
A bias may be added in the same pass, where the product before it could not.
Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import triton
from .cost import Cost
from .registry import define, ops, refuse_second_derivative, wide

SCHEMA = "gelu(Tensor x, Tensor? bias=None) -> Tensor"
BACKWARD_SCHEMA = "gelu_backward(Tensor grad, Tensor x, Tensor? bias=None) -> Tensor"


def _fake(x, bias=None):
    return torch.empty_like(x)


def _fake_backward(grad, x, bias=None):
    return torch.empty_like(x)


def gelu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Φ(x) of x + bias; shapes as in ``gelu``."""
    return F.gelu(x if bias is None else x + bias)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return ops.gelu(x, bias)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("gelu")
        x, bias = ctx.saved_tensors
        grad = ops.gelu_backward(grad.contiguous(), x, bias)
        return grad, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Φ(x), differentiably, of x [..., C], to which bias [C] is added before if it is given."""
    if not kernels_serve(x):
        return gelu_reference(x, bias)
    tensors = (x, bias)
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors):
        return _GELU.apply(x, bias)
    return ops.gelu(x, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The GELU of a linear layer on a GPU: in the product's pass or in one of its own."""
    if bias is not None and product_serves(x, weight, bias):
        return product_gelu(x, weight, bias)
    return gelu(F.linear(x, weight, bias))


def product_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``product_gelu`` serves: bf16 on an NVIDIA GPU, a bias, and no gradient."""
    return bias is not None and x.dtype == torch.bfloat16 and not weight.requires_grad and (
        kernels_serve(x) and torch.version.hip is None
        and not (torch.is_grad_enabled() and x.requires_grad)
    )  # fmt: skip


def product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The GELU of x [..., in] times weight [out, in] plus bias [out], in the product's own pass.

    On a GPU it is cuBLAS's: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which is up to 4.7e-4
    away from x Φ(x), of sums in float32. The GELU as a pass of its own reads sums that bf16 has
    rounded. Against float64 both are equally far: tokens of ViT-B after 6 blocks, random weights,
    three seeds, 0.69, 0.72 and 0.71 % here, 0.70, 0.73 and 0.73 % there (emulated on a CPU).
    """
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


def kernels_serve(x: Tensor) -> bool:
    """Whether an activation of x is left to the Triton kernels: on a GPU, without gaps.

    Not where a call is traced, transformed, differentiated forward or cast.
    """
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cuda")
    )


def no_triton(*tensors: Tensor | None) -> str | None:
    """Says what the kernels of activations are not made for: gaps, other types."""
    for x in tensors:
        if x is not None and not x.is_contiguous():
            return f"it needs tensors without gaps, found strides {x.stride()}"
        if x is not None and x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return triton.unsuitable(x)
    return None


def _default(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(wide(x) if bias is None else wide(x) + bias).to(x.dtype)


def _default_backward(grad: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    before = wide(x) if bias is None else wide(x) + bias
    return torch.ops.aten.gelu_backward(grad.to(before), before).to(x.dtype)


def one_pass(*_: object) -> Cost:
    """Cost of an activation's kernel, or of its gradient's."""
    return Cost()


define(SCHEMA, _fake, _default, kernels="gelu", no_triton=no_triton, cost=one_pass)
define(
    BACKWARD_SCHEMA,
    _fake_backward,
    _default_backward,
    kernels="gelu",
    no_triton=no_triton,
    cost=one_pass,
)

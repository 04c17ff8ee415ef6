"""CLIP's activation and its gradient: one pass over memory each.

PyTorch has no operation for it, and its calls pass over memory three times forward and five times
backward: a tenth of the text tower's time on a CPU. The Triton kernels are those of ``gelu``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native
from .gelu import kernels_serve, no_triton, one_pass
from .registry import define, ops, refuse_second_derivative, wide

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

SCHEMA = "quick_gelu(Tensor x) -> Tensor"
BACKWARD_SCHEMA = "quick_gelu_backward(Tensor grad, Tensor x) -> Tensor"


def _fake(x):
    return torch.empty_like(x)


def _fake_backward(grad, x):
    return torch.empty_like(x)


def quick_gelu_reference(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) of x of any shape."""
    return x * torch.sigmoid(1.702 * x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return ops.quick_gelu(x)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("quick_gelu")
        (x,) = ctx.saved_tensors
        return ops.quick_gelu_backward(grad.contiguous(), x)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) of x of any shape, what OpenAI trained with."""
    if _cpp_serves(x) or kernels_serve(x):
        if torch.is_grad_enabled() and x.requires_grad:
            return _QuickGELU.apply(x)
        return ops.quick_gelu(x)
    return quick_gelu_reference(x)


def _cpp_serves(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in _TYPES
        and x.is_contiguous()
        # not traced, transformed, differentiated forward or cast
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and (native.loaded or native.load())
    )


def _default(x: Tensor) -> Tensor:
    return quick_gelu_reference(wide(x)).to(x.dtype)


def _default_backward(grad: Tensor, x: Tensor) -> Tensor:
    z = wide(x)
    s = torch.sigmoid(1.702 * z)
    return (grad * (s + 1.702 * z * s * (1 - s))).to(x.dtype)


define(SCHEMA, _fake, _default, cpp=True, kernels="gelu", no_triton=no_triton, cost=one_pass)
define(
    BACKWARD_SCHEMA,
    _fake_backward,
    _default_backward,
    cpp=True,
    kernels="gelu",
    no_triton=no_triton,
    cost=one_pass,
)

"""CLIP's activation and its gradient: on a CPU one pass over memory each, in C++.

PyTorch has no operation for it, and its calls pass over memory three times forward and five times
backward: a tenth of the text tower's time. Not one of ``schema``'s operations: on other devices
PyTorch's calls serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import again, native, schema
from .softmax_attention import plain

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

schema.LIBRARY.define("quick_gelu(Tensor x) -> Tensor")
schema.LIBRARY.define("quick_gelu_backward(Tensor grad, Tensor x) -> Tensor")
torch.library.register_fake("fasttta::quick_gelu", torch.empty_like, lib=schema.LIBRARY)
torch.library.register_fake(
    "fasttta::quick_gelu_backward", lambda grad, x: torch.empty_like(x), lib=schema.LIBRARY
)


def _formula(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.fasttta.quick_gelu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if again.asked():
            return again.gradients(_formula, (x,), (grad,))[0]
        return torch.ops.fasttta.quick_gelu_backward(grad.contiguous(), x)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) of x of any shape, what OpenAI trained with."""
    if (
        plain()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in _TYPES
        and x.is_contiguous()
        and native.load()
    ):
        if torch.is_grad_enabled() and x.requires_grad:
            return _QuickGELU.apply(x)
        return torch.ops.fasttta.quick_gelu(x)
    return _formula(x)

"""Softmax attention on a CPU: a C++ kernel for float32 and bf16, PyTorch's for the rest.

The kernel (csrc/softmax_attention.h, csrc/pair_attention.h) keeps rows of scores of a few queries
in the cache, so that a softmax is one pass and products run on packed keys; PyTorch's flash kernel
rescales partial ones. On a GPU PyTorch's own kernels are the right ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import native, processor
from .registry import define, ops, refuse_second_derivative

_FEWEST = 16  # queries; below, packing the keys costs more than it saves
_LONGEST = 4096  # keys; not measured beyond
_WIDEST = 256  # channels of a head

SCHEMA = "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)"
BACKWARD_SCHEMA = (
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)


def _like_heads(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def _fake(q, k, v, scale):
    return _like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(grad, q, k, v, out, lse, scale):
    return _like_heads(q), _like_heads(k), _like_heads(v)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q·k) v.

    Args:
        q: [B, H, T, d]. k, v: [B, H, S, d].

    Returns:
        [B, H, T, d].
    """
    return (scale * (q @ k.transpose(-2, -1))).softmax(dim=-1) @ v


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, lse = ops.attention(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("softmax attention on a CPU")
        return *backward(grad, *ctx.saved_tensors, ctx.scale), None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q·k) v, differentiably: shapes as in ``attend_reference``."""
    if _suits(q, k, v):
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attention.apply(q, k, v, scale)
        return ops.attention(q, k, v, scale)[0]
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention without a graph, on a CPU.

    Returns:
        Attention [B, H, T, d] as ``attend`` has it, and the scores' log-sum-exp [B, H, T],
        in float32 for bf16.
    """
    if _suits(q, k, v):
        return ops.attention(q, k, v, scale)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, scale=scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients on q, k and v, of their shapes, from what ``forward`` returned."""
    if _suits(q, k, v):
        return ops.attention_backward(grad, q, k, v, out, lse, scale)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flash(grad, q, k, v, out, lse, 0.0, False, attn_mask=None, scale=scale)


def _bf16_suits() -> bool:
    """Whether the processor multiplies vectors of bf16, and not also tiles: PyTorch's kernel takes
    those. On others the C++ kernel computes the same, at most as fast as in float32."""
    return processor.bf16_vectors() and not processor.bf16_tiles()


def _suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the C++ kernel is made for these, and there.

    It is not where a call is traced, transformed, differentiated forward or cast.
    """
    return (
        all(type(x) is Tensor and x.device.type == "cpu" and x.dtype == q.dtype for x in (q, k, v))
        and (q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and _bf16_suits()))
        and q.shape[2] >= _FEWEST
        and 0 < k.shape[2] <= _LONGEST
        and q.shape[3] == v.shape[3] <= _WIDEST
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and (native.loaded or native.load())
    )  # fmt: skip


define(SCHEMA, _fake, cpp=True)
define(BACKWARD_SCHEMA, _fake_backward, cpp=True)

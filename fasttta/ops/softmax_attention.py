"""Softmax attention and its gradients on a CPU: a C++ kernel for float32, PyTorch's for the rest.

The kernel (csrc/softmax_attention.h) keeps whole rows of scores of a few queries in the cache, so
that a softmax is one pass and products run on packed keys; PyTorch's flash kernel rescales partial
ones.
Not one of ``schema``'s operations: on a GPU PyTorch's own kernels are the right ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import again, native, schema

_FEWEST = 16  # queries; below, packing the keys costs more than it saves
_LONGEST = 4096  # keys; not measured beyond
_WIDEST = 256  # channels of a head

schema.LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)"
)
schema.LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale) -> (Tensor, Tensor, Tensor)"
)

torch.library.register_fake(
    "fasttta::attention",
    lambda q, k, v, scale: (_like_heads(q), q.new_empty(q.shape[:3])),
    lib=schema.LIBRARY,
)
torch.library.register_fake(
    "fasttta::attention_backward",
    lambda grad, q, k, v, out, lse, scale: tuple(map(_like_heads, (q, k, v))),
    lib=schema.LIBRARY,
)


def _like_heads(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def plain() -> bool:
    """Whether calls are what they seem: not traced, transformed, differentiated forward or cast."""
    return not (
        torch.compiler.is_compiling() or again.transformed() or torch.is_autocast_enabled("cpu")
    )


def _suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the C++ kernel is made for these, and there."""
    return (
        plain()
        and all(type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
            for x in (q, k, v))
        and q.shape[2] >= _FEWEST
        and 0 < k.shape[2] <= _LONGEST
        and q.shape[3] == v.shape[3] <= _WIDEST
        and native.load()
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Without a graph: attention as ``attend`` has it and the scores' log-sum-exp [B, H, T]."""
    if _suits(q, k, v):
        return torch.ops.fasttta.attention(q, k, v, scale)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, scale=scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients on q, k and v, from what ``forward`` returned."""
    if _suits(q, k, v):
        return torch.ops.fasttta.attention_backward(grad, q, k, v, out, lse, scale)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flash(grad, q, k, v, out, lse, 0.0, False, attn_mask=None, scale=scale)


def _formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (scale * (q @ k.transpose(-2, -1))).softmax(dim=-1) @ v


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, lse = torch.ops.fasttta.attention(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        if again.asked():
            return again.gradients(_formula, (*ctx.saved_tensors[:3], ctx.scale), (grad,))
        return *backward(grad, *ctx.saved_tensors, ctx.scale), None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q·k) v, differentiably.

    Args:
        q: [B, H, T, d]. k, v: [B, H, S, d].

    Returns:
        [B, H, T, d].
    """
    if _suits(q, k, v):
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attention.apply(q, k, v, scale)
        return torch.ops.fasttta.attention(q, k, v, scale)[0]
    return F.scaled_dot_product_attention(q, k, v, scale=scale)

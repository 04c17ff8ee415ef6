"""The residual stream between a block's products: additions, LayerNorms and casts.

Where ``residual_layer_norm`` serves (on a GPU), what a block adds last waits for the LayerNorm that
follows, in the next block or behind the last one, and both are one pass. Elsewhere a product adds
to the residual as it is written, as oneDNN's do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.registry import refuse_second_derivative
from ...ops.residual_layer_norm import fuses, residual_layer_norm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module runs the forward of its class and nothing else: it is of this
    very class, and has no hooks and no forward of its own."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not nn.modules.module._has_any_global_hook()
    )


def advances(block: nn.Module) -> bool:
    """Whether a block's ``advance`` does what a call of it does: it is one of ours, whose forward
    calls that, no class below has another forward, and a call runs nothing else."""
    kind = next((c for c in type(block).__mro__ if "forward" in vars(c)), nn.Module)
    return "advance" in vars(kind) and untouched(block, type(block))


def normalised(
    norm: nn.Module, x: Tensor, branch: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream with a branch added, and its LayerNorm.

    Args:
        norm: a LayerNorm of D channels, or what a user has put in its place, which is called.
        x: [..., D], of any strides. branch: [..., D]; None: nothing is added.
        dtype: of the product that follows; where the two are not one pass it is cast there.

    Returns:
        x + branch, and its LayerNorm.
    """
    if isinstance(norm, nn.LayerNorm) and _is_fused(norm, x, dtype):
        return residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype)
    x = added(x, branch)
    return x, norm(x)


def _is_fused(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype | None) -> bool:
    return (
        fuses(x, dtype)
        and untouched(norm, nn.LayerNorm)
        and norm.normalized_shape == tuple(x.shape[-1:])
    )


def added(x: Tensor, branch: Tensor | None) -> Tensor:
    """x + branch; None adds nothing."""
    return x if branch is None else x + branch


def product_type(part: nn.Module, name: str = "") -> torch.dtype | None:
    """The type that a linear layer of ours multiplies in; None: of a user's, which casts itself.

    Args:
        part: the layer, or with a ``name`` what holds it. What a user has put in its place may hold
            no such layer.
    """
    layer: Any = getattr(part, name, None) if name else part
    weight: object = getattr(layer, "in_proj_weight", getattr(layer, "weight", None))
    if not isinstance(weight, Tensor) or not hasattr(layer, "compute_dtype"):
        return None
    compute: Any = layer.compute_dtype
    return compute or weight.dtype


class _TokenMean(torch.autograd.Function):
    """A mean whose gradient, the same for all tokens, is a view and not spread over memory."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.mean(dim=1, dtype=dtype)

    @staticmethod
    def backward(ctx, grad):
        grad = (grad / ctx.shape[1]).to(ctx.dtype)
        return grad.unsqueeze(1).expand(ctx.shape), None


def mean_over_tokens(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B, T, D] -> [B, D], in ``dtype`` (None: that of x)."""
    dtype = dtype or x.dtype
    if x.requires_grad and torch.is_grad_enabled() and fuses(x, x.dtype):
        return _TokenMean.apply(x, dtype)
    return x.mean(dim=1, dtype=dtype)


class _UnpackedHeads(torch.autograd.Function):
    """Views of a packed product, whose gradients are written to their places in one buffer."""

    @staticmethod
    def forward(ctx, packed):
        ctx.set_materialize_grads(False)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return q, k, v, q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            refuse_second_derivative("attention on a GPU")
        *parts, seen_q, seen_k = grads
        first = next((x for x in grads if x is not None), None)
        if first is None:
            return None
        seen = (seen_q, seen_k, None)
        b, heads, t, d = first.shape
        if all(x is not None for x in parts) and not any(x is not None for x in seen):
            return torch.stack([x.transpose(1, 2) for x in parts], dim=2)
        packed = first.new_empty(b, t, 3, heads, d)
        for place, pair in zip(packed.unbind(2), zip(parts, seen, strict=True), strict=True):
            there = [x.transpose(1, 2) for x in pair if x is not None]
            if len(there) == 2:
                torch.add(*there, out=place)
            elif there:
                place.copy_(there[0])
            else:
                place.zero_()
        return packed


def unpacked_heads(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of a product [B, T, 3, H, d], each [B, H, T, d], and q and k once more for what
    looks at the scores: views. The gradients of both uses meet where they are written."""
    if packed.requires_grad and torch.is_grad_enabled() and fuses(packed, packed.dtype):
        return _UnpackedHeads.apply(packed)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    return q, k, v, q, k


class _SplitHeads(torch.autograd.Function):
    """Views of a packed product, whose gradients are written to one buffer in its layout."""

    @staticmethod
    def forward(ctx, packed):
        return packed.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx, *grads):
        return torch.stack([x.transpose(1, 2) for x in grads], dim=2)


def split_heads(packed: Tensor) -> tuple[Tensor, ...]:
    """A product [B, T, n, H, d] as n views [B, H, T, d]. PyTorch's gradient of ``unbind`` stacks
    its parts in another order and copies them once more."""
    if packed.shape[2] == 1:
        return (packed.squeeze(2).transpose(1, 2),)
    if packed.requires_grad and torch.is_grad_enabled() and fuses(packed, packed.dtype):
        return _SplitHeads.apply(packed)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)

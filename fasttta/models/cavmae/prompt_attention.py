"""Attention of tokens over themselves and over prompts that are keys and values only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import softmax_attention
from ...ops.registry import refuse_second_derivative
from ...ops.residual_layer_norm import fuses
from ..blocks.layers import Linear
from ..blocks.residual import split_heads


def prompt_attention(q: Tensor, kv: Tensor, prompt_kv: Tensor, heads: int, scale: float) -> Tensor:
    """Softmax attention over the keys and values of the prompts, then over those of each sample.

    On a CPU each gradient is written to its place with one copy. Where only the prompts have a
    gradient (in the first block, whose tokens depend on nothing tuned) that of their n columns
    alone is computed.

    Args:
        q: [B, T, D].
        kv: [B, T, 2 D], keys and then values.
        prompt_kv: [n, 2 D], of the prompts.
        heads: H.
        scale: factor of q·k.

    Returns:
        [B, T, D].
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and prompt_kv.requires_grad:
        return _PromptAttention.apply(q, kv, prompt_kv, heads, scale)
    q = _split(q, 1, heads)[0]
    if kv.requires_grad and torch.is_grad_enabled() and fuses(kv, kv.dtype):
        k, v = _JoinedHeads.apply(kv, prompt_kv, heads)
    else:
        k, v = _split(_joined(kv, prompt_kv), 2, heads)
    out = softmax_attention.attend(q, k, v, scale)
    return out.transpose(1, 2).flatten(2)


def _joined(kv: Tensor, prompt_kv: Tensor) -> Tensor:
    return torch.cat((prompt_kv.expand(len(kv), -1, -1), kv), dim=1)


def _split(packed: Tensor, n: int, heads: int) -> tuple[Tensor, ...]:
    """[B, T, n D] -> n views [B, H, T, d]."""
    b, t, width = packed.shape
    return split_heads(packed.view(b, t, n, heads, width // (n * heads)))


class _JoinedHeads(torch.autograd.Function):
    """Keys and values of prompts and then of tokens, as views of one buffer. The gradient of each
    is written to its place with one copy: that of ``torch.cat`` is a part of a larger tensor,
    which the product before copies once more."""

    @staticmethod
    def forward(ctx, kv: Tensor, prompt_kv: Tensor, heads: int) -> tuple[Tensor, ...]:
        ctx.prompts = len(prompt_kv)
        return _split(_joined(kv, prompt_kv), 2, heads)

    @staticmethod
    def backward(ctx, dk: Tensor, dv: Tensor):
        n = ctx.prompts

        def packed(tokens: slice) -> Tensor:
            parts = [x[:, :, tokens].transpose(1, 2) for x in (dk, dv)]
            return torch.stack(parts, dim=2).flatten(2)  # [B, T, 2 D]

        to_kv, to_prompts, _ = ctx.needs_input_grad
        return (
            packed(slice(n, None)) if to_kv else None,
            packed(slice(n)).sum(0) if to_prompts else None,
            None,
        )


class _TwoProducts(torch.autograd.Function):
    """The products of x with the first rows of a frozen weight and with the others. The gradient
    of the second is added to that of the first as it is written."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, first: int):
        ctx.save_for_backward(weight)
        ctx.first = first
        parts = slice(first), slice(first, None)
        return tuple([F.linear(x, weight[i], None if bias is None else bias[i]) for i in parts])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (weight,), first = ctx.saved_tensors, ctx.first
        a, b = (grad.flatten(0, -2) for grad in grads)
        grad = (a @ weight[:first]).addmm_(b, weight[first:])
        return grad.view(*grads[0].shape[:-1], -1), None, None, None


def query_and_keys(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, T, D], and k and v [B, T, 2 D], of a packed layer: two products, so that nobody keeps
    all three for a gradient that needs a part.

    Args:
        layer: with ``in_features`` D and ``part``.
        x: [B, T, D], in the type of the products.
    """
    dim = layer.in_features
    if type(layer) is Linear and _is_frozen(layer, x) and fuses(x, x.dtype):
        return _TwoProducts.apply(x, layer.weight, layer.bias, dim)
    return layer.part(x, slice(dim)), layer.part(x, slice(dim, 3 * dim))


def _is_frozen(layer: Linear, x: Tensor) -> bool:
    """Whether of this product x alone has a gradient, and nothing is cast."""
    tensors = [y for y in (layer.weight, layer.bias) if y is not None]
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and not any(y.requires_grad or y.dtype != x.dtype for y in tensors)
    )


class _PromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, prompt_kv: Tensor, heads: int, scale: float) -> Tensor:
        q = _split(q, 1, heads)[0]
        k, v = _split(_joined(kv, prompt_kv), 2, heads)
        out, lse = softmax_attention.forward(q, k, v, scale)
        ctx.heads, ctx.scale, ctx.prompts = heads, scale, len(prompt_kv)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():
            refuse_second_derivative("attention over prompts")
        q, k, v, out, lse = ctx.saved_tensors
        n, grad = ctx.prompts, _split(grad.contiguous(), 1, ctx.heads)[0]
        if not any(ctx.needs_input_grad[:2]):
            k, v = k[:, :, :n], v[:, :, :n]
            wide = (ctx.scale * (q @ k.transpose(-2, -1))).to(lse) - lse.unsqueeze(-1)
            p = wide.exp_()  # [B, H, T, n], in float32 of half types as flash attention has it
            mean = (grad.to(lse) * out.to(lse)).sum(dim=-1, keepdim=True)
            ds = p * ((grad @ v.transpose(-2, -1)).to(lse) - mean) * ctx.scale
            dk, dv = ds.to(q).transpose(-2, -1) @ q, p.to(q).transpose(-2, -1) @ grad
            return None, None, _packed(dk.sum(0, True), dv.sum(0, True))[0], None, None
        dq, dk, dv = softmax_attention.backward(grad, q, k, v, out, lse, ctx.scale)
        dkv = _packed(dk[:, :, n:], dv[:, :, n:])
        prompts = _packed(dk[:, :, :n].sum(0, True), dv[:, :, :n].sum(0, True))[0]
        return dq.transpose(1, 2).flatten(2), dkv, prompts, None, None


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """[B, H, T, d] each -> [B, T, 2 D]."""
    b, heads, t, d = k.shape
    out = k.new_empty(b, t, 2, heads, d)
    out[:, :, 0], out[:, :, 1] = k.transpose(1, 2), v.transpose(1, 2)
    return out.flatten(2)

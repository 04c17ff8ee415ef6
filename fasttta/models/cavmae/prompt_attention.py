"""Attention of tokens over themselves and over prompts that are keys and values only."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import softmax_attention
from ...ops.registry import refuse_second_derivative
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
    q, (k, v) = _split(q, 1, heads)[0], _split(_joined(kv, prompt_kv), 2, heads)
    out = softmax_attention.attend(q, k, v, scale)
    return out.transpose(1, 2).flatten(2)


def _joined(kv: Tensor, prompt_kv: Tensor) -> Tensor:
    return torch.cat((prompt_kv.expand(len(kv), -1, -1), kv), dim=1)


def _split(packed: Tensor, n: int, heads: int) -> tuple[Tensor, ...]:
    """[B, T, n D] -> n views [B, H, T, d]."""
    b, t, width = packed.shape
    return split_heads(packed.view(b, t, n, heads, width // (n * heads)))


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

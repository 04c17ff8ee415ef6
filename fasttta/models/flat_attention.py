"""Attention whose softmax runs over all query-key pairs at once, without storing these."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128  # query rows at a time: [B, H, 128, K] is all that is ever held of the scores


def plain_flat_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``flat_attention`` as it is defined, with all scores in memory."""
    scores = scale * (q @ k.transpose(-2, -1))
    share = scores.flatten(-2).softmax(dim=-1).view_as(scores)
    return q.shape[-2] * (share @ v)


def flat_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """K * softmax over all K x K scores at once, times v; rows do not sum to 1 each, all do to K.

    That is a row softmax, whose rows are then weighted with K * softmax over rows of their
    log-sum-exp. Scores are made ``ROWS`` query rows at a time, forward and again backward. A
    second derivative is not defined.

    Args:
        q: [B, H, K, d], or [1, H, K, d] where queries are the same for all.
        k, v: [B, H, K, d].
        scale: of q·k.

    Returns:
        [B, H, K, d].
    """
    return _FlatAttention.apply(q, k, v, scale)


class _FlatAttention(torch.autograd.Function):
    # A row's log-sum-exp is kept as its maximum and the rest: at scores of some hundred (RAda with
    # CoOp) their rounded sum would cost 4 digits of the exponentials in fp32

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, top, rest = [], [], []
        for rows in q.split(ROWS, dim=-2):
            scores = scale * (rows @ k.transpose(-2, -1))
            top.append(scores.amax(dim=-1, keepdim=True))
            p = (scores - top[-1]).exp()
            total = p.sum(dim=-1, keepdim=True)
            rest.append(total.log())
            out.append((p @ v) / total)
        out, top, rest = (torch.cat(x, dim=-2) for x in (out, top, rest))
        share = (top - top.amax(dim=-2, keepdim=True) + rest).softmax(dim=-2)  # [B, H, K, 1]
        ctx.save_for_backward(q, k, v, out, top, rest, share)
        ctx.scale = scale
        return out * (q.shape[-2] * share)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, top, rest, share = ctx.saved_tensors
        n = q.shape[-2]
        # with A the attention: dS = A * (grad·v - its mean under A / K), as of any softmax
        mean = (share * (grad * out).sum(dim=-1, keepdim=True)).sum(dim=-2, keepdim=True)
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for some, highest, others, weight, own in zip(
            *(x.split(ROWS, dim=-2) for x in (q, top, rest, share, grad)), strict=True
        ):
            a = (ctx.scale * (some @ k.transpose(-2, -1)) - highest - others).exp() * (n * weight)
            dv += a.transpose(-2, -1) @ own
            a *= own @ v.transpose(-2, -1) - mean
            dk += a.transpose(-2, -1) @ some
            step = a @ k
            dq.append(step if len(q) == len(k) else step.sum(dim=0, keepdim=True))
        return ctx.scale * torch.cat(dq, dim=-2), ctx.scale * dk, dv, None

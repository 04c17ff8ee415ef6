"""Attention whose softmax runs over all query-key pairs at once, without storing these."""

from __future__ import annotations

from collections.abc import Sequence

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
    return _FlatAttention.apply(k, v, scale, q)


def flat_attentions(queries: Sequence[Tensor], k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The sum of ``flat_attention`` over several kinds of queries, whose gradients share a product
    with the values."""
    return _FlatAttention.apply(k, v, scale, *queries)


class _FlatAttention(torch.autograd.Function):
    # A row's log-sum-exp is kept as its maximum and the rest: at scores of some hundred (RAda with
    # CoOp) their rounded sum would cost 4 digits of the exponentials in fp32

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, scale: float, *queries: Tensor) -> Tensor:
        total, saved = 0, []
        for q in queries:
            out, top, rest = [], [], []
            for rows in q.split(ROWS, dim=-2):
                p = (scale * rows) @ k.transpose(-2, -1)
                top.append(p.amax(dim=-1, keepdim=True))
                p.sub_(top[-1]).exp_()
                sums = p.sum(dim=-1, keepdim=True)
                rest.append(sums.log())
                out.append((p @ v).div_(sums))
            out, top, rest = (torch.cat(x, dim=-2) for x in (out, top, rest))
            share = (top - top.amax(dim=-2, keepdim=True) + rest).softmax(dim=-2)  # [B, H, K, 1]
            saved += [q, out, top, rest, share]
            total = total + out * (q.shape[-2] * share)
        ctx.save_for_backward(k, v, *saved)
        ctx.scale = scale
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        k, v, *saved = ctx.saved_tensors
        dk, dv, kinds = torch.zeros_like(k), torch.zeros_like(v), []
        for q, out, top, rest, share in zip(*(saved[i::5] for i in range(5)), strict=True):
            # with A the attention: dS = A * (grad·v - its mean under A / K), as of any softmax
            mean = (share * (grad * out).sum(dim=-1, keepdim=True)).sum(dim=-2, keepdim=True)
            factor = q.shape[-2] * share * (-rest).exp()  # A = factor * exp(scores - top)
            kinds.append((q, top.split(ROWS, -2), factor.split(ROWS, -2), mean, []))
        for i, own in enumerate(grad.split(ROWS, dim=-2)):
            along = own @ v.transpose(-2, -1)  # [B, H, ROWS, K]
            for q, top, factor, mean, dq in kinds:
                rows = ctx.scale * q[:, :, i * ROWS : (i + 1) * ROWS]
                p = (rows @ k.transpose(-2, -1)).sub_(top[i]).exp_()
                dv += p.transpose(-2, -1) @ (factor[i] * own)
                p *= along - mean
                dk += p.transpose(-2, -1) @ (factor[i] * rows)
                step = (p @ k).mul_(ctx.scale * factor[i])
                dq.append(step if len(q) == len(k) else step.sum(dim=0, keepdim=True))
        return dk, dv, None, *(torch.cat(dq, dim=-2) for *_, dq in kinds)

"""Attention whose softmax runs over all query-key pairs at once. The default implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import wide

ROWS = 128  # query rows at a time: [B, H, 128, K] is all that is ever held of the scores


def flat_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A row softmax, whose rows are then weighted with K * softmax over rows of their log-sum-exp.

    That is returned as its maximum and the rest: at scores of some hundred (RAda with CoOp) their
    rounded sum would cost 4 digits of the exponentials in float32.
    """
    dtype = v.dtype
    q, k, v = map(wide, (q, k, v))
    out = v.new_empty(k.shape)
    top, rest = v.new_empty(k.shape[:3]), v.new_empty(k.shape[:3])
    for some, own, highest, others in zip(
        *(x.split(ROWS, dim=2) for x in (q, out, top, rest)), strict=True
    ):
        p = (scale * some) @ k.transpose(-2, -1)
        highest.copy_(p.amax(dim=-1))
        p.sub_(highest.unsqueeze(-1)).exp_()
        total = p.sum(dim=-1)
        torch.log(total, out=others)
        torch.div(p @ v, total.unsqueeze(-1), out=own)
    out.mul_((k.shape[-2] * _share(top, rest)).unsqueeze(-1))
    return out.to(dtype), top, rest


def flat_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, rest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (dq,), dk, dv = flat_attention_gradients(grad, [(q, out, top, rest)], k, v, scale)
    return dq, dk, dv


def flat_attention_gradients(
    grad: Tensor, kinds: Sequence[tuple[Tensor, ...]], k: Tensor, v: Tensor, scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the sum of several kinds of queries' attention over the same keys and values,
    which share a product with the values; kinds: (q, and what their attention returned)."""
    k_type, v_type, q_types = k.dtype, v.dtype, [q.dtype for q, *_ in kinds]
    grad, k, v = map(wide, (grad, k, v))
    n, found = k.shape[-2], []
    dk, dv, prepared = k.new_zeros(k.shape), v.new_zeros(v.shape), []
    for q, out, top, rest in kinds:
        # with A the attention: dS = A * (grad·v - its mean under A / K), as of any softmax
        portions = zip(grad.split(ROWS, dim=2), out.split(ROWS, dim=2), strict=True)
        mean = sum((x.double() * y.double()).sum((-2, -1), True) for x, y in portions)
        mean = (mean / n).to(grad.dtype)
        factor = n * _share(top, rest) * (-rest).exp()  # A = factor * exp(scores - top)
        found.append(torch.empty(q.shape, dtype=k.dtype, device=k.device))
        splits = (x.unsqueeze(-1).split(ROWS, dim=2) for x in (top, factor))
        prepared.append((wide(q).split(ROWS, 2), *splits, mean, found[-1].split(ROWS, 2)))
    for i, own in enumerate(grad.split(ROWS, dim=2)):
        along = own @ v.transpose(-2, -1)  # [B, H, ROWS, K]
        for q, top, factor, mean, dq in prepared:
            rows = scale * q[i]
            p = (rows @ k.transpose(-2, -1)).sub_(top[i]).exp_()
            dv += p.transpose(-2, -1) @ (factor[i] * own)
            p *= along - mean
            dk += p.transpose(-2, -1) @ (factor[i] * rows)
            step = (p @ k).mul_(scale * factor[i])
            dq[i].copy_(step if len(dq[i]) == len(k) else step.sum(dim=0, keepdim=True))
    found = [x.to(dtype) for x, dtype in zip(found, q_types, strict=True)]
    return found, dk.to(k_type), dv.to(v_type)


def _share(top: Tensor, rest: Tensor) -> Tensor:
    """[B, H, K], rows' shares of the sum of all exponentials."""
    return (top - top.amax(dim=-1, keepdim=True) + rest).softmax(dim=-1)

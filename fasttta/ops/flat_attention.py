"""Attention whose softmax runs over all query-key pairs at once, where no kernel computes it."""

from __future__ import annotations

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
    types = q.dtype, k.dtype, v.dtype
    grad, q, k, v = map(wide, (grad, q, k, v))
    n = k.shape[-2]
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    # with A the attention: dS = A * (grad·v - its mean under A / K), as of any softmax
    portions = zip(grad.split(ROWS, dim=2), out.split(ROWS, dim=2), strict=True)
    mean = sum((x.double() * y.double()).sum((-2, -1), True) for x, y in portions)
    mean = (mean / n).to(grad.dtype)
    factor = n * _share(top, rest) * (-rest).exp()  # A = factor * exp(scores - top)
    for some, own, up, highest, times in zip(
        *(x.split(ROWS, dim=2) for x in (q, dq, grad, top.unsqueeze(-1), factor.unsqueeze(-1))),
        strict=True,
    ):
        rows = scale * some
        p = (rows @ k.transpose(-2, -1)).sub_(highest).exp_()
        dv += p.transpose(-2, -1) @ (times * up)
        p *= up @ v.transpose(-2, -1) - mean
        dk += p.transpose(-2, -1) @ (times * rows)
        step = (p @ k).mul_(scale * times)
        own.copy_(step if len(own) == len(k) else step.sum(dim=0, keepdim=True))
    dq, dk, dv = (x.to(dtype) for x, dtype in zip((dq, dk, dv), types, strict=True))
    return dq, dk, dv


def _share(top: Tensor, rest: Tensor) -> Tensor:
    """[B, H, K], rows' shares of the sum of all exponentials."""
    return (top - top.amax(dim=-1, keepdim=True) + rest).softmax(dim=-1)

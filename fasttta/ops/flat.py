"""Attention whose softmax runs over all query-key pairs at once. The default implementation."""

from __future__ import annotations

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
    for first, some in _portions(q, k.shape[-2]):
        scores = scale * (some @ k.transpose(-2, -1))
        at = slice(first, first + some.shape[-2])
        top[..., at] = highest = scores.amax(dim=-1)
        p = scores.sub_(highest.unsqueeze(-1)).exp_()
        total = p.sum(dim=-1)
        rest[..., at] = total.log()
        out[..., at, :] = (p @ v) / total.unsqueeze(-1)
    out *= (k.shape[-2] * _share(top, rest)).unsqueeze(-1)
    return out.to(dtype), top, rest


def flat_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, rest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    types = [x.dtype for x in (q, k, v)]
    grad, q, k, v, out = map(wide, (grad, q, k, v, out))
    n = k.shape[-2]
    # with A the attention: dS = A * (grad·v - its mean under A / K), as of any softmax
    mean = (grad * out).sum(dim=(-2, -1), keepdim=True) / n
    factor = n * _share(top, rest)
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for first, some in _portions(q, n):
        at = slice(first, first + some.shape[-2])
        highest, others, weight = (x[..., at].unsqueeze(-1) for x in (top, rest, factor))
        a = (scale * (some @ k.transpose(-2, -1))).sub_(highest).sub_(others).exp_().mul_(weight)
        own = grad[..., at, :]
        dv += a.transpose(-2, -1) @ own
        a *= own @ v.transpose(-2, -1) - mean
        dk += a.transpose(-2, -1) @ some
        step = a @ k
        dq[..., at, :] = step if len(q) == len(k) else step.sum(dim=0, keepdim=True)
    found = dq.mul_(scale), dk.mul_(scale), dv
    return tuple(x.to(dtype) for x, dtype in zip(found, types, strict=True))


def _portions(q: Tensor, count: int):
    for first in range(0, count, ROWS):
        yield first, q[..., first : first + ROWS, :]


def _share(top: Tensor, rest: Tensor) -> Tensor:
    """[B, H, K], rows' shares of the sum of all exponentials."""
    return (top - top.amax(dim=-1, keepdim=True) + rest).softmax(dim=-1)

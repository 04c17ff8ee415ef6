"""Attention whose softmax runs over all query-key pairs at once: RAda's attention over classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import trace
from ..kernels.flat_attention_plan import WIDEST_HEAD
from . import triton
from .cost import Cost, with_copies
from .registry import define, ops, public, refuse_second_derivative, result_like, wide

ROWS = 128  # query rows at a time: [B, H, 128, K] is all that is ever held of the scores

SCHEMA = (
    "flat_attention(Tensor q, Tensor k, Tensor v, float scale)"
    " -> (Tensor out, Tensor top, Tensor rest)"
)
BACKWARD_SCHEMA = (
    "flat_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor top,"
    " Tensor rest, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)


def _fake(q, k, v, scale):
    rows = k.shape[:3]
    return v.new_empty(k.shape), result_like(k, rows), result_like(k, rows)


def _fake_backward(grad, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def flat_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """K * softmax over all K x K scores of a head at once, times v.

    Args:
        q: [B, H, K, d] or [1, H, K, d]. k, v: [B, H, K, d]. scale: factor of q·k.

    Returns:
        [B, H, K, d] in the type of v.
    """
    scores = scale * (wide(q) @ wide(k).transpose(-2, -1))
    share = scores.flatten(-2).softmax(dim=-1).view_as(scores)
    return (k.shape[-2] * (share @ wide(v))).to(v.dtype)


class _FlatAttention(torch.autograd.Function):
    """Over several kinds of queries, added up."""

    @staticmethod
    def forward(*arguments):
        # one parameter for all: torch.compile leaves ctx out where a call without gradients has as
        # many arguments as forward has parameters, which those with some in a list may come to
        ctx, scale, k, v, *queries = arguments
        with trace.span("flat_attention"):
            results = [(q, *ops.flat_attention(q, k, v, scale)) for q in queries]
        ctx.save_for_backward(k, v, *(x for result in results for x in result))
        ctx.scale = scale
        out = results[0][1]
        for _, more, *_ in results[1:]:
            out = out + more
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("flat_attention")
        k, v, *saved = ctx.saved_tensors
        dq = []
        dk = dv = None
        with trace.span("flat_attention_backward"):
            for n in range(0, len(saved), 4):
                q, out, top, rest = saved[n : n + 4]
                gradients = ops.flat_attention_backward(grad, q, k, v, out, top, rest, ctx.scale)
                dq.append(gradients[0])
                dk = gradients[1] if dk is None else dk.add_(gradients[1])
                dv = gradients[2] if dv is None else dv.add_(gradients[2])
        return None, dk, dv, *dq


def flat_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``functional.flat_attention`` of checked arguments, which are those of the reference."""
    return _FlatAttention.apply(scale, k, v, q)


def flat_attentions(queries: Sequence[Tensor], k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The sum of ``flat_attention`` over several kinds of queries: [B, H, K, d]."""
    return _FlatAttention.apply(scale, k, v, *queries)


def _default(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A row softmax, whose rows are then weighted with K * softmax over rows of their log-sum-exp.

    That is returned as its maximum and the rest: at scores of some hundred (RAda with CoOp) their
    rounded sum would cost 4 digits of the exponentials in float32.
    """
    dtype = v.dtype
    q, k, v = map(wide, (q, k, v))
    out = v.new_empty(k.shape)
    top, rest = v.new_empty(k.shape[:3]), v.new_empty(k.shape[:3])
    for some, some_out, highest, logarithm in zip(
        *(x.split(ROWS, dim=2) for x in (q, out, top, rest)), strict=True
    ):
        p = (scale * some) @ k.transpose(-2, -1)
        highest.copy_(p.amax(dim=-1))
        p.sub_(highest.unsqueeze(-1)).exp_()
        total = p.sum(dim=-1)
        torch.log(total, out=logarithm)
        torch.div(p @ v, total.unsqueeze(-1), out=some_out)
    out.mul_((k.shape[-2] * _share(top, rest)).unsqueeze(-1))
    return out.to(dtype), top, rest


def _default_backward(
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
    for some, some_dq, up, highest, times in zip(
        *(x.split(ROWS, dim=2) for x in (q, dq, grad, top.unsqueeze(-1), factor.unsqueeze(-1))),
        strict=True,
    ):
        rows = scale * some
        p = (rows @ k.transpose(-2, -1)).sub_(highest).exp_()
        dv += p.transpose(-2, -1) @ (times * up)
        p *= up @ v.transpose(-2, -1) - mean
        dk += p.transpose(-2, -1) @ (times * rows)
        step = (p @ k).mul_(scale * times)
        some_dq.copy_(step if len(some_dq) == len(k) else step.sum(dim=0, keepdim=True))
    dq, dk, dv = (x.to(dtype) for x, dtype in zip((dq, dk, dv), types, strict=True))
    return dq, dk, dv


def _share(top: Tensor, rest: Tensor) -> Tensor:
    """[B, H, K], rows' shares of the sum of all exponentials."""
    return (top - top.amax(dim=-1, keepdim=True) + rest).softmax(dim=-1)


def _no_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, *others: Tensor) -> str | None:
    if reason := triton.unsuitable(q, k, v, *others):
        return reason
    types = [x.dtype for x in (q, k, v, *others) if x.ndim == 4]
    if len(set(types)) > 1:
        return f"it needs tensors of one dtype, found {types}"
    if k.shape[-1] > WIDEST_HEAD:
        return f"it needs heads of at most {WIDEST_HEAD} channels, found {k.shape[-1]}"
    if k.shape[0] * k.shape[1] > triton.MOST_SAMPLES:
        return (
            f"it needs at most {triton.MOST_SAMPLES} heads, found {k.shape[0]} samples of "
            f"{k.shape[1]}"
        )
    return None


def _no_triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, rest: Tensor,
    scale: float,
) -> str | None:  # fmt: skip
    return _no_triton(q, k, v, scale, grad, out, top, rest)


def _launch(q, k, v, scale):
    return triton.kernels("flat_attention").flat_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), scale
    )


def _launch_backward(grad, q, k, v, out, top, rest, scale):
    tensors = (x.contiguous() for x in (grad, q, k, v, out, top, rest))
    return triton.kernels("flat_attention").flat_attention_backward(*tensors, scale)


# shares of large products' rate, from the instructions of both kernels' main loops on sm_90
_SHARES = {torch.float32: (1.0, 0.9)}
_HALF_SHARES = (0.35, 0.3)


def _cost(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Cost:
    batch, heads, count, d = k.shape
    share, _ = _SHARES.get(q.dtype, _HALF_SHARES)
    cost = Cost(launches=2, flops=4 * batch * heads * count * count * d, share=share)
    return with_copies(cost, q, k, v)


def _cost_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, rest: Tensor,
    scale: float,
) -> Cost:  # fmt: skip
    batch, heads, count, d = k.shape
    _, share = _SHARES.get(q.dtype, _HALF_SHARES)
    cost = Cost(launches=2, flops=10 * batch * heads * count * count * d, share=share)
    return with_copies(cost, grad, q, k, v, out, top, rest)


define(
    SCHEMA,
    _fake,
    _default,
    cpp=True,
    kernels="flat_attention",
    no_triton=_no_triton,
    launch=_launch,
    cost=_cost,
)
define(
    BACKWARD_SCHEMA,
    _fake_backward,
    _default_backward,
    cpp=True,
    kernels="flat_attention",
    no_triton=_no_triton_backward,
    launch=_launch_backward,
    cost=_cost_backward,
)
public("flat_attention", flat_attention, flat_attention_reference)

"""Mean and standard deviation of raw attention scores, block by block of modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import trace
from ..kernels import score_moments_per_head_plan, score_moments_plan
from . import score_moments_default as in_pytorch
from . import triton
from .cost import Cost, with_copies
from .registry import define, ops, public, refuse_second_derivative, result_like, wide

SCHEMA = (
    "score_moments(Tensor q, Tensor k, int[] spans, float scale, bool per_head)"
    " -> (Tensor mean, Tensor std)"
)
BACKWARD_SCHEMA = (
    "score_moments_backward(Tensor grad_mean, Tensor grad_std, Tensor q, Tensor k, Tensor std,"
    " int[] spans, float scale, bool per_head) -> (Tensor grad_q, Tensor grad_k)"
)


def fake_moments(q, k, spans, scale, per_head):
    """Mean and std [B, M, M], or [B, H, M, M] per head, without values."""
    shape = (*q.shape[: 2 if per_head else 1], len(spans), len(spans))
    return result_like(q, shape), result_like(q, shape)


def _fake_backward(grad_mean, grad_std, q, k, std, spans, scale, per_head):
    return torch.empty_like(q), torch.empty_like(k)


def score_moments_reference(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float, per_head: bool
) -> tuple[Tensor, Tensor]:
    """The official formulation: all heads' T x T score maps, their mean over heads, slices of it.

    Args:
        q, k: [B, H, T, d]. spans: token counts of M modalities, which sum to T.
        scale: factor of q·k. per_head: of every head, not of the heads' mean.

    Returns:
        Mean and unbiased std of each block (query modality, key modality): [B, M, M], or
        [B, H, M, M] per head, at least in float32.
    """
    scores = scale * (wide(q) @ wide(k).transpose(-2, -1))  # [B, H, T, T]
    if not per_head:
        scores = scores.mean(dim=1)  # [B, T, T]
    blocks = [row.split(spans, dim=-1) for row in scores.split(spans, dim=-2)]
    mean = torch.stack([torch.stack([b.mean((-2, -1)) for b in row], -1) for row in blocks], -2)
    std = torch.stack([torch.stack([b.std((-2, -1)) for b in row], -1) for row in blocks], -2)
    return mean, std


class _ScoreMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, spans, scale, per_head):
        with trace.span("score_moments"):
            mean, std = ops.score_moments(q, k, spans, scale, per_head)
        ctx.save_for_backward(q, k, std)
        ctx.options = spans, scale, per_head
        return mean, std

    @staticmethod
    def backward(ctx, grad_mean, grad_std):
        if torch.is_grad_enabled():
            refuse_second_derivative("score_moments")
        q, k, std = ctx.saved_tensors
        with trace.span("score_moments_backward"):
            grads = ops.score_moments_backward(grad_mean, grad_std, q, k, std, *ctx.options)
        return *grads, None, None, None


def score_moments(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float, per_head: bool
) -> tuple[Tensor, Tensor]:
    """``functional.score_moments`` of checked arguments, which are those of the reference."""
    return _ScoreMoments.apply(q, k, spans, scale, per_head)


def no_cpp_scores(name: str, q: Tensor | None, k: Tensor | None, per_head: bool) -> str | None:
    """Says why C++ does not compute an operation on score statistics; None if it does."""
    if per_head and q is not None and k is not None:
        return in_pytorch.no_cpp(q, k)
    return (
        f'{name} has no cpp kernel but for heads="each": its work is matrix products, for which '
        "PyTorch's own kernels serve on a CPU"
    )


def _no_cpp(q=None, k=None, spans=(), scale=1.0, per_head=False) -> str | None:
    return no_cpp_scores("score_moments", q, k, per_head)


def no_triton_scores(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float, per_head: bool, *others: Tensor | None
) -> str | None:
    """Says what Triton's kernels of score statistics are not made for; None if nothing.

    Args:
        others: further tensors that kernels read.
    """
    if reason := triton.unsuitable(q, k, *others):
        return reason
    if q.dtype != k.dtype:
        return f"it needs q and k of one dtype, found {q.dtype} and {k.dtype}"
    if scale == 0:
        return "it needs a scale other than 0"
    if per_head:
        return score_moments_per_head_plan.unsuitable(q.shape[3])
    return score_moments_plan.unsuitable(spans)


def _no_triton_backward(
    grad_mean: Tensor, grad_std: Tensor, q: Tensor, k: Tensor, std: Tensor, spans: Sequence[int],
    scale: float, per_head: bool,
) -> str | None:  # fmt: skip
    return no_triton_scores(q, k, spans, scale, per_head, grad_mean, grad_std, std)


def _launch_backward(grad_mean, grad_std, q, k, std, spans, scale, per_head):
    return triton.kernels("score_moments").score_moments_backward(
        grad_mean.contiguous(), grad_std.contiguous(), q, k, std.contiguous(), spans, scale,
        per_head,
    )  # fmt: skip


# shares of large products' rate, from the kernels' occupancy and loads on sm_90
_HEAD_MEAN, _HEAD_MEAN_BACKWARD, _EACH_HEAD = 0.45, 0.34, 0.2


def cost_of_tokens(q: Tensor) -> Cost:
    """Of ``token_moments``: a covariance of q and of k for every head and modality."""
    batch, heads, tokens, d = q.shape
    return Cost(1, 4 * batch * heads * tokens * d * d, _EACH_HEAD)


def _with_tokens(cost: Cost, q: Tensor, spans: Sequence[int]) -> Cost:
    """With the kernel of ``token_moments``, whose results another kernel reads."""
    batch, heads, _, d = q.shape
    size, tokens = batch * heads * 2 * len(spans) * (d + 1) * d * 4, cost_of_tokens(q)
    return Cost(cost.launches + 1, cost.flops + tokens.flops, _EACH_HEAD, cost.workspace + 2 * size)


def cost_forward(
    q: Tensor, spans: Sequence[int], per_head: bool, tokens: Tensor | None = None
) -> Cost:
    """Of the moments' kernels: tiles of scores, merged; per head moments of the tokens."""
    batch, heads, count, d = q.shape
    if per_head:
        return _with_tokens(Cost(), q, spans) if tokens is None else Cost()
    return Cost(2, 2 * batch * heads * d * count * count, _HEAD_MEAN)


def cost_backward(
    q: Tensor, spans: Sequence[int], per_head: bool, self_blocks: bool,
    tokens: Tensor | None = None,
) -> Cost:  # fmt: skip
    """Of the gradients' kernels; ``self_blocks``: of these, too."""
    batch, heads, count, d = q.shape
    if per_head:
        cost = Cost(1, 4 * batch * heads * count * d * d, _EACH_HEAD)
        return _with_tokens(cost, q, spans) if tokens is None else cost
    pairs = count * count - (0 if self_blocks else sum(n * n for n in spans))
    return Cost(
        2, 6 * batch * heads * d * pairs, _HEAD_MEAN_BACKWARD,
        workspace=3 * batch * pairs * q.element_size(),  # weighted scores: dq and dk read them
    )  # fmt: skip


def _cost(q: Tensor, k: Tensor, spans: Sequence[int], scale: float, per_head: bool) -> Cost:
    return cost_forward(q, spans, per_head)


def _cost_backward(
    grad_mean: Tensor, grad_std: Tensor, q: Tensor, k: Tensor, std: Tensor, spans: Sequence[int],
    scale: float, per_head: bool,
) -> Cost:  # fmt: skip
    cost = with_copies(cost_backward(q, spans, per_head, True), grad_mean, grad_std, std)
    if per_head:
        return cost
    forward = cost_forward(q, spans, False)  # the means over heads are computed again
    return replace(
        cost, launches=cost.launches + forward.launches, flops=cost.flops + forward.flops
    )


define(
    SCHEMA,
    fake_moments,
    in_pytorch.score_moments,
    no_cpp=_no_cpp,
    kernels="score_moments",
    no_triton=no_triton_scores,
    cost=_cost,
)
define(
    BACKWARD_SCHEMA,
    _fake_backward,
    in_pytorch.score_moments_backward,
    kernels="score_moments",
    no_triton=_no_triton_backward,
    launch=_launch_backward,
    cost=_cost_backward,
)
public("score_moments", score_moments, score_moments_reference)

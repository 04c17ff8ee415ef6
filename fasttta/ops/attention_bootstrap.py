"""The attention bootstrapping loss: cross-modal score statistics against self-attention's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import trace
from . import triton
from .cost import Cost, with_copies
from .registry import define, ops, public, refuse_second_derivative, result_like
from .score_moments import (
    cost_backward,
    cost_forward,
    fake_moments,
    no_cpp_scores,
    no_triton_scores,
    score_moments_reference,
)
from .score_moments_default import moments_backward, score_moments
from .token_moments import keeps_tokens

_ANCHORS = "Tensor? anchor_mean=None, Tensor? anchor_std=None"
SCHEMA = (
    "attention_bootstrap(Tensor q, Tensor k, int[] spans, float scale, bool per_head,"
    f" bool pair_query, {_ANCHORS}, Tensor? tokens=None)"
    " -> (Tensor loss, Tensor mean, Tensor std)"
)
BACKWARD_SCHEMA = (
    "attention_bootstrap_backward(Tensor grad, Tensor q, Tensor k, Tensor mean, Tensor std,"
    f" int[] spans, float scale, bool per_head, bool pair_query, {_ANCHORS},"
    " Tensor? tokens=None)"
    " -> (Tensor grad_q, Tensor grad_k)"
)


def _fake(q, k, spans, scale, per_head, pair_query, *_):
    return result_like(q, (q.shape[0],)), *fake_moments(q, k, spans, scale, per_head)


def _fake_backward(grad, q, k, *_):
    return torch.empty_like(q), torch.empty_like(k)


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(N(mean_p, std_p^2) || N(mean_q, std_q^2)), elementwise, of shapes that broadcast."""
    squares = std_p.square() + (mean_p - mean_q).square()
    return torch.log(std_q / std_p) + squares / (2 * std_q.square()) - 0.5


def attention_bootstrap_reference(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float, per_head: bool, pair_query: bool,
    anchor_mean: Tensor | None = None, anchor_std: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss on the reference's score statistics, one block after the other.

    Args:
        q, k, spans, scale, per_head: as in ``score_moments_reference``.
        pair_query: matches cross block (i, j) with self block (i, i), not (j, j).
        anchor_mean, anchor_std: [M], or [H, M] per head: in place of the self blocks' statistics.

    Returns:
        Loss [B] in nats, per head the mean over heads; mean and std as ``score_moments_reference``.
    """
    mean, std = score_moments_reference(q, k, spans, scale, per_head)
    loss = torch.zeros_like(mean[..., 0, 0])
    for i in range(len(spans)):
        for j in range(len(spans)):
            if i != j:
                a = i if pair_query else j
                mean_s = mean[..., a, a].detach() if anchor_mean is None else anchor_mean[..., a]
                std_s = std[..., a, a].detach() if anchor_std is None else anchor_std[..., a]
                loss = loss + gaussian_kl(mean[..., i, j], std[..., i, j], mean_s, std_s)
    return (loss.mean(dim=1) if per_head else loss), mean, std


class _AttentionBootstrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, spans, scale, per_head, pair_query, anchor_mean, anchor_std):
        options = spans, scale, per_head, pair_query
        anchors = anchor_mean, anchor_std
        with trace.span("attention_bootstrap"):
            kept = per_head and keeps_tokens(q, k, spans, per_head)
            tokens = ops.token_moments(q, k, spans) if kept else None
            loss, mean, std = ops.attention_bootstrap(q, k, *options, *anchors, tokens)
        ctx.save_for_backward(q, k, mean, std, *anchors, tokens)
        ctx.options = options
        ctx.mark_non_differentiable(mean, std)
        return loss, mean, std

    @staticmethod
    def backward(ctx, grad, _mean, _std):
        if torch.is_grad_enabled():
            refuse_second_derivative("attention_bootstrap")
        q, k, mean, std, *rest = ctx.saved_tensors
        with trace.span("attention_bootstrap_backward"):
            grads = ops.attention_bootstrap_backward(grad, q, k, mean, std, *ctx.options, *rest)
        return *grads, None, None, None, None, None, None


def attention_bootstrap(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float, per_head: bool, pair_query: bool,
    anchor_mean: Tensor | None = None, anchor_std: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``functional.attention_bootstrap`` of checked arguments, which are those of the reference."""
    return _AttentionBootstrap.apply(
        q, k, spans, scale, per_head, pair_query, anchor_mean, anchor_std
    )


def _matched(
    mean: Tensor, std: Tensor, pair_query: bool,
    anchor_mean: Tensor | None, anchor_std: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and std that each block [.., i, j] is matched with: those of (j, j), or of (i, i)."""
    mean_s = mean.diagonal(dim1=-2, dim2=-1) if anchor_mean is None else anchor_mean
    std_s = std.diagonal(dim1=-2, dim2=-1) if anchor_std is None else anchor_std
    dim = -1 if pair_query else -2
    return mean_s.unsqueeze(dim), std_s.unsqueeze(dim)


def _default(
    q: Tensor, k: Tensor, spans: list[int], scale: float, per_head: bool, pair_query: bool,
    anchor_mean: Tensor | None = None, anchor_std: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean, std = score_moments(q, k, spans, scale, per_head)
    mean_s, std_s = _matched(mean, std, pair_query, anchor_mean, anchor_std)
    cross = ~torch.eye(len(spans), dtype=torch.bool, device=q.device)
    loss = torch.where(cross, gaussian_kl(mean, std, mean_s, std_s), 0).sum((-2, -1))
    return (loss.mean(dim=1) if per_head else loss), mean, std


def _default_backward(
    grad: Tensor, q: Tensor, k: Tensor, mean: Tensor, std: Tensor, spans: list[int], scale: float,
    per_head: bool, pair_query: bool, anchor_mean: Tensor | None = None,
    anchor_std: Tensor | None = None, tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Self blocks are constants: only cross blocks have scores whose gradient is computed."""
    mean_s, std_s = _matched(mean, std, pair_query, anchor_mean, anchor_std)
    grad = (grad[:, None] / q.shape[1] if per_head else grad)[..., None, None].to(mean.dtype)
    cross = ~torch.eye(len(spans), dtype=torch.bool, device=q.device)
    used = cross & (grad != 0)  # a sample of weight 0 may have undefined statistics
    variance_s = std_s.square()
    grad_mean = torch.where(used, grad * (mean - mean_s) / variance_s, 0)
    grad_std = torch.where(used, grad * (std / variance_s - 1 / std), 0)
    return moments_backward(grad_mean, grad_std, q, k, std, spans, scale, per_head, False)


def _no_cpp(q=None, k=None, spans=(), scale=1.0, per_head=False, *_) -> str | None:
    return no_cpp_scores("attention_bootstrap", q, k, per_head)


def _no_triton(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float, per_head: bool, pair_query: bool,
    anchor_mean: Tensor | None = None, anchor_std: Tensor | None = None,
    *others: Tensor | None,
) -> str | None:  # fmt: skip
    anchors = anchor_mean, anchor_std
    if reason := no_triton_scores(q, k, spans, scale, per_head, *anchors, *others):
        return reason
    shape = (q.shape[1], len(spans)) if per_head else (len(spans),)
    for x in anchors:
        if x is not None and (x.shape != shape or x.dtype != torch.float32):
            return f"it needs anchors {list(shape)} in float32, found {list(x.shape)} in {x.dtype}"
    return None


def _no_triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, mean: Tensor, std: Tensor, spans: Sequence[int],
    scale: float, per_head: bool, pair_query: bool, anchor_mean: Tensor | None = None,
    anchor_std: Tensor | None = None, tokens: Tensor | None = None,
) -> str | None:  # fmt: skip
    options = spans, scale, per_head, pair_query, anchor_mean, anchor_std, tokens
    return _no_triton(q, k, *options, grad, mean, std)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _launch(q, k, spans, scale, per_head, pair_query, *others):
    return triton.kernels("attention_bootstrap").attention_bootstrap(
        q, k, spans, scale, per_head, pair_query, *map(_dense, others)
    )


def _launch_backward(grad, q, k, mean, std, spans, scale, per_head, pair_query, *others):
    return triton.kernels("attention_bootstrap").attention_bootstrap_backward(
        grad, q, k, mean.contiguous(), std.contiguous(), spans, scale, per_head, pair_query,
        *map(_dense, others),
    )  # fmt: skip


def _cost(
    q, k, spans, scale, per_head, pair_query, anchor_mean=None, anchor_std=None, tokens=None
) -> Cost:
    cost = cost_forward(q, spans, per_head, tokens)
    if per_head:
        cost = replace(cost, launches=cost.launches + 1)  # the mean over heads
    return with_copies(cost, anchor_mean, anchor_std)


def _cost_backward(
    grad, q, k, mean, std, spans, scale, per_head, pair_query, anchor_mean=None, anchor_std=None,
    tokens=None,
) -> Cost:  # fmt: skip
    cost = cost_backward(q, spans, per_head, False, tokens)
    return with_copies(cost, mean, std, anchor_mean, anchor_std)


define(
    SCHEMA,
    _fake,
    _default,
    no_cpp=_no_cpp,
    kernels="attention_bootstrap",
    no_triton=_no_triton,
    launch=_launch,
    cost=_cost,
)
define(
    BACKWARD_SCHEMA,
    _fake_backward,
    _default_backward,
    kernels="attention_bootstrap",
    no_triton=_no_triton_backward,
    launch=_launch_backward,
    cost=_cost_backward,
)
public("attention_bootstrap", attention_bootstrap, attention_bootstrap_reference)
public("gaussian_kl", gaussian_kl, gaussian_kl)

"""Differentiable calls of the operations: a forward and a backward op each, tied by a Function.

define/impl with a Function costs 8 us forward and backward over plain aten ops, custom_op with
register_autograd 36 us (torch 2.13, CPU).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import schema

ops = torch.ops.fasttta
assert schema.LIBRARY is not None  # importing schema is what defines torch.ops.fasttta


class _ScoreMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, spans, scale, per_head):
        mean, std = ops.score_moments(q, k, spans, scale, per_head)
        ctx.save_for_backward(q, k, std)
        ctx.options = spans, scale, per_head
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean, grad_std):
        grads = ops.score_moments_backward(grad_mean, grad_std, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None


class _AttentionBootstrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, spans, scale, per_head, pair_query, anchor_mean, anchor_std):
        options = spans, scale, per_head, pair_query
        loss, mean, std = ops.attention_bootstrap(q, k, *options, anchor_mean, anchor_std)
        ctx.save_for_backward(q, k, mean, std, anchor_mean, anchor_std)
        ctx.options = options
        ctx.mark_non_differentiable(mean, std)
        return loss, mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _std):
        q, k, mean, std, *anchors = ctx.saved_tensors
        grads = ops.attention_bootstrap_backward(grad, q, k, mean, std, *ctx.options, *anchors)
        return *grads, None, None, None, None, None, None


class _PerSample(torch.autograd.Function):
    """An op (logits, *options) -> [n], whose backward op is (grad, logits, *options)."""

    @staticmethod
    def forward(ctx, name, logits, *options):
        ctx.name, ctx.options = name, options
        ctx.save_for_backward(logits)
        return getattr(ops, name)(logits, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        grad = getattr(ops, f"{ctx.name}_backward")(grad, logits, *ctx.options)
        return None, grad, *(None for _ in ctx.options)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, softmax_sum, weight):
        balance, grad = ops.balance_entropy(logits, softmax_sum, weight)
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return balance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None, None


class _AdaptationHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, entropy_weight, balance_weight, softmax_sum, eps, weight):
        entropy, balance, *grads = ops.adaptation_head(logits, k, softmax_sum, eps, weight)
        ctx.save_for_backward(*grads)
        ctx.weights, ctx.dtype = (entropy_weight, balance_weight), logits.dtype
        return entropy_weight * entropy - balance_weight * balance, entropy, balance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_entropy, grad_balance):
        rows, columns = ctx.saved_tensors
        of_entropy = grad_total * ctx.weights[0] + grad_entropy
        of_balance = grad_balance - grad_total * ctx.weights[1]
        grad = of_entropy * rows + of_balance * columns
        return grad.to(ctx.dtype), *(None for _ in range(6))


def score_moments(q, k, spans, scale, per_head):
    return _ScoreMoments.apply(q, k, spans, scale, per_head)


def attention_bootstrap(
    q, k, spans, scale, per_head, pair_query, anchor_mean=None, anchor_std=None
):
    return _AttentionBootstrap.apply(
        q, k, spans, scale, per_head, pair_query, anchor_mean, anchor_std
    )


def entropy(logits):
    return _PerSample.apply("entropy", logits)


def principal_entropy(logits, k, eps):
    return _PerSample.apply("principal_entropy", logits, k, eps)


def balance_entropy(logits, softmax_sum, weight=None):
    return _Balance.apply(logits, softmax_sum, weight)


def adaptation_head(logits, k, entropy_weight, balance_weight, softmax_sum, eps, weight=None):
    return _AdaptationHead.apply(
        logits, k, entropy_weight, balance_weight, softmax_sum, eps, weight
    )

"""Differentiable calls of the operations: a forward and a backward op each, tied by a Function.

define/impl with a Function costs 8 us forward and backward over plain aten ops, custom_op with
register_autograd 36 us (torch 2.13, CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from ..trace import span
from . import again, reference, schema

assert schema.LIBRARY is not None  # importing schema is what defines torch.ops.fasttta


def _ranged(name: str) -> Callable:
    """An operation in a range of its name for profilers."""
    op = getattr(torch.ops.fasttta, name)

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        with span(name):
            return op(*args)

    return call


# all of them now: torch.compile refuses a call that would add one while it traces
ops = SimpleNamespace(**{name: _ranged(name) for name in schema.SCHEMAS})


class _ScoreMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, spans, scale, per_head):
        mean, std = ops.score_moments(q, k, spans, scale, per_head)
        ctx.save_for_backward(q, k, std)
        ctx.options = spans, scale, per_head
        return mean, std

    @staticmethod
    def backward(ctx, grad_mean, grad_std):
        if again.asked():
            inputs = *ctx.saved_tensors[:2], *ctx.options
            return again.gradients(reference.score_moments, inputs, (grad_mean, grad_std))
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
    def backward(ctx, grad, _mean, _std):
        q, k, mean, std, *anchors = ctx.saved_tensors
        if again.asked():
            inputs = q, k, *ctx.options, *anchors
            return again.gradients(reference.attention_bootstrap, inputs, (grad, None, None))
        grads = ops.attention_bootstrap_backward(grad, q, k, mean, std, *ctx.options, *anchors)
        return *grads, None, None, None, None, None, None


class _PerSample(torch.autograd.Function):
    """An op (x [n, ...], *options) -> [n], whose backward op is (grad, x, *options)."""

    @staticmethod
    def forward(*given):  # see _CausalWithPrefix
        ctx, name, x, *options = given
        ctx.name, ctx.options = name, options
        ctx.save_for_backward(x)
        return getattr(ops, name)(x, *options)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if again.asked():
            formula = getattr(reference, ctx.name)
            return None, *again.gradients(formula, (x, *ctx.options), (grad,))
        grad = getattr(ops, f"{ctx.name}_backward")(grad, x, *ctx.options)
        return None, grad, *(None for _ in ctx.options)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, softmax_sum, weight):
        balance, grad = ops.balance_entropy(logits, softmax_sum, weight)
        ctx.save_for_backward(grad, logits, weight)
        ctx.softmax_sum = softmax_sum
        return balance

    @staticmethod
    def backward(ctx, grad):
        known, logits, weight = ctx.saved_tensors
        if again.asked():
            inputs = logits, ctx.softmax_sum, weight
            return again.gradients(reference.balance_entropy, inputs, (grad,))
        return (grad * known).to(logits.dtype), None, None


class _AdaptationHead(torch.autograd.Function):
    """The op returns the gradient of its total, so that the usual backward is one product."""

    @staticmethod
    def forward(ctx, logits, k, entropy_weight, balance_weight, softmax_sum, eps, weight):
        options = softmax_sum, eps, weight
        *losses, grad = ops.adaptation_head(logits, k, entropy_weight, balance_weight, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, weight, grad)
        ctx.options = k, softmax_sum, eps
        ctx.weights = entropy_weight, balance_weight
        return tuple(losses)

    @staticmethod
    def backward(ctx, *upstream):
        logits, weight, grad = ctx.saved_tensors
        k, *options = ctx.options
        if again.asked():
            inputs = logits, k, *ctx.weights, *options, weight
            return again.gradients(reference.adaptation_head, inputs, upstream)
        found = None
        # entropy is the total of weights (1, 0), balance that of (0, -1)
        for up, weights in zip(upstream, (None, (1.0, 0.0), (0.0, -1.0)), strict=True):
            if up is None:
                continue
            if weights is not None:
                *_, grad = ops.adaptation_head(logits, k, *weights, *options, weight)
            found = up * grad if found is None else found + up * grad
        return None if found is None else found.to(logits.dtype), *(None for _ in range(6))


def _flat_attentions(scale, k, v, *queries):
    return sum(reference.flat_attention(q, k, v, scale) for q in queries)


class _FlatAttention(torch.autograd.Function):
    """Over several kinds of queries, added up."""

    @staticmethod
    def forward(*given):  # see _CausalWithPrefix
        ctx, scale, k, v, *queries = given
        results = [(q, *ops.flat_attention(q, k, v, scale)) for q in queries]
        ctx.save_for_backward(k, v, *(x for result in results for x in result))
        ctx.scale = scale
        out = results[0][1]
        for result in results[1:]:
            out = out + result[1]
        return out

    @staticmethod
    def backward(ctx, grad):
        k, v, *saved = ctx.saved_tensors
        kinds = [saved[i : i + 4] for i in range(0, len(saved), 4)]
        if again.asked():
            inputs = ctx.scale, k, v, *(q for q, *_ in kinds)
            return again.gradients(_flat_attentions, inputs, (grad,))
        grads = [ops.flat_attention_backward(grad, q, k, v, *rest, ctx.scale) for q, *rest in kinds]
        found, dk, dv = zip(*grads, strict=True)
        return None, _sum(dk), _sum(dv), *found


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, *layout):
        tensors = q, k, v, prefix_k, prefix_v
        out, lse = ops.shared_prefix_attention(*tensors, *layout)
        starts, tiles, *ctx.options = layout
        ctx.save_for_backward(*tensors, out, lse, starts, tiles)
        return out

    @staticmethod
    def backward(ctx, grad):
        if again.asked():
            *tensors, _, _, starts, tiles = ctx.saved_tensors
            inputs = *tensors, starts, tiles, *ctx.options
            return again.gradients(reference.shared_prefix_attention, inputs, (grad,))
        grads = ops.shared_prefix_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
        return *grads, *(None for _ in range(5))


class _CausalWithPrefix(torch.autograd.Function):
    """Of the prefix's tokens too, which lie in front of the packed ones."""

    @staticmethod
    def forward(*given):
        # one parameter for all: torch.compile leaves ctx out where a call without gradients has as
        # many arguments as forward has parameters, which those with some in a list may come to
        ctx, q, k, v, prefix, packed, *options = given
        n, none = prefix.longest, k[:, :0]
        (q0, q1), (k0, k1), (v0, v1) = ((x[:, :n], x[:, n:]) for x in (q, k, v))
        out0, lse0 = ops.shared_prefix_attention(q0, k0, v0, none, none, *prefix, *options)
        out1, lse1 = ops.shared_prefix_attention(q1, k1, v1, k0, v0, *packed, *options)
        out = torch.cat((out0, out1), dim=1)
        ctx.save_for_backward(q, k, v, out, lse0, lse1)
        ctx.prefix, ctx.packed, ctx.options = prefix, packed, options
        return out

    @staticmethod
    def backward(ctx, grad):
        *tensors, lse0, lse1 = ctx.saved_tensors
        if again.asked():
            inputs = *tensors[:3], ctx.prefix, ctx.packed, *ctx.options
            return again.gradients(reference.causal_with_prefix, inputs, (grad,))
        n = ctx.prefix.longest
        front, back = ([x[:, :n] for x in (grad, *tensors)], [x[:, n:] for x in (grad, *tensors)])
        (up0, q0, k0, v0, out0), (up1, q1, k1, v1, out1) = front, back
        of_front, of_back = (*ctx.prefix, *ctx.options), (*ctx.packed, *ctx.options)
        none, backward = k0[:, :0], ops.shared_prefix_attention_backward
        dq1, dk1, dv1, dk, dv = backward(up1, q1, k1, v1, k0, v0, out1, lse1, *of_back)
        dq0, dk0, dv0, _, _ = backward(up0, q0, k0, v0, none, none, out0, lse0, *of_front)
        pairs = ((dq0, dq1), (dk0.add_(dk), dk1), (dv0.add_(dv), dv1))
        return *(torch.cat(pair, dim=1) for pair in pairs), None, None, None, None


def _sum(tensors):
    first, *others = tensors
    for x in others:
        first += x
    return first


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


def total_variation(maps):
    return _PerSample.apply("total_variation", maps)


@torch.no_grad()
def reliability_ensemble(maps, logits, temperature):
    return ops.reliability_ensemble(maps, logits, temperature)


def flat_attention(q, k, v, scale):
    return _FlatAttention.apply(scale, k, v, q)


def flat_attentions(queries, k, v, scale):
    """The sum of ``flat_attention`` over several kinds of queries."""
    return _FlatAttention.apply(scale, k, v, *queries)


def shared_prefix_attention(q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, scale):
    """Of a ``prefix.Layout``, heads and a scale."""
    args = q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, scale
    if again.transformed():
        return reference.shared_prefix_attention(*args)
    return _SharedPrefixAttention.apply(*args)


def causal_with_prefix(q, k, v, prefix, packed, heads, scale):
    """``shared_prefix_attention`` of [B, P + S, H d], the prefix's tokens and then packed ones, and
    the prefix's own causal attention: [B, P + S, H d].

    Args:
        prefix, packed: ``prefix.Layout`` of a single sequence of P tokens, and of the packed ones.
    """
    args = q, k, v, prefix, packed, heads, scale
    if again.transformed():
        return reference.causal_with_prefix(*args)
    return _CausalWithPrefix.apply(*args)

"""The losses of ABPEM and READ on logits as one operation, and its balance term alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import trace
from ..kernels import entropies_plan
from . import triton
from .cost import Cost
from .entropies import log_or_zero, principal_entropy_reference
from .registry import (
    define,
    differentiate,
    ops,
    public,
    refuse_second_derivative,
    result_like,
    wide,
)

# both return the gradient of their first result, so that the usual backward is one product
BALANCE = (
    "balance_entropy(Tensor logits, bool softmax_sum, Tensor? weight=None)"
    " -> (Tensor balance, Tensor grad)"
)
HEAD = (
    "adaptation_head(Tensor logits, int k, float entropy_weight, float balance_weight,"
    " bool softmax_sum, float eps, Tensor? weight=None)"
    " -> (Tensor total, Tensor entropy, Tensor balance, Tensor grad)"
)


def _fake_balance(logits, *_):
    return result_like(logits, ()), result_like(logits, logits.shape)


def _fake_head(logits, *_):
    total, entropy, balance = (result_like(logits, ()) for _ in range(3))
    return total, entropy, balance, result_like(logits, logits.shape)


def balance_entropy_reference(
    logits: Tensor, softmax_sum: bool, weight: Tensor | None = None
) -> Tensor:
    """Entropy of a batch's class distribution, in nats.

    Args:
        logits: [n, C]. softmax_sum: of softmax(sum of predictions), not of their mean.
        weight: [n], a sample's share; None: all equal.

    Returns:
        Scalar, at least in float32.
    """
    p = wide(logits).softmax(dim=-1)
    if weight is not None:
        p = p * weight.to(p.dtype).unsqueeze(-1)
    if softmax_sum:
        q = p.sum(dim=0).softmax(dim=0)
    else:
        q = p.sum(dim=0) / (p.shape[0] if weight is None else weight.to(p.dtype).sum())
    return -(q * log_or_zero(q)).sum()


def adaptation_head_reference(
    logits: Tensor, k: int, entropy_weight: float, balance_weight: float, softmax_sum: bool,
    eps: float, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean principal entropy and balance entropy, and entropy_weight * the one less
    balance_weight * the other.

    Args:
        logits: [n, C]. k, eps: of the principal entropy.
        softmax_sum: form of the balance term. weight: [n], a sample's share; None: all equal.

    Returns:
        Scalars (total, entropy, balance), at least in float32.
    """
    per_sample = principal_entropy_reference(logits, k, eps)
    if weight is None:
        principal = per_sample.mean()
    else:
        weight = weight.to(per_sample.dtype)
        principal = (per_sample * weight).sum() / weight.sum()
    balance = balance_entropy_reference(logits, softmax_sum, weight)
    return entropy_weight * principal - balance_weight * balance, principal, balance


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, softmax_sum, weight):
        with trace.span("balance_entropy"):
            balance, grad = ops.balance_entropy(logits, softmax_sum, weight)
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return balance

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            refuse_second_derivative("balance_entropy")
        (grad,) = ctx.saved_tensors
        return (upstream * grad).to(ctx.dtype), None, None


class _AdaptationHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, entropy_weight, balance_weight, softmax_sum, eps, weight):
        with trace.span("adaptation_head"):
            total, entropy, balance, grad = ops.adaptation_head(
                logits, k, entropy_weight, balance_weight, softmax_sum, eps, weight
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, weight, grad)
        ctx.k, ctx.softmax_sum, ctx.eps = k, softmax_sum, eps
        return total, entropy, balance

    @staticmethod
    def backward(ctx, of_total, of_entropy, of_balance):
        if torch.is_grad_enabled():
            refuse_second_derivative("adaptation_head")
        logits, weight, grad = ctx.saved_tensors
        gradient = None if of_total is None else of_total * grad
        # entropy is the total of weights (1, 0), balance that of (0, -1)
        for upstream, weights in ((of_entropy, (1.0, 0.0)), (of_balance, (0.0, -1.0))):
            if upstream is None:
                continue
            with trace.span("adaptation_head"):
                *_, grad = ops.adaptation_head(
                    logits, ctx.k, *weights, ctx.softmax_sum, ctx.eps, weight
                )
            gradient = upstream * grad if gradient is None else gradient + upstream * grad
        gradient = None if gradient is None else gradient.to(logits.dtype)
        return gradient, None, None, None, None, None, None


def balance_entropy(logits: Tensor, softmax_sum: bool, weight: Tensor | None = None) -> Tensor:
    """``functional.balance_entropy`` of checked arguments, which are those of the reference."""
    return _Balance.apply(logits, softmax_sum, weight)


def adaptation_head(
    logits: Tensor, k: int, entropy_weight: float, balance_weight: float, softmax_sum: bool,
    eps: float, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``functional.adaptation_head`` of checked arguments, which are those of the reference."""
    return _AdaptationHead.apply(
        logits, k, entropy_weight, balance_weight, softmax_sum, eps, weight
    )


def _default_balance(
    logits: Tensor, softmax_sum: bool, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    def formula(z: Tensor, share: Tensor | None) -> Tensor:
        return balance_entropy_reference(z, softmax_sum, share)

    (balance,), (grad,) = differentiate(formula, wide(logits), weight)
    return balance, grad


def _default_head(
    logits: Tensor, k: int, entropy_weight: float, balance_weight: float, softmax_sum: bool,
    eps: float, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def formula(z: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return adaptation_head_reference(
            z, k, entropy_weight, balance_weight, softmax_sum, eps, share
        )

    (total, entropy, balance), (grad,) = differentiate(formula, wide(logits), weight)
    return total, entropy, balance, grad


def _no_triton_balance(
    logits: Tensor, softmax_sum: bool, weight: Tensor | None = None
) -> str | None:
    return triton.unsuitable(logits, weight)


def _no_triton_head(
    logits: Tensor, k: int, entropy_weight: float, balance_weight: float, softmax_sum: bool,
    eps: float, weight: Tensor | None = None,
) -> str | None:  # fmt: skip
    return triton.unsuitable(logits, weight)


def _cost(logits: Tensor, *_: object) -> Cost:
    """Rows, then columns; rows that are too long for a program are gone over once more."""
    return Cost(launches=2 if logits.shape[1] <= entropies_plan.ROW_CLASSES else 3,
                workspace=logits.numel() * 8)  # fmt: skip


define(
    BALANCE,
    _fake_balance,
    _default_balance,
    cpp=True,
    kernels="adaptation_head",
    no_triton=_no_triton_balance,
    cost=_cost,
)
define(
    HEAD,
    _fake_head,
    _default_head,
    cpp=True,
    kernels="adaptation_head",
    no_triton=_no_triton_head,
    cost=_cost,
)
public("balance_entropy", balance_entropy, balance_entropy_reference)
public("adaptation_head", adaptation_head, adaptation_head_reference)

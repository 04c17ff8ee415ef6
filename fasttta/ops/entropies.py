"""Entropies of softmax(logits), row by row: of all classes, and of the k most probable ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import trace
from ..kernels import entropies_plan as plan
from . import triton
from .cost import Cost
from .registry import (
    define,
    differentiate,
    ops,
    public,
    refuse_second_derivative,
    result_like,
    wide,
)

ENTROPY = "entropy(Tensor logits) -> Tensor"
ENTROPY_BACKWARD = "entropy_backward(Tensor grad, Tensor logits) -> Tensor"
PRINCIPAL = "principal_entropy(Tensor logits, int k, float eps) -> Tensor"
PRINCIPAL_BACKWARD = (
    "principal_entropy_backward(Tensor grad, Tensor logits, int k, float eps) -> Tensor"
)


def _fake(logits, *_):
    return result_like(logits, logits.shape[:-1])


def _fake_backward(grad, logits, *_):
    return logits.new_empty(logits.shape)


def log_or_zero(p: Tensor) -> Tensor:
    """ln p of probabilities, 0 (value and gradient) where p is 0: p ln p ends there. nan stays."""
    return torch.where(p == 0, 0, torch.log(torch.where(p == 0, 1, p)))


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction of each sample's views, [B, N, C] -> [B], through log-sum-exp
    of log-probabilities, as in TPT (Shu et al., NeurIPS 2022)."""
    log_mean = logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    log_mean = log_mean.clamp_min(torch.finfo(log_mean.dtype).min)
    return -(log_mean.exp() * log_mean).sum(-1)


def entropy_reference(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of logits [n, C]: [n], at least in float32."""
    log_p = wide(logits).log_softmax(dim=-1)
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0, log_p)).sum(dim=-1)


def principal_entropy_reference(logits: Tensor, k: int, eps: float) -> Tensor:
    """-sum p ln(p + eps) in nats over the k largest of logits [n, C]: [n], at least in float32.

    Of equal logits the lowest index is selected first.
    """
    logits = wide(logits)
    index = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    p = logits.softmax(dim=-1).gather(-1, index)
    return -(p * log_or_zero(p + eps)).sum(dim=-1)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        with trace.span("entropy"):
            return ops.entropy(logits)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("entropy")
        (logits,) = ctx.saved_tensors
        with trace.span("entropy_backward"):
            return ops.entropy_backward(grad, logits)


class _PrincipalEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, eps):
        ctx.save_for_backward(logits)
        ctx.k, ctx.eps = k, eps
        with trace.span("principal_entropy"):
            return ops.principal_entropy(logits, k, eps)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("principal_entropy")
        (logits,) = ctx.saved_tensors
        with trace.span("principal_entropy_backward"):
            return ops.principal_entropy_backward(grad, logits, ctx.k, ctx.eps), None, None


def entropy(logits: Tensor) -> Tensor:
    """``functional.entropy`` of checked logits [n, C]: [n]."""
    return _Entropy.apply(logits)


def principal_entropy(logits: Tensor, k: int, eps: float) -> Tensor:
    """``functional.principal_entropy`` of checked logits [n, C]: [n]."""
    return _PrincipalEntropy.apply(logits, k, eps)


def _default_entropy_backward(grad: Tensor, logits: Tensor) -> Tensor:
    _, (gradient,) = differentiate(entropy_reference, logits, upstream=grad)
    return gradient


def _default_principal_backward(grad: Tensor, logits: Tensor, k: int, eps: float) -> Tensor:
    def formula(z: Tensor) -> Tensor:
        return principal_entropy_reference(z, k, eps)

    _, (gradient,) = differentiate(formula, logits, upstream=grad)
    return gradient


def _no_triton(logits: Tensor, k: int = 1, eps: float = 0.0) -> str | None:
    return triton.unsuitable(logits)


def _no_triton_backward(grad: Tensor, logits: Tensor, k: int = 1, eps: float = 0.0) -> str | None:
    return triton.unsuitable(grad, logits)


def _cost(logits: Tensor, k: int = 1, eps: float = 0.0) -> Cost:
    return Cost()


def _cost_backward(grad: Tensor, logits: Tensor, k: int = 1, eps: float = 0.0) -> Cost:
    if logits.shape[1] <= plan.ROW_CLASSES:
        return Cost()
    return Cost(launches=2, workspace=logits.nbytes // 2)  # rows are read again


define(
    ENTROPY,
    _fake,
    entropy_reference,
    cpp=True,
    kernels="entropies",
    no_triton=_no_triton,
    cost=_cost,
)
define(
    ENTROPY_BACKWARD,
    _fake_backward,
    _default_entropy_backward,
    cpp=True,
    kernels="entropies",
    no_triton=_no_triton_backward,
    cost=_cost_backward,
)
define(
    PRINCIPAL,
    _fake,
    principal_entropy_reference,
    cpp=True,
    kernels="entropies",
    no_triton=_no_triton,
    cost=_cost,
)
define(
    PRINCIPAL_BACKWARD,
    _fake_backward,
    _default_principal_backward,
    cpp=True,
    kernels="entropies",
    no_triton=_no_triton_backward,
    cost=_cost_backward,
)
public("entropy", entropy, entropy_reference)
public("principal_entropy", principal_entropy, principal_entropy_reference)

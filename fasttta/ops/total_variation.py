"""Total variation of maps, and the ensemble of predictions that it weighs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import trace
from ..kernels import total_variation_plan as plan
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

VARIATION = "total_variation(Tensor maps) -> Tensor"
VARIATION_BACKWARD = "total_variation_backward(Tensor grad, Tensor maps) -> Tensor"
ENSEMBLE = (
    "reliability_ensemble(Tensor maps, Tensor logits, float temperature)"
    " -> (Tensor probability, Tensor tv, Tensor weights)"
)


def _fake(maps):
    return result_like(maps, maps.shape[:1])


def _fake_backward(grad, maps):
    return maps.new_empty(maps.shape)


def _fake_ensemble(maps, logits, temperature):
    return result_like(logits, logits.shape[1:]), _fake(maps), _fake(maps)


def total_variation_reference(maps: Tensor) -> Tensor:
    """Sum of the differences of neighbours, anisotropic, of maps [N, H, W]: [N]."""
    x = wide(maps)
    return x.diff(dim=1).abs().sum((1, 2)) + x.diff(dim=2).abs().sum((1, 2))


def reliability_weights(tv: Tensor, temperature: float) -> Tensor:
    """softmax(-tv / temperature) of tv [..., N] over its last axis, at least in float32."""
    return (wide(tv) / -temperature).softmax(dim=-1)


@torch.no_grad()
def reliability_ensemble_reference(
    maps: Tensor, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of N views, weighted by their maps' total variation, without gradient.

    Args:
        maps: [N, H, W]. logits: [N, C]. temperature: of ``reliability_weights``.

    Returns:
        (probability [C], tv [N], weights [N]), at least in float32.
    """
    tv = total_variation_reference(maps)
    weights = reliability_weights(tv, temperature)
    p = wide(logits).softmax(dim=-1)
    return weights.to(p.dtype) @ p, tv, weights


class _TotalVariation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps):
        ctx.save_for_backward(maps)
        with trace.span("total_variation"):
            return ops.total_variation(maps)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("total_variation")
        (maps,) = ctx.saved_tensors
        with trace.span("total_variation_backward"):
            return ops.total_variation_backward(grad, maps)


def total_variation(maps: Tensor) -> Tensor:
    """``functional.total_variation`` of checked maps [N, H, W]: [N]."""
    return _TotalVariation.apply(maps)


@torch.no_grad()
def reliability_ensemble(
    maps: Tensor, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``functional.reliability_ensemble`` of checked arguments, those of the reference."""
    with trace.span("reliability_ensemble"):
        return ops.reliability_ensemble(maps, logits, temperature)


def _default_backward(grad: Tensor, maps: Tensor) -> Tensor:
    _, (gradient,) = differentiate(total_variation_reference, maps, upstream=grad)
    return gradient


def _no_triton(maps: Tensor) -> str | None:
    return triton.unsuitable(maps)


def _no_triton_backward(grad: Tensor, maps: Tensor) -> str | None:
    return triton.unsuitable(grad, maps)


def _no_triton_ensemble(maps: Tensor, logits: Tensor, temperature: float) -> str | None:
    return triton.unsuitable(maps, logits)


def _cost(maps: Tensor) -> Cost:
    return Cost(launches=2 if plan.strips(*maps.shape).grid[0] > 1 else 1)


def _cost_backward(grad: Tensor, maps: Tensor) -> Cost:
    return Cost()


def _cost_ensemble(maps: Tensor, logits: Tensor, temperature: float) -> Cost:
    return Cost(launches=1 if plan.small_ensemble(*maps.shape, logits.shape[1]) else 2)


define(
    VARIATION,
    _fake,
    total_variation_reference,
    cpp=True,
    kernels="total_variation",
    no_triton=_no_triton,
    cost=_cost,
)
define(
    VARIATION_BACKWARD,
    _fake_backward,
    _default_backward,
    cpp=True,
    kernels="total_variation",
    no_triton=_no_triton_backward,
    cost=_cost_backward,
)
define(
    ENSEMBLE,
    _fake_ensemble,
    reliability_ensemble_reference,
    cpp=True,
    kernels="total_variation",
    no_triton=_no_triton_ensemble,
    cost=_cost_ensemble,
)
public("total_variation", total_variation, total_variation_reference)
public("reliability_ensemble", reliability_ensemble, reliability_ensemble_reference)
public("reliability_weights", reliability_weights, reliability_weights)

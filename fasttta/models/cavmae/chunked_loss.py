"""Losses whose gradients are computed at once, so that what these need is not kept for later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import again

# rows of the batch, shared inputs, batched inputs of these rows -> 0-d loss, outputs [rows, ...]
Part = Callable[[slice, list[Tensor], list[Tensor]], tuple[Tensor, tuple[Tensor, ...]]]


def staged(
    part: Part, shared: Sequence[Tensor], batched: Sequence[Tensor], batch: int, size: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum of a loss over portions of a batch: each is gone, gradients taken, before the next.

    Exact: the gradients are those of autograd on the sum. A second derivative is not defined.

    Args:
        part: the loss of a portion, from inputs with or without gradient as the callers' are.
        shared: inputs that all portions take; batched: [B, ...] each, of which it gets its rows.
        batch, size: B, and how many of these at a time.

    Returns:
        The loss, differentiable with respect to the inputs, and outputs [B, ...] without gradient.
    """
    inputs = [*shared, *batched]
    wanted = [i for i, x in enumerate(inputs) if torch.is_grad_enabled() and x.requires_grad]
    total: Any = 0
    outputs: list[list[Tensor]] = []
    grads: list[Tensor | None] = [None] * len(inputs)
    for start in range(0, batch, size):
        rows = slice(start, min(start + size, batch))
        leaves = [x.detach() for x in shared] + [x.detach()[rows] for x in batched]
        for i in wanted:
            leaves[i].requires_grad_(True)
        value, found = part(rows, leaves[: len(shared)], leaves[len(shared) :])
        if wanted:
            with torch.no_grad():
                parts = torch.autograd.grad(
                    value, [leaves[i] for i in wanted], allow_unused=True, materialize_grads=True
                )
                for i, grad in zip(wanted, parts, strict=True):
                    grads[i] = _gathered(grads[i], grad, i < len(shared), rows, inputs[i])
        total = total + value.detach()
        outputs.append([x.detach() for x in found])
    whole = tuple(torch.cat(x) if len(outputs) > 1 else x[0] for x in zip(*outputs, strict=True))
    if not wanted:
        return total, whole
    return _Known.apply(total, [grads[i] for i in wanted], *(inputs[i] for i in wanted)), whole


def _gathered(held: Tensor | None, grad: Tensor, whole: bool, rows: slice, like: Tensor) -> Tensor:
    if whole:
        return grad if held is None else held + grad  # autograd may give one tensor to several
    if len(grad) == len(like):
        return grad
    held = torch.empty_like(like, memory_format=torch.contiguous_format) if held is None else held
    held[rows] = grad
    return held


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx, value: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx, along: Tensor):
        again.refuse("a gradient computed in portions")
        return None, None, *(along * grad for grad in ctx.grads)

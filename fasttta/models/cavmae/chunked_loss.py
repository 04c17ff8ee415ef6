"""A loss over a batch whose gradients are computed chunk by chunk, to save memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.registry import refuse_second_derivative

# rows of the batch, shared inputs, batched inputs of these rows -> 0-d loss, outputs [rows, ...]
Part = Callable[[slice, list[Tensor], list[Tensor]], tuple[Tensor, tuple[Tensor, ...]]]


def chunked_loss(
    part: Part, shared: Sequence[Tensor], batched: Sequence[Tensor], batch: int, size: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sums a loss over chunks of a batch, and takes its gradients at once.

    The graph of each chunk is freed before that of the next one is built. Exact: the gradients are
    those of autograd on the sum. There is no second derivative.

    Args:
        part: the loss of a chunk; its inputs have a gradient where the caller's have one.
        shared: inputs that every chunk takes.
        batched: [B, ...] each; a chunk gets its rows.
        batch: B.
        size: samples in a chunk.

    Returns:
        The 0-d loss, differentiable with respect to the inputs, and the outputs [B, ...] of
        ``part``, without gradient.
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
        value, chunk_outputs = part(rows, leaves[: len(shared)], leaves[len(shared) :])
        if wanted:
            with torch.no_grad():
                chunk_grads = torch.autograd.grad(
                    value, [leaves[i] for i in wanted], allow_unused=True, materialize_grads=True
                )
                for i, grad in zip(wanted, chunk_grads, strict=True):
                    grads[i] = _add_gradient(grads[i], grad, i < len(shared), rows, inputs[i])
        total = total + value.detach()
        outputs.append([x.detach() for x in chunk_outputs])
    joined = tuple(torch.cat(x) if len(outputs) > 1 else x[0] for x in zip(*outputs, strict=True))
    if not wanted:
        return total, joined
    loss = _LossWithGradients.apply(total, [grads[i] for i in wanted], *(inputs[i] for i in wanted))
    return loss, joined


def _add_gradient(
    held: Tensor | None, grad: Tensor, is_shared: bool, rows: slice, like: Tensor
) -> Tensor:
    """The gradient of an input so far, with that of a chunk: added, or written to its rows."""
    if is_shared:
        return grad if held is None else held + grad  # autograd may give one tensor to several
    if len(grad) == len(like):
        return grad
    held = torch.empty_like(like, memory_format=torch.contiguous_format) if held is None else held
    held[rows] = grad
    return held


class _LossWithGradients(torch.autograd.Function):
    """A value whose gradients with respect to its inputs have been computed before."""

    @staticmethod
    def forward(ctx, value: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx, along: Tensor):
        if torch.is_grad_enabled():
            refuse_second_derivative("a gradient computed in portions")
        return None, None, *(along * grad for grad in ctx.grads)

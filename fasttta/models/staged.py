"""Losses whose gradients are computed at once, so that what these need is not kept for later."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import workers

# rows of the batch, shared inputs, batched inputs of these rows -> 0-d loss, outputs [rows, ...]
Part = Callable[[slice, list[Tensor], list[Tensor]], tuple[Tensor, tuple[Tensor, ...]]]


def staged(
    part: Part,
    shared: Sequence[Tensor],
    batched: Sequence[Tensor],
    batch: int,
    size: int,
    spread: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum of a loss over portions of a batch: each is gone, gradients taken, before the next.

    Exact: the gradients are those of autograd on the sum. A second derivative is not defined.

    Args:
        part: the loss of a portion, from inputs with or without gradient as the callers' are.
        shared: inputs that all portions take; batched: [B, ...] each, of which it gets its rows.
        batch, size: B, and how many of these at a time.
        spread: several portions at a time, each on a thread (workers.py).

    Returns:
        The loss, differentiable with respect to the inputs, and outputs [B, ...] without gradient.
    """
    inputs = [*shared, *batched]
    wanted = [i for i, x in enumerate(inputs) if torch.is_grad_enabled() and x.requires_grad]

    def portion(rows: slice) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        leaves = [x.detach() for x in shared] + [x.detach()[rows] for x in batched]
        for i in wanted:
            leaves[i].requires_grad_(True)
        value, found = part(rows, leaves[: len(shared)], leaves[len(shared) :])
        parts: Sequence[Tensor] = ()
        if wanted:
            with torch.no_grad():
                parts = torch.autograd.grad(
                    value, [leaves[i] for i in wanted], allow_unused=True, materialize_grads=True
                )
        return value.detach(), [x.detach() for x in found], list(parts)

    portions = [slice(i, min(i + size, batch)) for i in range(0, batch, size)]
    tasks = [functools.partial(portion, rows) for rows in portions]
    total: Any = 0
    outputs, grads = [], [None] * len(inputs)
    results = workers.run(tasks) if spread else (task() for task in tasks)
    for rows, (value, found, parts) in zip(portions, results, strict=True):
        for i, grad in zip(wanted, parts, strict=True):
            grads[i] = _gathered(grads[i], grad, i < len(shared), rows, inputs[i])
        total = total + value
        outputs.append(found)
    outputs = tuple(torch.cat(x) if len(outputs) > 1 else x[0] for x in zip(*outputs, strict=True))
    if not wanted:
        return total, outputs
    return _Known.apply(total, [grads[i] for i in wanted], *(inputs[i] for i in wanted)), outputs


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
    @torch.autograd.function.once_differentiable
    def backward(ctx, along: Tensor):
        return None, None, *(along * grad for grad in ctx.grads)


def apart(
    parts: Sequence[Callable[..., tuple[Tensor, ...]]], inputs: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, ...]]:
    """What parts make of their inputs, computed side by side (workers.py), and so their gradients.

    Args:
        parts: tensors -> tensors each, all as many; inputs: of each part.

    Returns:
        Each part's outputs, once differentiable.
    """
    counts = [len(x) for x in inputs]
    flat = _Apart.apply(parts, counts, *(x for own in inputs for x in own))
    size = len(flat) // len(parts)
    return [flat[i : i + size] for i in range(0, len(flat), size)]


class _Apart(torch.autograd.Function):
    """Graphs of parts, each walked back on the thread that takes it."""

    @staticmethod
    def forward(ctx, parts, counts: list[int], *inputs: Tensor) -> tuple[Tensor, ...]:
        ends = itertools.accumulate(counts)
        given = [inputs[end - n : end] for n, end in zip(counts, ends, strict=True)]
        leaves = [[x.detach().requires_grad_(x.requires_grad) for x in own] for own in given]
        with torch.enable_grad():
            tasks = [functools.partial(f, *own) for f, own in zip(parts, leaves, strict=True)]
            outputs = workers.run(tasks)
        ctx.graphs = list(zip(leaves, outputs, strict=True))
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for own in outputs for x in own)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None):
        graphs, ctx.graphs = ctx.graphs, None
        size = len(grads) // len(graphs)

        def walk(i: int) -> list[Tensor | None]:
            leaves, outputs = graphs[i]
            graphs[i] = None  # gone when it has been walked
            pairs = zip(outputs, grads[i * size : (i + 1) * size], strict=True)
            pairs = [(x, grad) for x, grad in pairs if grad is not None and x.requires_grad]
            wanted = [x for x in leaves if x.requires_grad]
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if pairs and wanted:
                ends, along = zip(*pairs, strict=True)
                found = torch.autograd.grad(ends, wanted, along, allow_unused=True)
            each = iter(found)
            return [next(each) if x.requires_grad else None for x in leaves]

        tasks = [functools.partial(walk, i) for i in range(len(graphs))]
        return None, None, *(grad for own in workers.run(tasks) for grad in own)

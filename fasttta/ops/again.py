"""Gradients of the operations' gradients: those of their plain formulas, by autograd.

A Function's own backward is made for being evaluated. Where its result is to be differentiated
(``create_graph``), a constant would be silently wrong as soon as there is another way from the loss
to the inputs, such as a residual, on which PyTorch's ``once_differentiable`` does not raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def asked() -> bool:
    """In a backward: whether its result is to be differentiated."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def transformed() -> bool:
    """Whether torch.func or forward mode differentiates, which Functions are not made for."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def gradients(
    formula: Callable, inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """One for each of the formula's inputs, differentiable.

    Args:
        grads: of its outputs; None: not differentiated.
    """
    outputs = formula(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[1] is not None]
    wanted = [n for n, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    found = torch.autograd.grad(
        [x.to(g) for x, g in pairs], [inputs[n] for n in wanted], [g for _, g in pairs],
        create_graph=True, allow_unused=True,
    )  # fmt: skip
    by_input = dict(zip(wanted, found, strict=True))
    return tuple(by_input.get(n) for n in range(len(inputs)))


def refuse(what: str) -> None:
    """Says in a backward that has no second derivative that it has none."""
    if asked():
        raise RuntimeError(f"{what} has no second derivative (create_graph=True)")

"""Compares the model that methods run with the user's module: values and gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..files.weights import STAND_INS
from ..models.specified.outputs import alike, described, tensors
from .refusals import hook_advice

_CHECKPOINTING = (
    "run fasttta.adapt with gradient checkpointing off (model.gradient_checkpointing_disable(), "
    "or the flag or wrapper of that model); only training needs it"
)
_REENTRANT = "None of the inputs have requires_grad"


def gradients_of(run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a fixed weighted sum of logits; None for leaves that they do not reach.

    Raises:
        ValueError: the forward uses gradient checkpointing that no gradient passes.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_REENTRANT)
        try:
            logits = run()
            if not isinstance(logits, Tensor) or not logits.requires_grad:
                return [None] * len(leaves)
            index = torch.arange(logits.numel(), device=logits.device, dtype=logits.dtype)
            weights = (1 + index).sin().view_as(logits)
            total = (logits * weights).sum()
            return list(torch.autograd.grad(total, leaves, allow_unused=True))
        except (RuntimeError, UserWarning) as error:
            if not any(word in str(error) for word in ("checkpoint", _REENTRANT)):
                raise
            reason = str(error).split("\n")[0].split(". ")[0]
            raise ValueError(
                f"its forward uses gradient checkpointing through which no gradient can be taken "
                f"here ({reason}); {_CHECKPOINTING}"
            ) from error


def check_gradients(
    family: str, names: Iterable[str], theirs: Sequence[Tensor | None],
    ours: Sequence[Tensor | None],    tolerance: float, module: nn.Module, needed: bool,
) -> None:  # fmt: skip
    """Compares gradients of the tuned tensors.

    Args:
        family: of the model, for messages.
        theirs: by plain autograd on the user's module; ours: on the model that methods run.
        tolerance: of the largest gradient.
        needed: every tensor must have one: the method tunes projections, which are all used.

    Raises:
        ValueError: they differ, or a needed one is missing.
    """
    if any(type(x) in STAND_INS for x in ours):
        return  # they have no values
    names = list(names)
    if all(a is None for a in theirs) and any(b is not None for b in ours):
        return  # a forward under torch.no_grad(); its values were compared already
    if all(b is None for b in ours):
        raise ValueError(
            f"{family}: its logits depend on none of the tuned tensors ({', '.join(names[:3])}, "
            "...): does its forward run under torch.no_grad(), detach what the fusion computes, or "
            f"checkpoint with use_reentrant=True? If so, {_CHECKPOINTING}"
        )
    largest = max(a.abs().max().item() for a in theirs if a is not None)
    for name, a, b in zip(names, theirs, ours, strict=True):
        if a is None and b is None:
            if needed:
                raise ValueError(
                    f"{family}: the logits do not depend on {name}, which this method tunes: is "
                    "the layer replaced by one that computes with other weights?"
                )
            continue
        if a is None or b is None:
            present = a if b is None else b
            assert present is not None  # not both are missing
            a, b = (torch.zeros_like(present) if x is None else x for x in (a, b))
        error = (a - b).abs().max().item()
        if not error <= tolerance * max(largest, 1e-12):
            raise ValueError(
                f"{family}: the gradient of {name} differs from that of plain autograd on the "
                f"module's own forward by {error:.1e} (the largest is {largest:.1e}): is there "
                "gradient checkpointing around the encoders, or do backward hooks change "
                f"gradients? In the first case {_CHECKPOINTING}.{hook_advice(module)}"
            )


def check_returned(family: str, theirs: object, ours: object, tolerance: float) -> None:
    """Compares what the module returns besides logits: hidden states, attention maps.

    Raises:
        ValueError: tensors are missing or differ.
    """
    pairs = list(tensors(theirs)), list(tensors(ours))
    same = len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(*pairs, strict=True)
    )
    if not same or (not alike(theirs, ours) and type(theirs) is not type(ours)):
        raise ValueError(
            f"{family}: its own forward returns {described(theirs)}, cut as the ModelSpec says "
            f"{described(ours)}: are results recorded by hooks that others have registered?"
        )
    for a, b in zip(*pairs, strict=True):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                raise ValueError(f"{family}: an integer tensor that it returns differs")
            continue
        bound = tolerance * max(1.0, a[torch.isfinite(a)].abs().max().item() if a.numel() else 1.0)
        if not torch.allclose(a, b, rtol=0, atol=bound, equal_nan=True):
            raise ValueError(
                f"{family}: what it returns besides logits ({described(theirs)}) differs from its "
                "own forward's: is there something random or stateful in it?"
            )

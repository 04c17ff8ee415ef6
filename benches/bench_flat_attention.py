"""One softmax over all pairs of classes: maps in memory, the best plain form, ours."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fasttta import functional as F

HEADS, CHANNELS = 8, 64  # RAda's head on CLIP ViT-B/16
# classes, images, whether they share their queries (those of the text do)
CASES = {
    "1000 classes": (1000, 2, False),
    "1000 classes, shared queries": (1000, 2, True),
    "100 classes": (100, 32, False),
}


def row_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Row softmax, each row times its share of all exponentials; one K x K map, autograd."""
    scores = (k.shape[3] ** -0.5 * q) @ k.transpose(2, 3)
    share = scores.logsumexp(3).softmax(2)
    return k.shape[2] * share.unsqueeze(3) * (scores.softmax(3) @ v)


IMPLEMENTATIONS = {
    "reference": functools.partial(F.flat_attention, backend="reference"),
    "plain": row_softmax,
    "default": F.flat_attention,
}


def operation_of(implementation: str):
    """The operation, by name."""
    name = {"compiled reference": "reference", "compiled": "plain"}.get(implementation)
    if name is None:
        return IMPLEMENTATIONS[implementation]
    torch._dynamo.reset()
    return torch.compile(IMPLEMENTATIONS[name], dynamic=False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    "implementation",
    [
        "plain",
        pytest.param("compiled reference", marks=pytest.mark.compiled),
        pytest.param("compiled", marks=pytest.mark.compiled),
        "default",
    ],
)
def bench_flat_attention(implementation, direction, case, device, full, threads, measure):
    classes, images, shared = CASES[case]
    classes, images = (classes, images) if full else (13, 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, images, HEADS, classes, CHANNELS, generator=generator).to(device)
    inputs = tuple(x.clone() for x in (q[:1] if shared else q, k, v))
    backward = direction == "forward+backward"
    along = torch.randn(k.shape, generator=generator).to(device) / classes
    operation, official = operation_of(implementation), IMPLEMENTATIONS["reference"]

    def outputs(of, inputs):
        out = of(*inputs)
        if not backward:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, inputs, along.to(out))

    exact = [x.double().requires_grad_(backward) for x in inputs]
    for x in inputs:
        x.requires_grad_(backward)
    pairs = 2 * images * HEADS * classes**2 * CHANNELS  # FLOP of a product of all pairs
    moved = sum(x.numel() for x in inputs)
    measure(
        functools.partial(outputs, operation, inputs),
        functools.partial(outputs, official, inputs),
        exact=outputs(official, exact),
        memory=True,
        threads=threads,
        headline=False,
        shape="x".join(map(str, k.shape)),
        dtype=k.dtype,
        # q, k, v read and the result written; backward reads them and its gradient, writes three
        bytes=4 * (moved + k.numel() + (2 * moved + k.numel() if backward else 0)),
        flops=(7 if backward else 2) * pairs,
    )

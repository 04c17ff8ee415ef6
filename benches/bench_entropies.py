"""Entropies of predictions, of each sample and of their mean."""

from __future__ import annotations

import pytest
import torch

from fasttta import functional as F


def principal(logits: torch.Tensor, backend: str | None) -> torch.Tensor:
    return F.principal_entropy(logits, max(1, logits.shape[1] // 11), backend=backend)


OPERATIONS = {
    "entropy": F.entropy,
    "principal_entropy": principal,
    "marginal_entropy": F.marginal_entropy,
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("batch", "classes"), [(64, 1000), (128, 309)])
@pytest.mark.parametrize("operation", OPERATIONS)
def bench_entropies(operation, batch, classes, direction, device, full, threads, measure):
    if not full:
        batch, classes = 3, 11
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(batch, classes, generator=generator)).to(device).requires_grad_()

    def outputs(backend, logits):
        with torch.set_grad_enabled(direction != "forward"):
            value = OPERATIONS[operation](logits, backend=backend)
        if direction == "forward":
            return (value,)
        return value, *torch.autograd.grad(value.sum(), logits)

    measure(
        lambda: outputs(None, logits),
        lambda: outputs("reference", logits),
        exact=outputs("reference", logits.detach().double().requires_grad_()),
        memory=True,
        threads=threads,
        headline=False,
        dtype=logits.dtype,
        bytes=(1 if direction == "forward" else 3) * logits.nbytes,
    )

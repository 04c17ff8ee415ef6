"""The loss on logits, forward and backward: principal entropy and class balance."""

from __future__ import annotations

import pytest
import torch

from fasttta import functional as F


@pytest.mark.parametrize("implementation", ["reference", "default"])
@pytest.mark.parametrize(("batch", "classes", "k"), [(32, 50, 8), (128, 309, 28), (64, 1000, 30)])
def bench_adaptation_head(batch, classes, k, implementation, device, full, measure):
    if not full:
        batch, classes, k = 3, 11, 4
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(batch, classes, generator=generator)).to(device).requires_grad_()

    def differentiated(logits, backend):
        total, entropy, balance = F.adaptation_head(logits, k, backend=backend)
        return total, entropy, balance, *torch.autograd.grad(total, logits)

    def reference():
        return differentiated(logits, "reference")

    def default():
        return differentiated(logits, None)

    measure(
        default if implementation == "default" else reference,
        reference if implementation == "default" else None,
        exact=differentiated(logits.detach().double().requires_grad_(), "reference"),
        rounds=200,
        warmup=20,
        memory=True,
        threads=1,
        dtype=logits.dtype,
        bytes=3 * logits.nbytes,  # logits read forward and backward, gradient written
    )

"""The loss on logits: principal entropy and class balance, with their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttta import functional as F

IMPLEMENTATIONS = [
    "plain",
    pytest.param("compiled", marks=pytest.mark.compiled),
    "default",
]
HEADLINE = (128, 309)


def plain(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """In PyTorch calls, with topk in place of the stable sort (the order of ties is open)."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    top = p.topk(k, dim=-1).values
    entropy = -(top * (top + 1e-6).log()).sum(-1).mean()
    mean = p.mean(0)
    balance = -(mean * mean.log()).sum()
    return entropy - balance, entropy, balance


def loss_of(implementation: str):
    if implementation == "plain":
        return plain
    if implementation == "compiled":
        torch._dynamo.reset()
        return torch.compile(plain, dynamic=False)
    backend = "reference" if implementation == "reference" else None
    return lambda logits, k: F.adaptation_head(logits, k, backend=backend)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("classes", [50, 309, 1000])
@pytest.mark.parametrize("batch", [8, 32, 128])
def bench_adaptation_head(
    batch, classes, direction, implementation, device, full, threads, measure
):
    if implementation == "compiled" and (batch, classes) != HEADLINE:
        pytest.skip("compiled at one size")
    headline = (batch, classes) == HEADLINE and direction != "forward"
    if not full:
        batch, classes = 3, 11
    k = max(1, classes // 11)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(batch, classes, generator=generator)).to(device).requires_grad_()

    def outputs(loss, logits):
        with torch.set_grad_enabled(direction != "forward"):
            total, entropy, balance = loss(logits, k)
        if direction == "forward":
            return total, entropy, balance
        return total, entropy, balance, *torch.autograd.grad(total, logits)

    ours, official = loss_of(implementation), loss_of("reference")
    measure(
        lambda: outputs(ours, logits),
        lambda: outputs(official, logits),
        exact=outputs(official, logits.detach().double().requires_grad_()),
        memory=True,
        threads=threads,
        headline=headline and implementation == "default",
        dtype=logits.dtype,
        # logits read; with the gradient read again (it needs the sums over samples) and written
        bytes=(1 if direction == "forward" else 3) * logits.nbytes,
    )

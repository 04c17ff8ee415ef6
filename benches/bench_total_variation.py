"""Total variation of attention maps, and the ensemble of views weighted by it."""

from __future__ import annotations

import pytest
import torch

from fasttta import functional as F

IMPLEMENTATIONS = [
    pytest.param("compiled", marks=pytest.mark.compiled),
    "default",
]


def _maps(side: int, device: torch.device, full: bool) -> torch.Tensor:
    """64 views at the patch grid of ViT-B/16 (14) or at pixels (224); a few ties."""
    shape = (64, side, side) if full else (3, 5, 7)
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(side))
    return torch.where(maps < 0.1, 0, maps).to(device)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("side", [14, 224])
def bench_total_variation(side, direction, implementation, device, full, threads, measure):
    maps = _maps(side, device, full).requires_grad_()
    up = torch.linspace(0.5, 1, len(maps), device=device)

    def variation(of):
        backend = "reference" if of in ("reference", "compiled") else None
        call = lambda maps: F.total_variation(maps, backend=backend)  # noqa: E731
        if of == "compiled":
            torch._dynamo.reset()
            call = torch.compile(call, dynamic=False)

        def outputs(maps):
            with torch.set_grad_enabled(direction != "forward"):
                tv = call(maps)
            if direction == "forward":
                return (tv,)
            return tv, *torch.autograd.grad(tv, maps, up.to(tv))

        return outputs

    ours, official = variation(implementation), variation("reference")
    measure(
        lambda: ours(maps),
        lambda: official(maps),
        exact=official(maps.detach().double().requires_grad_()),
        memory=True,
        threads=threads,
        headline=(side, direction, implementation) == (224, "forward+backward", "default"),
        dtype=maps.dtype,
        # read; for the gradient read again, and the gradient written
        bytes=(1 if direction == "forward" else 3) * maps.nbytes,
    )


@pytest.mark.parametrize("side", [14, 224])
def bench_reliability_ensemble(side, device, full, threads, measure):
    maps = _maps(side, device, full)
    logits = torch.randn(
        len(maps), 1000 if full else 11, generator=torch.Generator().manual_seed(1)
    )
    logits = (3 * logits).to(device)
    # weights that are neither equal nor one view's alone
    temperature = 0.5 * float(F.total_variation(maps).std())

    def outputs(backend, maps, logits):
        return F.reliability_ensemble(maps, logits, temperature, backend=backend)

    measure(
        lambda: outputs(None, maps, logits),
        lambda: outputs("reference", maps, logits),
        exact=outputs("reference", maps.double(), logits.double()),
        memory=True,
        threads=threads,
        headline=False,
        dtype=maps.dtype,
        bytes=maps.nbytes + logits.nbytes,
    )

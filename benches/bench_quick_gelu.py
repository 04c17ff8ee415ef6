"""CLIP's activation and its gradient: PyTorch's calls and ours. On a GPU PyTorch's serve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttta.ops.quick_gelu import quick_gelu

SHAPE = (1000, 8, 2048)  # classes, tokens and hidden channels of the text tower of ViT-B


def formula(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)"""
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel for CPUs")
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_quick_gelu(direction, full, threads, measure):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(SHAPE if full else (3, 2, 5), generator=generator)
    upstream = torch.randn(x.shape, generator=generator)
    backward = direction == "forward+backward"
    x.requires_grad_(backward)

    def outputs(of, x, upstream):
        y = of(x)
        return (y.detach(), *torch.autograd.grad(y, x, upstream)) if backward else (y,)

    measure(
        lambda: outputs(quick_gelu, x, upstream),
        lambda: outputs(formula, x, upstream),
        exact=outputs(
            formula, x[:2].detach().double().requires_grad_(backward), upstream[:2].double()
        ),
        memory=True,
        threads=threads,
        headline=False,
        shape="x".join(map(str, x.shape)),
        dtype=x.dtype,
        # x read and y written; backward reads x and the gradient and writes one
        bytes=(5 if backward else 2) * x.nbytes,
    )

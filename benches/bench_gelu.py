"""GELU and QuickGELU and their gradients: PyTorch's calls and ours, one pass over memory each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttta.ops.gelu import gelu
from fasttta.ops.quick_gelu import quick_gelu

# hidden tokens of the text tower of ViT-B (1000 classes of 8 tokens) and of an encoder of ViT-B
SHAPES = {"quick_gelu": (1000, 8, 2048), "gelu": (32, 708, 3072)}


def formula(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)"""
    return x * torch.sigmoid(1.702 * x)


FUNCTIONS = {"quick_gelu": (quick_gelu, formula), "gelu": (gelu, F.gelu)}


def _bench(name: str, direction: str, implementation: str, device, full, threads, measure) -> None:
    ours, plain = FUNCTIONS[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(SHAPES[name] if full else (3, 2, 5), generator=generator)
    x, upstream = x.to(device, dtype), torch.randn(x.shape, generator=generator).to(device, dtype)
    backward = direction == "forward+backward"
    x.requires_grad_(backward)
    if implementation == "compiled":
        torch._dynamo.reset()
        ours = torch.compile(plain, dynamic=False)

    def outputs(of, x, upstream):
        y = of(x)
        return (y.detach(), *torch.autograd.grad(y, x, upstream)) if backward else (y,)

    measure(
        lambda: outputs(ours, x, upstream),
        lambda: outputs(plain, x, upstream),
        exact=outputs(
            plain, x[:2].detach().double().requires_grad_(backward), upstream[:2].double()
        ),
        memory=True,
        threads=threads,
        headline=False,
        shape="x".join(map(str, x.shape)),
        dtype=x.dtype,
        # x read and y written; backward reads x and the gradient and writes one
        bytes=(5 if backward else 2) * x.nbytes,
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_quick_gelu(direction, device, full, threads, measure):
    _bench("quick_gelu", direction, "default", device, full, threads, measure)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU PyTorch's own call serves")
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    "implementation", [pytest.param("compiled", marks=pytest.mark.compiled), "default"]
)
def bench_gelu(implementation, direction, device, full, threads, measure):
    _bench("gelu", direction, implementation, device, full, threads, measure)

"""Kernels of GELU and QuickGELU against the composite: types, sizes, extremes, a bias."""

from __future__ import annotations

import pytest
import torch
from fasttta.kernels import gelu_plan as plan
from kernels_here import DEVICE, HALVES, KERNELS, check, poisoned  # noqa: F401

TYPES = [torch.float32, *HALVES]


def _random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, device="cpu")).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, plan.BLOCK), (5, 1031)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "quick_gelu"])
def test_activations(name, shape, dtype):
    x, up = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype, seed=1)
    check(name, x)
    check(f"{name}_backward", up, x)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 1031)], ids=str)
def test_bias(shape, dtype):
    """Also where a program begins within a row."""
    x, up = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype, seed=1)
    for bias in (_random(shape[-1], seed=2), _random(shape[-1], dtype=dtype, seed=2)):
        check("gelu", x, bias)
        check("gelu_backward", up, x, bias)


@pytest.mark.parametrize("name", ["gelu", "quick_gelu"])
def test_extremes(name):
    """nan, and numbers whose exponential is none. PyTorch's GELU of infinity is nan or infinity."""
    x = torch.tensor([-1e30, -200.0, -60.0, 0.0, 200.0, 1e30, torch.nan]).to(DEVICE)
    check(name, x)
    check(f"{name}_backward", torch.ones_like(x[:6]), x[:6])
    assert KERNELS[f"{name}_backward"](torch.ones_like(x), x)[-1].isnan()


@pytest.mark.parametrize("name", ["gelu", "quick_gelu"])
def test_tails(name):
    """Small results are right to their own digits, not only to the largest's."""
    x = torch.linspace(-6, -2, 41, dtype=torch.float64)
    exact = torch.nn.functional.gelu(x) if name == "gelu" else x * torch.sigmoid(1.702 * x)
    computed = KERNELS[name](x.float().to(DEVICE)).double().cpu()
    allowed = {"gelu": 6e-8, "quick_gelu": 1e-9}[name]  # of 1 + erf, as PyTorch has it; of exp
    assert (computed - exact).abs().max() <= allowed + 1e-6 * exact.abs().max()

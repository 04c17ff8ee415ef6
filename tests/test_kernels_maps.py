"""Kernels on maps against the composite: total variation, its gradient, weights and ensemble."""

from __future__ import annotations

import pytest
import torch
from kernels_here import DEVICE, HALVES, KERNELS, among_nan, check, poisoned  # noqa: F401

SIZES = [(1, 1, 1), (3, 1, 7), (2, 6, 1), (5, 14, 14), (2, 37, 29), (2, 40, 300)]


def _maps(n, height, width, dtype=torch.float32, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.rand(n, height, width, generator=generator, device="cpu")
    return among_nan(x.to(DEVICE, dtype))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_total_variation(size):
    maps = _maps(*size)
    check("total_variation", maps)
    check("total_variation_backward", torch.linspace(-1, 1, size[0], device=DEVICE), maps)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype):
    maps = _maps(3, 14, 14, dtype)
    check("total_variation", maps)
    check("total_variation_backward", torch.ones(3, device=DEVICE), maps)


def test_gradient_is_zero_at_ties():
    maps = torch.zeros(2, 5, 4, device=DEVICE)
    maps[1, :, 2:] = 1
    grad = check("total_variation_backward", torch.ones(2, device=DEVICE), maps)[0]
    assert (grad[0] == 0).all()
    assert (grad[1, :, 0] == 0).all()
    assert (grad[1, :, 1] == -1).all()


@pytest.mark.parametrize("size", [(5, 14, 14), (3, 40, 33)], ids=str)
@pytest.mark.parametrize("classes", [1, 7, 130])
def test_ensemble(size, classes):
    generator = torch.Generator("cpu").manual_seed(1)
    logits = torch.randn(size[0], classes, generator=generator, device="cpu").to(DEVICE)
    for temperature in (0.25, 1.0, 5.0):
        probability, _, weights = check("reliability_ensemble", _maps(*size), logits, temperature)
        assert torch.allclose(probability.sum(), torch.ones((), device=DEVICE), atol=1e-5)
        assert torch.allclose(weights.sum(), torch.ones((), device=DEVICE), atol=1e-5)


def test_nan_stays():
    maps = _maps(3, 14, 14)
    maps[1, 3, 3] = torch.nan
    tv = check("total_variation", maps)[0]
    assert torch.isnan(tv).tolist() == [False, True, False]


def test_the_same_bits_again():
    maps = _maps(2, 40, 300)
    first = check("total_variation", maps)[0]
    assert torch.equal(KERNELS["total_variation"](maps), first)

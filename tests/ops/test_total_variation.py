"""Total variation of maps, weights by it, and the ensemble: goldens, ties, edges."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, IMPLEMENTATIONS, close, using

from fasttta import functional as F

# odd on every axis; one pixel, row, column; more rows than one unit of parallel work; no map
SHAPES = [(3, 5, 7), (2, 1, 7), (2, 6, 1), (1, 1, 1), (2, 70, 33), (5, 33, 130), (0, 4, 3)]


@pytest.fixture(autouse=True)
def _on_the_device():
    with DEVICE:
        yield


def _maps(shape, ties=False, dtype=torch.float64):
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    maps = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)
    return (maps.round() if ties else maps).to(dtype).requires_grad_()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_goldens(atpt_kernels, implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    g = {name: x.to(DEVICE) for name, x in atpt_kernels.items()}
    for case in (*map(str, range(6)), "ties"):
        maps = g[f"tv.{case}.map"].clone().requires_grad_()
        tv = F.total_variation(maps, backend=backend)
        assert (tv - g[f"tv.{case}.tv"]).abs().max() < 1e-12, case
        up = g.get(f"tv.{case}.cotangent", torch.ones_like(tv))
        grad = torch.autograd.grad(tv, maps, up)[0]
        assert (grad - g[f"tv.{case}.grad_map"]).abs().max() < 1e-14, case


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ensemble_goldens(atpt_kernels, implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    g = {name: x.to(DEVICE) for name, x in atpt_kernels.items()}
    for temperature in (0.25, 1.0):
        at = f"ens.temp{temperature}."
        tv, logits = (g[f"ens.{x}"].clone().requires_grad_() for x in ("tv", "logits"))
        weights = F.reliability_weights(tv, temperature)
        assert (weights - g[f"{at}weights"]).abs().max() < 1e-12
        probability = weights @ logits.softmax(-1)
        grads = torch.autograd.grad(probability @ g["ens.cotangent"], (tv, logits))
        for name, grad in zip(("tv", "logits"), grads, strict=True):
            assert (grad - g[f"{at}grad_{name}"]).abs().max() < 1e-12, name
        # maps of two pixels that have this variation
        maps = torch.stack((torch.zeros_like(tv), tv), -1).view(-1, 1, 2).detach()
        computed, variation, weights = F.reliability_ensemble(
            maps, logits, temperature, backend=backend
        )
        assert (variation - tv).abs().max() < 1e-12
        assert (weights - g[f"{at}weights"]).abs().max() < 1e-12
        assert (computed - g[f"{at}probs"]).abs().max() < 1e-12
        assert not computed.requires_grad


@pytest.mark.parametrize("implementation", ["default", "composite"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_reference(dtype, shape, ties, implementation, monkeypatch):
    using(implementation, monkeypatch)
    maps = _maps(shape, ties, dtype)
    exact = maps.detach().double().requires_grad_()
    up = torch.linspace(-1, 1, shape[0], dtype=torch.float64)
    computed, expected = F.total_variation(maps), F.total_variation(exact, backend="reference")
    close(computed, expected, torch.float64 if dtype == torch.float64 else torch.float32, "tv")
    grad = torch.autograd.grad(computed, maps, up.to(computed))[0]
    assert grad.dtype == dtype
    close(grad, torch.autograd.grad(expected, exact, up)[0], dtype, "gradient")


@pytest.mark.parametrize("implementation", ["default", "composite"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ensemble_equals_reference(dtype, implementation, monkeypatch):
    using(implementation, monkeypatch)
    maps, logits = _maps((70, 5, 4), dtype=dtype).detach(), 3 * torch.randn(70, 309)
    wide = torch.promote_types(dtype, torch.float32)
    for given in (logits.to(dtype), logits):
        computed = F.reliability_ensemble(maps, given, 20.0)
        exact = F.reliability_ensemble(maps.double(), given.double(), 20.0, backend="reference")
        types = (torch.promote_types(given.dtype, torch.float32), wide, wide)
        names = "probability", "tv", "weights"
        for name, x, right, kind in zip(names, computed, exact, types, strict=True):
            assert x.dtype == kind
            close(x, right, torch.float32, name)
        assert (computed[0].sum() - 1).abs() < 1e-5
        assert (computed[2].sum() - 1).abs() < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_properties(implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    maps = _maps((4, 9, 6)).detach()
    tv = F.total_variation(maps, backend=backend)
    for same in (maps + 3, maps.flip(1), maps.flip(2), maps.transpose(1, 2), -maps):
        assert torch.allclose(F.total_variation(same, backend=backend), tv)
    assert torch.allclose(F.total_variation(2.5 * maps, backend=backend), 2.5 * tv)
    strided = torch.stack((maps, maps), -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(F.total_variation(strided, backend=backend), tv)
    flat = torch.ones(2, 5, 5, dtype=torch.float64, requires_grad=True)
    computed = F.total_variation(flat, backend=backend)
    assert (computed == 0).all()
    assert (torch.autograd.grad(computed.sum(), flat)[0] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_in_its_map(implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    maps, logits = _maps((3, 5, 4)).detach(), torch.randn(3, 7).double()
    maps[1, 2, 2] = torch.nan
    tv = F.total_variation(maps, backend=backend)
    assert torch.isnan(tv).tolist() == [False, True, False]
    probability, _, weights = F.reliability_ensemble(maps, logits, backend=backend)
    assert torch.isnan(probability).all()
    assert torch.isnan(weights).all()

"""Total variation kernels against the composite: sizes, ties, strides, one launch or two."""

from __future__ import annotations

import pytest
import torch
from fasttta.kernels import total_variation_plan as plan
from kernels_here import DEVICE, HALVES, KERNELS, among_nan, check, poisoned  # noqa: F401

# one row, one column, one pixel, less and more than a tile on either axis
SHAPES = [(3, 14, 14), (2, 1, 7), (2, 6, 1), (1, 1, 1), (2, 33, 20), (2, 17, 259)]


def _maps(*shape, dtype=torch.float32, ties=False):
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    x = torch.rand(shape, generator=generator, device="cpu")
    return among_nan((x.mul(4).round() if ties else x).to(DEVICE, dtype))


def _logits(n, c):
    generator = torch.Generator("cpu").manual_seed(n * c)
    return among_nan(torch.randn(n, c, generator=generator, device="cpu").mul(5).to(DEVICE))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_total_variation(shape, ties):
    x = _maps(*shape, ties=ties)
    check("total_variation", x)
    upstream = torch.linspace(-1, 2, shape[0], device=DEVICE)
    check("total_variation_backward", upstream, x)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_types_and_strides(dtype):
    x = _maps(2, 9, 14, dtype=dtype)
    for y in (x, x.transpose(1, 2), x[:, ::2, ::3], x[:, :1].expand(2, 9, 14)):
        check("total_variation", y)
        check("total_variation_backward", torch.ones(1, device=DEVICE).expand(2), y)
    check("reliability_ensemble", x.transpose(1, 2), _logits(2, 5).to(dtype), 3.0)


@pytest.mark.parametrize("temperature", [0.5, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ensemble(shape, temperature):
    for classes in (7, 500):
        check("reliability_ensemble", _maps(*shape), _logits(shape[0], classes), temperature)


def test_many_maps():
    """More than one block of maps in either form."""
    assert plan.small_ensemble(20, 4, 5, 9)
    check("reliability_ensemble", _maps(20, 4, 5), _logits(20, 9), 2.0)
    assert plan.small_ensemble(40, 20, 13, 9) is None
    check("reliability_ensemble", _maps(40, 20, 13), _logits(40, 9), 20.0)


def test_nan_is_never_hidden():
    for shape in ((3, 5, 4), (3, 18, 20)):
        x = _maps(*shape).clone()
        x[1, 2, 2] = torch.nan
        assert torch.isnan(KERNELS["total_variation"](x)).tolist() == [False, True, False]
        probability, tv, weights = KERNELS["reliability_ensemble"](x, _logits(3, 4), 1.0)
        assert torch.isnan(tv).tolist() == [False, True, False]
        assert torch.isnan(weights).all()
        assert torch.isnan(probability).all()
        z = _logits(3, 4).clone()
        z[0, 1] = torch.nan
        assert torch.isnan(KERNELS["reliability_ensemble"](_maps(*shape), z, 1.0)[0]).all()


def test_same_bits_twice():
    for shape in ((5, 14, 14), (3, 40, 30)):
        runs = [
            KERNELS["reliability_ensemble"](_maps(*shape), _logits(shape[0], 130), 9.0)
            for _ in range(2)
        ]
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("case", ["0", "1", "2", "3", "4", "5", "ties"])
def test_goldens(atpt_kernels, case):
    maps = atpt_kernels[f"tv.{case}.map"].to(DEVICE, torch.float32)
    upstream = atpt_kernels.get(f"tv.{case}.cotangent", torch.ones(len(maps))).to(
        DEVICE, torch.float32
    )
    tv = KERNELS["total_variation"](maps)
    grad = KERNELS["total_variation_backward"](upstream, maps)
    for x, name in ((tv, "tv"), (grad, "grad_map")):
        expected = atpt_kernels[f"tv.{case}.{name}"].double()
        assert (x.cpu() - expected).abs().max() <= 4e-7 * expected.abs().max(), name


@pytest.mark.parametrize("temperature", ["0.25", "1.0"])
def test_ensemble_goldens(atpt_kernels, temperature):
    """Maps of one row whose total variation is the golden one."""
    tv = atpt_kernels["ens.tv"].to(DEVICE, torch.float32)
    maps = torch.stack((torch.zeros_like(tv), tv), dim=-1).unsqueeze(1)  # [N, 1, 2]
    logits = atpt_kernels["ens.logits"].to(DEVICE, torch.float32)
    probability, variation, weights = KERNELS["reliability_ensemble"](
        maps, logits, float(temperature)
    )
    assert torch.equal(variation, tv)
    for x, name in ((probability, "probs"), (weights, "weights")):
        expected = atpt_kernels[f"ens.temp{temperature}.{name}"]
        assert (x.cpu() - expected).abs().max() < 2e-6 * expected.abs().max(), name

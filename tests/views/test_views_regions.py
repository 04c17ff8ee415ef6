"""Regions of attention and mixing by them: the official run, ties, errors."""

import dataclasses

import numpy as np
import pytest
import torch
from goldens import require
from safetensors.torch import load_file

from fasttta.views import Views, mix_views, region_map
from fasttta.views.views import quantile

# Measured on the golden maps: no pixel differs, and the stored mixed views come out bit for bit.
# The README allows pixels within 2e-6 of a threshold to flip.
TOLERANCES = {"pixels": 0, "mixed": 0.0, "quantile": 1e-15}

CASES = {
    "case_default": ({}, {}),
    "case_mid": ({"high": 0.15, "low": 0.5}, {"mix_high": 0.9, "mix_low": 0.1}),
}


@pytest.fixture(scope="module")
def golden():
    """Loads a file of A-TPT's vectors."""

    def load(name):
        # the files of a tower are those of one run
        parts = ("inputs", "expected_f32", "expected_f64")
        tower = name.partition("_")[0]
        run = [f"{tower}_{part}" for part in parts] if tower in ("vit", "rn") else [name]
        place = require(*(f"atpt/{file}.safetensors" for file in run))
        return load_file(place / "atpt" / f"{name}.safetensors")

    return load


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_official_regions(golden, case, precision):
    expected = golden(f"vit_expected_{precision}")
    region = region_map(expected["attn.refined_grid"], 56, **CASES[case][0])
    assert region.dtype == torch.uint8
    assert (region != expected[f"{case}.region_u8"]).sum() <= TOLERANCES["pixels"]


@pytest.mark.parametrize("case", CASES)
def test_official_mixing(golden, case):
    inputs, expected = golden("vit_inputs"), golden("vit_expected_f32")
    views = Views(inputs["bases_u8"].float() / 255, inputs["mixes"], inputs["betas"])
    mixed = mix_views(views, expected[f"{case}.region_u8"], **CASES[case][1])
    stored = expected[f"{case}.mixed"]
    assert (mixed[: len(stored)] - stored).abs().max() <= TOLERANCES["mixed"]


def test_masks_of_the_paper(golden):
    for precision in ("f32", "f64"):
        expected = golden(f"vit_expected_{precision}")
        region = region_map(expected["attn.paper_grid_minmax"], 56, mask="top")
        stored = expected["paper_pipeline.region_u8"]
        assert (region != stored).sum() <= TOLERANCES["pixels"]


def test_masks_of_gradcam(golden):
    """A map that already has the views' resolution is taken as it is."""
    expected = golden("rn_expected_f32")
    region = region_map(expected["cam_up"], 96)
    assert (region != expected["region_u8"]).sum() <= TOLERANCES["pixels"]


@pytest.mark.parametrize(("high", "low"), [(0.1, 0.6), (0.2, 0.8)])
def test_mask_kernels(golden, high, low):
    kernels = golden("kernels_f64")
    regions = region_map(kernels["rollout.code.cam"], 56, "quantile", high, low)
    for i, region in enumerate(regions):
        for value, name in ((2, "high"), (1, "mid"), (0, "low")):
            stored = kernels[f"mask.{i}.{high}_{low}.{name}"].bool()
            assert torch.equal(region == value, stored)


def test_quantiles(golden):
    kernels = golden("kernels_f64")
    for q in (0.0, 0.2, 0.5, 0.8, 0.99, 1.0):
        values = quantile(kernels["quantile.x"], q)[:, 0]
        assert (values - kernels[f"quantile.{q}"]).abs().max() <= TOLERANCES["quantile"]


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_quantile_against_numpy(n):
    maps = torch.rand(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for q in (0.0, 0.13, 0.5, 0.77, 1.0):
        expected = torch.from_numpy(np.quantile(maps.numpy(), q, axis=1))
        assert (quantile(maps, q)[:, 0] - expected).abs().max() < 1e-14


def test_counts_at_the_usual_size():
    """224 x 224: the code has 10,035 pixels above its threshold, the paper 10,036."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 224, 224, generator=generator, dtype=torch.float64)
    for mask, count in (("quantile", 10035), ("top", 10036)):
        region = region_map(maps, 224, mask)
        assert (region == 2).flatten(1).sum(1).tolist() == [count] * 2
        assert (region == 1).sum() == 0
        both = region_map(maps, 224, mask, high=0.1, low=0.3)
        low = (both == 0).float().mean().item()
        assert abs(low - 0.3) < 1e-4
        assert (both == 1).any()


def test_ties():
    constant = torch.full((1, 4, 4), 0.5)
    assert (region_map(constant, 4) == 0).all()  # nothing lies above the threshold
    assert region_map(constant, 4, "top").flatten().tolist() == [2] * 4 + [0] * 12
    zeros = torch.zeros(1, 2, 2)
    zeros[0, 1, 1] = 1.0
    region = region_map(zeros, 2, high=0.2, low=0.1)
    assert region.flatten().tolist() == [0, 0, 0, 2]  # tied zeros go together
    assert region_map(zeros, 2, "top", high=0.25, low=0.25).flatten().tolist() == [1, 1, 0, 2]


def test_no_shares_leave_everything_between():
    maps = torch.rand(2, 3, 3)
    for mask in ("quantile", "top"):
        assert (region_map(maps, 6, mask, high=0, low=0) == 1).all()


def test_views_do_not_see_each_other():
    maps = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(0))
    for mask in ("quantile", "top"):
        together = region_map(maps, 20, mask)
        assert torch.equal(region_map(maps[[2]], 20, mask)[0], together[2])
        assert torch.equal(region_map(maps.flip(0), 20, mask), together.flip(0))


def _views(dtype=torch.float32, region=None):
    generator = torch.Generator().manual_seed(0)
    base, mix = torch.rand(2, 5, 3, 6, 6, generator=generator, dtype=dtype)
    weight = torch.rand(5, generator=generator)
    mix[0] = base[0]
    return Views(base, mix, weight, region)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixing_by_hand(dtype):
    views = _views(dtype)
    region = torch.randint(0, 3, (5, 6, 6), generator=torch.Generator().manual_seed(1)).byte()
    mixed = mix_views(views, region, mix_high=0.7, mix_low=0.1)
    assert mixed.dtype == dtype
    assert torch.equal(mixed[0], views.base[0])
    for i in range(1, 5):
        for y in range(6):
            for x in range(6):
                share = (0.1, views.weight[i].item(), 0.7)[region[i, y, x]]
                expected = share * views.base[i, :, y, x] + (1 - share) * views.mix[i, :, y, x]
                assert (mixed[i, :, y, x] - expected).abs().max() < 1e-6


def test_mixing_without_weights_is_augmix():
    views = _views()
    region = torch.zeros(5, 6, 6, dtype=torch.uint8)
    assert torch.equal(mix_views(views, region, 0, 0)[1:], views.augmix[1:])
    assert torch.equal(mix_views(views, region, 1, 1), views.base)
    between = torch.ones_like(region)
    assert torch.equal(mix_views(views, between)[1:], views.augmix[1:])


def test_mixing_leaves_its_input():
    views = _views()
    copies = [x.clone() for x in (views.base, views.mix, views.weight)]
    for weights in ((0.8, 0.2), (0, 0)):
        mix_views(views, torch.ones(5, 6, 6, dtype=torch.uint8), *weights)
    for copy, x in zip(copies, (views.base, views.mix, views.weight), strict=True):
        assert torch.equal(copy, x)
    augmented = dataclasses.replace(views, mix=views.augmix)  # how the paper mixes
    assert torch.equal(augmented.base, views.base)


MAPS = torch.rand(2, 3, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attention": MAPS[0]}, ValueError, r"attention has shape \[3, 3\]"),
        ({"attention": MAPS[:0]}, ValueError, r"attention has shape \[0, 3, 3\]"),
        ({"attention": MAPS > 0}, TypeError, "attention is torch.bool"),
        ({"attention": MAPS / 0 * 0}, ValueError, "attention holds NaN"),
        ({"resolution": 0}, ValueError, "resolution is 0"),
        ({"mask": "best"}, ValueError, "mask is 'best'"),
        ({"high": -0.1}, ValueError, "high is -0.1"),
        ({"low": 1.1}, ValueError, "low is 1.1"),
        ({"high": 0.5, "low": 0.6}, ValueError, r"high is 0.5 and low 0.6; needed high \+ low"),
    ],
)
def test_region_errors(change, error, message):
    with pytest.raises(error, match=message):
        region_map(**{"attention": MAPS, "resolution": 6, **change})


@pytest.mark.parametrize(
    ("region", "weights", "error", "message"),
    [
        (torch.zeros(5, 6, 6), (), TypeError, "region is torch.float32"),
        (torch.zeros(5, 5, 5).byte(), (), ValueError, r"region has shape \[5, 5, 5\]; needed"),
        (torch.zeros(5, 6, 6).byte(), (1.2,), ValueError, "mix_high is 1.2"),
        (torch.zeros(5, 6, 6).byte(), (0.5, -1), ValueError, "mix_low is -1"),
    ],
)
def test_mixing_errors(region, weights, error, message):
    with pytest.raises(error, match=message):
        mix_views(_views(), region, *weights)

"""Kernels of score_moments against the default: shapes, numerics, undefined statistics."""

from __future__ import annotations

import kernels_here
import pytest
import torch
from fasttta.kernels import launch_plan
from fasttta.kernels import score_moments_plan as plan
from kernel_cases import (  # noqa: F401
    SCORE_SHAPES,
    per_head_fixture,
    qk,
    score_options,
    small_tiles_fixture,
)
from kernels_here import DEVICE, HALVES, KERNELS, NATIVE, check, poisoned  # noqa: F401


def _moments(q, k, options):
    mean, std = check("score_moments", q, k, *options)
    generator = torch.Generator("cpu").manual_seed(1)
    grads = [torch.randn(mean.shape, generator=generator, device="cpu").to(DEVICE) for _ in "ms"]
    check("score_moments_backward", *grads, q, k, std, *options)


@pytest.mark.parametrize("shape", SCORE_SHAPES, ids=str)
def test_shapes(shape, per_head, small_tiles):
    q, k = qk(*shape)
    _moments(q, k, score_options(q, shape[2], per_head))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype, per_head):
    q, k = qk(2, 2, (40, 18), 24, dtype)
    _moments(q, k, score_options(q, (40, 18), per_head))


@pytest.mark.parametrize("ratio", [1.0, 100.0, 1000.0])
def test_statistics_do_not_cancel(ratio, per_head):
    """Mean of the scores many times their std: one channel is the same for all tokens."""
    spans, heads, d = [40, 24], 2, 16
    q, k = qk(1, heads, spans, d)
    q, k = q.clone(), k.clone()
    spread = 4.0 * (1 if per_head else heads**0.5)  # std of a sum of d or H d products
    height = (ratio * spread / (1 if per_head else heads)) ** 0.5
    q[..., 0], k[..., 0] = height, height
    mean, std = KERNELS["score_moments"](q, k, spans, 1.0, per_head)
    exact = kernels_here.composite.score_moments(q.double(), k.double(), spans, 1.0, per_head)
    assert (exact[0] / exact[1]).min() > 0.6 * ratio
    assert ((std - exact[1]).abs() / exact[1]).max() < 1e-5
    assert ((mean - exact[0]).abs() / exact[0]).max() < 2e-6
    check("attention_bootstrap_backward", torch.ones(1, device=DEVICE), q, k, *(
        x.float() for x in exact), spans, 1.0, per_head, False, slack=ratio)  # fmt: skip


def test_equal_scores_have_no_direction(per_head):
    q, k = qk(3, 1, [4, 3], 4)
    q, k = q.clone(), k.clone()
    q[0], k[2] = 0.0, 1.0
    options = [4, 3], 0.5, per_head
    _, std = check("score_moments", q, k, *options)
    ones = torch.ones_like(std)
    grads = check("score_moments_backward", 0 * ones, ones, q, k, std, *options)
    assert all((x[0] == 0).all() for x in grads)


@pytest.mark.parametrize("programs", [1, 3, 132])
def test_programs_that_take_one_tile_after_the_other(programs, monkeypatch):
    """18 tiles among 1, 3 or more programs than there are tiles: the bits of a program a tile."""
    monkeypatch.setattr(plan, "score_tile", lambda *_: plan.Tile(16, 256, 8, 3))
    monkeypatch.setitem(plan._PROCESSORS, "sm_90", programs)
    q, k = qk(2, 2, (40, 18), 24, torch.float16)
    options = score_options(q, (40, 18), False)
    tiling = plan.score_tiles("sm_90", True, 2, (40, 18), 24)
    assert tiling.constants["PERSISTENT"]
    assert tiling.grid == (min(programs, 20),)
    results = check("score_moments", q, k, *options)
    monkeypatch.setattr(plan, "score_tiles", _a_program_a_tile(plan.score_tiles))
    for x, y in zip(results, KERNELS["score_moments"](q, k, *options), strict=True):
        assert torch.equal(x, y)


def _a_program_a_tile(tiles):
    def change(architecture, half, batch, spans, d):
        full = tiles(architecture, half, batch, spans, d)
        constants = full.constants | {"PERSISTENT": False}
        return launch_plan.Plan((constants["TILES"], batch), constants, full.warps, full.stages)

    return change


def test_no_samples(per_head):
    q, k = qk(0, 2, (4, 3), 4)
    _moments(q, k, score_options(q, (4, 3), per_head))


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_at_full_size_on_a_gpu(dtype, per_head):
    """8 and 40 samples of ViT-B: both tile sizes, all waves."""
    for batch in (8, 40):
        q, k = qk(batch, 12, (512, 196), 64, dtype)
        _moments(q, k, score_options(q, (512, 196), per_head))

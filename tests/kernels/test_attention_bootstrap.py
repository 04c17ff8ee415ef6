"""Kernels of attention_bootstrap against the default: shapes, strides, undefined statistics."""

from __future__ import annotations

import pytest
import torch
from fasttta.kernels import score_moments_per_head_plan
from fasttta.kernels import score_moments_plan as plan
from kernel_cases import (  # noqa: F401
    SCORE_SHAPES,
    per_head_fixture,
    qk,
    score_options,
    small_tiles_fixture,
)
from kernels_here import DEVICE, HALVES, KERNELS, NATIVE, check, poisoned  # noqa: F401


def _anchors(heads, spans, per_head):
    shape = (heads, len(spans)) if per_head else (len(spans),)
    std = torch.linspace(0.5, 1.5, len(spans), device=DEVICE).expand(shape)
    return torch.full(shape, 0.1, device=DEVICE), std


def _bootstrap(q, k, options, pair_query=False, anchors=(), check=check):
    """Loss, mean, std, dq, dk, checked against the default."""
    loss, mean, std = check("attention_bootstrap", q, k, *options, pair_query, *anchors)
    upstream = torch.linspace(0.5, 1.5, max(len(q), 2), device=DEVICE)[: len(q)]
    dq, dk = check(
        "attention_bootstrap_backward", upstream, q, k, mean, std, *options, pair_query, *anchors
    )
    return loss, mean, std, dq, dk


def _launch(name, *args):
    return KERNELS[name](*args)


@pytest.mark.parametrize("shape", SCORE_SHAPES, ids=str)
def test_shapes(shape, per_head, small_tiles):
    q, k = qk(*shape)
    options = score_options(q, shape[2], per_head)
    _bootstrap(q, k, options)


def test_tiles_of_every_plan():
    """Blocks of 64 x 128 and 128 x 256, and more than one of them."""
    spans = [140, 66]
    for tile in (plan.Tile(64, 128, 4, 3), plan.Tile(128, 256, 8, 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "score_tile", lambda *_, tile=tile: tile)
            q, k = qk(1, 2, spans, 20)
            _bootstrap(q, k, score_options(q, spans, False))


def test_long_heads():
    """Head dims that are taken in chunks, the last one not full; the default serves each head."""
    q, k = qk(1, 2, (12, 9), 130)
    _bootstrap(q, k, score_options(q, (12, 9), False))
    assert "64 channels" in score_moments_per_head_plan.unsuitable(130)
    _bootstrap(q, k, score_options(q, (12, 9), True))


@pytest.mark.parametrize("pair_query", [False, True])
def test_pairs_and_anchors(per_head, pair_query, small_tiles):
    spans = (9, 4, 20)
    q, k = qk(1, 2, spans, 8)
    options = score_options(q, spans, per_head)
    _bootstrap(q, k, options, pair_query, _anchors(2, spans, per_head))
    _bootstrap(q, k, score_options(q, spans, per_head, scale=-0.3), pair_query)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype, per_head):
    q, k = qk(2, 2, (40, 18), 24, dtype)
    options = score_options(q, (40, 18), per_head)
    loss, mean, std, dq, dk = _bootstrap(q, k, options)
    assert {loss.dtype, mean.dtype, std.dtype} == {torch.float32}
    assert {dq.dtype, dk.dtype} == {dtype}


def test_bfloat16_with_means_anchors_and_three_modalities(per_head):
    """Means of three deviations, as layers without a LayerNorm before them have."""
    spans = (9, 4, 20)
    q, k = qk(1, 2, spans, 8, torch.bfloat16, offset=3.0)
    options = score_options(q, spans, per_head)
    _bootstrap(q, k, options, True, _anchors(2, spans, per_head))


def test_strides(per_head):
    """Dense, tokens before heads, transposed channels, and one head for all."""
    q, k = qk(1, 2, (6, 5), 8)
    options = score_options(q, (6, 5), per_head)
    expected = _bootstrap(q, k, options)
    layouts = (
        lambda x: x.contiguous(),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    )
    for layout in layouts:
        results = _bootstrap(layout(q), layout(k), options, check=_launch)
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    _bootstrap(q[:, :1].expand_as(q), k, options)


def test_undefined_statistics(per_head):
    spans = [4, 3]
    q, k = qk(3, 1, spans, 4)
    q, k = q.clone(), k.clone()
    q[0], k[2] = 0.0, 1.0
    options = spans, 0.5, per_head, False
    loss, mean, std = check("attention_bootstrap", q, k, *options)
    assert not torch.isfinite(loss[0])
    # a sample that is not used may have no statistics
    upstream = torch.tensor([0.0, 1.0, 0.0], device=DEVICE)
    grads = check("attention_bootstrap_backward", upstream, q, k, mean, std, *options)
    assert all((x[0] == 0).all() and torch.isfinite(x).all() for x in grads)


def test_nan_is_never_hidden(per_head):
    q, k = qk(2, 2, (4, 3), 4)
    q = q.clone()
    q[1, 0, 2, 1] = torch.nan
    options = [4, 3], 0.5, per_head, False
    loss, mean, std = KERNELS["attention_bootstrap"](q, k, *options)
    assert torch.isnan(loss).tolist() == [False, True]
    upstream = torch.ones(2, device=DEVICE)
    for x in KERNELS["attention_bootstrap_backward"](upstream, q, k, mean, std, *options):
        assert torch.isfinite(x[0]).all()
        assert torch.isnan(x[1]).any()


def test_upstream_of_any_stride(per_head):
    q, k = qk(3, 1, (4, 3), 4)
    options = [4, 3], 0.5, per_head, False
    _, mean, std = KERNELS["attention_bootstrap"](q, k, *options)
    for upstream in (torch.ones(1, device=DEVICE).expand(3), torch.rand(6, device=DEVICE)[::2]):
        check("attention_bootstrap_backward", upstream, q, k, mean, std, *options)


def test_no_samples(per_head):
    q, k = qk(0, 2, (4, 3), 4)
    options = score_options(q, (4, 3), per_head)
    _bootstrap(q, k, options)


def test_same_bits_twice(per_head, small_tiles):
    q, k = qk(1, 2, (20, 33), 8)
    options = score_options(q, (20, 33), per_head)
    runs = [_bootstrap(q, k, options, check=_launch) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("case", ["attn_small", "attn_full"])
def test_goldens(golden, case, per_head):
    g, spans = golden.load("kernels"), [golden.json["kernels"][case][n] for n in ("Ta", "Tv")]
    prefix = "perhead_" if per_head else ""
    q, k = (g[f"{case}.{name}"].to(DEVICE) for name in "qk")
    options = spans, q.shape[3] ** -0.5, per_head, False
    loss, mean, std = KERNELS["attention_bootstrap"](q, k, *options)
    total = g[f"{case}.{prefix}loss" if prefix else f"{case}.loss_attn"]
    assert abs(loss.mean().item() - total) < 2e-6 * total
    for i, row in enumerate("av"):
        for j, column in enumerate("av"):
            moments = [g[f"{case}.{prefix}{name}_{row}{column}"] for name in ("mean", "std")]
            for x, expected in zip((mean, std), moments, strict=True):
                # a mean near 0 is compared in units of the std
                assert (x[..., i, j].cpu() - expected).abs().max() < 1e-6 * moments[1].max()
    upstream = torch.full((len(q),), 1 / len(q), device=DEVICE)
    grads = KERNELS["attention_bootstrap_backward"](upstream, q, k, mean, std, *options)
    for name, grad in zip("qk", grads, strict=True):
        expected = g[f"{case}.{prefix}grad_{name}"].double()
        assert (grad.cpu() - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_at_full_size_on_a_gpu(dtype, per_head):
    """8 and 40 samples of ViT-B: both tile sizes, all waves."""
    for batch in (8, 40):
        q, k = qk(batch, 12, (512, 196), 64, dtype)
        options = score_options(q, (512, 196), per_head)
        _bootstrap(q, k, options)

"""The kernels of residual and LayerNorm against the composite: types, strides, masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from fasttta.kernels import residual_layer_norm_plan as plan
from kernels_here import DEVICE, HALVES, KERNELS, among_nan, check, poisoned  # noqa: F401

from fasttta.ops import registry
from fasttta.ops.residual_layer_norm import WIDEST

TYPES = [torch.float32, *HALVES]
HALF = torch.bfloat16
# one token, one channel, less and more than a power of two, several blocks of partial sums
SHAPES = [(2, 3, 5), (1, 1, 1), (3, 7, 64), (2, 1, 33), (19, 768), (6,)]


def _random(*shape, dtype=torch.float32, seed=0, offset=0.0):
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cpu") + offset
    return among_nan(x.to(DEVICE, dtype))


def _saved(residual, branch, weight, bias, dtype):
    total, normed, stats = KERNELS["residual_layer_norm"](
        residual, branch, weight, bias, 1e-5, dtype
    )
    return residual if branch is None else total, normed, stats


def _check_gradients(saved, weight, other, branch_dtype):
    total, normed, stats = saved
    up = torch.randn(normed.shape, generator=torch.Generator().manual_seed(9)).to(normed)
    for wanted in itertools.product((False, True), repeat=3):
        args = other, total, stats, weight, branch_dtype, *wanted
        check("residual_layer_norm_backward", up, *args, slack=4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("branch", [None, torch.float32, HALF], ids=str)
def test_forward_and_gradients(shape, branch):
    residual = _random(*shape)
    y = None if branch is None else _random(*shape, dtype=branch, seed=1)
    for affine in ((None, None), (_random(shape[-1], seed=2), _random(shape[-1], seed=3))):
        for dtype in (torch.float32, HALF):
            check("residual_layer_norm", residual, y, *affine, 1e-5, dtype)
        saved = _saved(residual, y, *affine, HALF)
        for other in (None, _random(*shape, seed=4)):
            _check_gradients(saved, affine[0], other, branch or torch.float32)


@pytest.mark.parametrize("kinds", list(itertools.product(TYPES, repeat=3)), ids=str)
def test_types(kinds):
    """Residual, branch and normalised tokens of every type; the weights are float32 or as these."""
    residual, branch, dtype = kinds
    x, y = _random(2, 3, 20, dtype=residual), _random(2, 3, 20, dtype=branch, seed=1)
    for kind in {torch.float32, dtype}:
        affine = _random(20, dtype=kind, seed=2), _random(20, dtype=kind, seed=3)
        check("residual_layer_norm", x, y, *affine, 1e-6, dtype)
        saved = _saved(x, y, *affine, dtype)
        _check_gradients(saved, affine[0], None, branch)


def test_strides():
    """Slices of tokens, expanded residuals and gradients, transposed and deeper tensors."""
    w, b, wide = _random(6, seed=2), _random(6, seed=3), _random(4, 9, 12)
    y = _random(4, 9, 6, dtype=HALF, seed=1)
    for x in (
        wide[..., 6:], wide[..., ::2], wide[:1, :, :6].expand(4, 9, 6),
        wide[:, :1, 3:9].expand(4, 9, 6),
        _random(9, 4, 6).transpose(0, 1), _random(6, 9, 4).permute(2, 1, 0),
    ):  # fmt: skip
        check("residual_layer_norm", x, y, w, b, 1e-5, HALF)
        check("residual_layer_norm", x, None, w, b, 1e-5, HALF)
        total, _, stats = _saved(x, None, w, b, HALF)
        args = total, stats, w, HALF, True, True, True
        for up in (y, y[:, :1].expand(4, 9, 6), y.mT.contiguous().mT):
            check("residual_layer_norm_backward", up, x, *args, slack=4)
    deep = _random(2, 3, 2, 6)
    check("residual_layer_norm", deep, deep.flip(0), w, None, 1e-5, HALF)
    check("residual_layer_norm", deep.transpose(0, 2), None, None, b, 1e-5, torch.float32)
    assert "without gaps" in registry.OPERATORS["residual_layer_norm"].no_triton(
        deep, None, torch.ones(12)[::2], None, 1e-5, HALF
    )
    too_wide = torch.empty(1, WIDEST + 1, device="meta")
    assert f"at most {WIDEST} channels" in registry.OPERATORS["residual_layer_norm"].no_triton(
        too_wide, None, None, None, 1e-5, HALF
    )


def test_many_rows_of_a_tuned_weight():
    """More rows than programs, the last of which has fewer; the same bits twice."""
    x, w = _random(1, 2100, 8), _random(8, seed=2)
    assert plan.gradient(9000, 8, True).constants["ROWS"] == 16
    saved = _saved(x, None, w, None, HALF)
    up = _random(1, 2100, 8, dtype=HALF, seed=3)
    args = None, *saved[::2], w, HALF, True, False, True
    runs = [check("residual_layer_norm_backward", up, *args, slack=4) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_large_means_keep_their_digits():
    x = _random(3, 64, offset=1000.0)
    _, normed, _ = _saved(x, None, None, None, torch.float32)
    exact = torch.nn.functional.layer_norm(x.double(), (64,))
    assert (normed.double() - exact).abs().max() < 1e-3  # spacing of x is 6e-5


def test_nan_stays_in_its_row():
    x, y = _random(2, 3, 5).clone(), _random(2, 3, 5, dtype=HALF, seed=1)
    x[1, 0, 2], w = torch.nan, _random(5, seed=2)
    bad = torch.tensor([[False] * 3, [True, False, False]], device=DEVICE)
    total, normed, stats = _saved(x, y, w, w, HALF)
    assert torch.equal(normed.isnan().any(-1), bad)
    assert torch.equal(normed.isnan().all(-1), bad)
    args = None, total, stats, w, HALF, True, True, False
    grad, branch, _ = KERNELS["residual_layer_norm_backward"](y, *args)
    for g in (grad, branch):
        assert torch.equal(g.isnan().any(-1), bad)

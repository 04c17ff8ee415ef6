"""Kernels of rows in float8, and of a LayerNorm that ends in them, against the default."""

from __future__ import annotations

import pytest
import torch
from kernels_here import DEVICE, HALVES, KERNELS, among_nan, composite, poisoned  # noqa: F401

ACTIVATIONS = ["", "gelu", "quick_gelu"]
SHAPES = [(1, 1), (3, 5), (2, 3, 33), (9, 64), (2, 5, 96), (1, 2, 1100)]
_STEP = 1 / 8  # of the power of two below a value: neighbours in e4m3


def _x(shape, dtype=torch.float32, spread=3.0, seed=0):
    """Rows among nan, of very different sizes."""
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator, device="cpu")
    x = x * 10 ** (spread * torch.randn(*shape[:-1], 1, generator=generator, device="cpu"))
    return among_nan(x.clamp(-6e4, 6e4).to(DEVICE, dtype))


def _alike(rows, expected, exact):
    """The scales, and the values: the same numbers, or neighbours where the last bit of an
    activation decides between two."""
    (values, scale), (right, right_scale) = rows, expected
    assert (values.dtype, values.shape) == (right.dtype, right.shape)
    assert (scale.dtype, scale.shape) == (right_scale.dtype, right_scale.shape)
    values, right = values.float(), right.float()
    if exact:
        assert torch.equal(scale, right_scale)
        assert torch.equal(values, right)
        return
    assert torch.allclose(scale, right_scale, rtol=1e-6, atol=0)
    assert ((values - right).abs() <= (_STEP * right.abs()).clamp_min(2**-9)).all()
    assert (values != right).float().mean() <= 2e-3 + 1 / values.numel()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(shape, activation):
    for dtype in (torch.float32, *HALVES):
        args = _x(shape, dtype), activation
        exact = not activation
        _alike(KERNELS["scaled_rows"](*args), composite.scaled_rows(*args), exact)


def test_strides():
    x = _x((4, 6, 8)).transpose(0, 1)
    _alike(KERNELS["scaled_rows"](x, ""), composite.scaled_rows(x, ""), True)
    x = _x((4, 6)).t()
    _alike(KERNELS["scaled_rows"](x, ""), composite.scaled_rows(x, ""), True)


def test_ties_and_every_e4m3():
    """Values halfway between two of e4m3 go to the even one, subnormal ones too."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, halfway, -halfway, torch.tensor([448.0])]).to(DEVICE)  # scale 1
    values, scale = KERNELS["scaled_rows"](x[None], "")
    assert scale.item() == 1
    right = x.cpu().to(torch.float8_e4m3fn).float()
    assert torch.equal(values[0].float().cpu(), right)
    assert torch.equal(right[:127], codes)


def test_rows_that_are_not_finite_stay_alone():
    x = torch.randn(5, 40, device=DEVICE)
    x[1, 3], x[2, 39], x[3] = torch.nan, -torch.inf, 0.0
    for activation in ACTIVATIONS:
        values, scale = KERNELS["scaled_rows"](x, activation)
        assert scale.isnan().flatten().tolist() == [False, True, True, False, False]
        kept = [0, 3, 4]
        rest = composite.scaled_rows(x[kept].contiguous(), activation)
        _alike((values[kept], scale[kept]), rest, activation == "")
        assert not values[3].float().any()


def _norm_args(shape, dtype=torch.float32, branch=torch.float16):
    width = shape[-1]
    generator = torch.Generator("cpu").manual_seed(width)
    affine = [torch.randn(width, generator=generator, device="cpu").to(DEVICE) for _ in range(2)]
    other = None if branch is None else _x(shape, branch, spread=0.3, seed=1)
    return _x(shape, dtype, spread=0.3), other, *affine, 1e-5


@pytest.mark.parametrize("branch", [None, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_layer_norm(shape, branch):
    args = _norm_args(shape, branch=branch)
    total, *rows = KERNELS["scaled_layer_norm"](*args)
    right, *expected = composite.scaled_layer_norm(*args)
    assert torch.equal(total, right)
    _alike(rows, expected, False)


def test_a_half_residual_stays_half():
    args = _norm_args((3, 40), torch.float16)
    total, *rows = KERNELS["scaled_layer_norm"](*args)
    right, *expected = composite.scaled_layer_norm(*args)
    assert total.dtype == right.dtype == torch.float16
    assert torch.equal(total, right)
    _alike(rows, expected, False)


def test_layer_norm_of_rows_that_are_not_finite():
    x, branch, *rest = _norm_args((4, 33))
    x, branch = x.clone(), branch.clone()
    x[1, 5], branch[2, 0] = torch.nan, torch.inf
    _, values, scale = KERNELS["scaled_layer_norm"](x, branch, *rest)
    assert scale.isnan().flatten().tolist() == [False, True, True, False]
    alone = KERNELS["scaled_layer_norm"](x[::3].clone(), branch[::3].clone(), *rest)
    assert torch.equal(values[::3].float(), alone[1].float())
    assert torch.equal(scale[::3], alone[2])


def test_same_bits_twice():
    args = _norm_args((5, 96))
    for name, arguments in (("scaled_layer_norm", args), ("scaled_rows", (args[0], "gelu"))):
        runs = [KERNELS[name](*arguments) for _ in range(2)]
        assert all(torch.equal(x.float(), y.float()) for x, y in zip(*runs, strict=True))

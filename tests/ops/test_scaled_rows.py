"""Rows in float8 and their products: rounding, scales, rows that are not finite, PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICE

from fasttta.ops import scaled_product as products
from fasttta.ops import scaled_rows as module
from fasttta.ops.scaled_layer_norm import scaled_layer_norm
from fasttta.ops.scaled_product import scaled_product, scaled_product_reference
from fasttta.ops.scaled_rows import E4M3, ScaledRows, scaled_rows

LARGEST, LEAST = 448.0, 2.0**-126
# of a value's distance to e4m3, relative to it: half a step of 1/8 of the power of two below
HALF_STEP = 1 / 16
# of the sum of absolute products: float32, or a GPU's tensor cores, which keep some 13 bits
SUMS = 1e-5 if DEVICE.type == "cpu" else 1e-3


def _random(*shape, seed=0, spread=2.0):
    """Rows whose sizes differ by orders of magnitude."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cpu")
    sizes = 10 ** (spread * torch.randn(*shape[:-1], 1, generator=generator, device="cpu"))
    return (x * sizes).to(DEVICE)


def _values(rows):
    return rows.values.double() * rows.scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (40, 768), (2, 0), (0, 4)], ids=str)
def test_every_value_is_within_half_a_step(shape, dtype):
    x = _random(*shape).clamp(-6e4, 6e4).to(dtype)
    rows = scaled_rows(x)
    assert (rows.values.shape, rows.values.dtype) == (x.shape, E4M3)
    assert (rows.scale.shape, rows.scale.dtype) == ((*shape[:-1], 1), torch.float32)
    # subnormal values are whole multiples of 2^-9
    allowed = (HALF_STEP * x.double().abs()).clamp_min(2**-10 * rows.scale.double())
    assert ((_values(rows) - x.double()).abs() <= allowed * (1 + 1e-6)).all()
    if x.numel():
        top = rows.values.float().abs().amax(-1)
        assert (top == LARGEST).all()
        scale = x.float().abs().amax(-1, keepdim=True) / LARGEST
        assert torch.allclose(rows.scale, scale, rtol=1e-6, atol=0)


def test_an_outlier_is_kept_and_takes_digits_from_its_row_only():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    calm = _values(scaled_rows(x))
    x[1, 7] = 3e4
    rows = scaled_rows(x)
    assert abs(_values(rows)[1, 7].item() - 3e4) <= 3e4 * 1e-6
    apart = (_values(rows)[1] - x[1].double()).abs()
    assert apart.max() <= 2**-9 * rows.scale[1].item()  # 0.13, a step of the smallest values
    assert torch.equal(_values(rows)[[0, 2]], calm[[0, 2]])


def test_scales_are_powers_apart_as_rows_are():
    """Rows times a power of two have the same values: nothing depends on their size."""
    x = _random(5, 48, spread=0.1)
    rows, large = scaled_rows(x), scaled_rows(x * 2.0**40)
    assert torch.equal(rows.values.float(), large.values.float())
    assert torch.equal(rows.scale * 2.0**40, large.scale)


def test_permutations_and_parts():
    x, order = _random(6, 32), torch.tensor([4, 2, 0, 5, 1, 3], device=DEVICE)
    rows, moved = scaled_rows(x), scaled_rows(x[order])
    assert torch.equal(rows.values.float()[order], moved.values.float())
    assert torch.equal(rows.scale[order], moved.scale)
    alone = scaled_rows(x[2:3])
    assert torch.equal(rows.values.float()[2:3], alone.values.float())


def test_zeros_and_the_smallest():
    rows = scaled_rows(torch.zeros(2, 16, device=DEVICE))
    assert not rows.values.float().any()
    assert (rows.scale == LEAST).all()
    tiny = torch.full((1, 16), 1e-44, device=DEVICE)  # subnormal float32
    rows = scaled_rows(tiny)
    assert torch.isfinite(_values(rows)).all()
    weight = scaled_rows(torch.ones(16, 16, device=DEVICE))
    assert not scaled_product(scaled_rows(tiny * 0), weight, None, torch.bfloat16).any()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_spoils_only_its_product(odd):
    x = _random(4, 32, spread=0.3)
    weight, bias = scaled_rows(_random(48, 32, seed=1)), torch.randn(48, device=DEVICE).bfloat16()
    clean = scaled_product(scaled_rows(x), weight, bias, torch.bfloat16)
    x[2, 5] = odd
    rows = scaled_rows(x)
    assert rows.scale.isnan().flatten().tolist() == [False, False, True, False]
    product = scaled_product(rows, weight, bias, torch.bfloat16)
    assert product[2].isnan().all()
    assert torch.equal(product[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize(("activation", "formula"), [
    ("gelu", F.gelu), ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
])  # fmt: skip
def test_activations(activation, formula):
    x = _random(7, 96, spread=0.3).bfloat16()
    rows, expected = scaled_rows(x, activation), scaled_rows(formula(x.float()))
    assert torch.allclose(rows.scale, expected.scale, rtol=1e-6, atol=0)
    apart = (rows.values.float() - expected.values.float()).abs()
    assert (apart <= (expected.values.float().abs() / 8).clamp_min(2**-9)).all()
    assert (apart > 0).float().mean() < 5e-3


def test_layer_norm_of_the_sum():
    x, branch = _random(2, 5, 64, spread=0.3), _random(2, 5, 64, seed=1, spread=0.3).bfloat16()
    norm = torch.nn.LayerNorm(64, device=DEVICE)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        for other in (branch, None):
            total, rows = scaled_layer_norm(x, other, norm.weight, norm.bias, norm.eps)
            right = x if other is None else x + other
            assert torch.equal(total, right)
            normed = norm(right).double()
            allowed = (HALF_STEP * normed.abs()).clamp_min(2**-10 * rows.scale.double())
            assert ((_values(rows) - normed).abs() <= allowed * 1.01 + 1e-5).all()
    assert scaled_layer_norm(x, None, norm.weight, norm.bias)[0] is x


def _operands(m, n, k, spread=1.0):
    x, weight = scaled_rows(_random(m, k, spread=spread)), scaled_rows(_random(n, k, seed=1))
    return x, weight, torch.randn(n, device=DEVICE).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 16, 16), (7, 48, 32), (70, 64, 96), (5, 16, 3072)], ids=str)
def test_the_product_is_that_of_the_rows(shape, bias):
    x, weight, b = _operands(*shape)
    product = scaled_product(x, weight, b if bias else None, torch.bfloat16).double()
    exact = _values(x) @ _values(weight).t() + (b.double() if bias else 0)
    # one rounding to bfloat16, and sums in float32
    size = _values(x).abs() @ _values(weight).abs().t()
    assert ((product - exact).abs() <= 2**-8 * exact.abs() + SUMS * size + 1e-30).all()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="compares PyTorch's CPU product")
@pytest.mark.parametrize("shape", [(1, 16, 16), (7, 48, 32), (70, 64, 96), (5, 16, 3072)], ids=str)
def test_equals_pytorchs_product(shape):
    """``torch._scaled_mm`` on a CPU, which multiplies as a GPU is asked to: the emulation differs
    by the order of sums in float32, so at most in the last bit of bfloat16."""
    x, weight, bias = _operands(*shape)
    emulated = scaled_product_reference(x, weight, bias, torch.bfloat16).float()
    try:
        theirs = torch._scaled_mm(
            x.values, weight.values.t(), x.scale, weight.scale.t(), bias=bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        ).float()  # fmt: skip
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no such product on a CPU: {error}")
    size = _values(x).abs() @ _values(weight).abs().t()
    assert ((emulated - theirs).abs() <= 2**-7 * theirs.abs() + 1e-5 * size.float()).all()
    # without the bias, which that kernel rounds to bfloat16 before, nearly all bits agree
    emulated = scaled_product_reference(x, weight, None, torch.bfloat16)
    theirs = torch._scaled_mm(
        x.values, weight.values.t(), x.scale, weight.scale.t(), out_dtype=torch.bfloat16
    )
    assert (emulated == theirs).float().mean() > 0.98


def test_leading_axes_and_what_a_gpu_is_asked(monkeypatch):
    """Where the device multiplies float8, rows and scales go to PyTorch's product as they are."""
    x, weight, bias = _operands(6, 32, 48)
    x = ScaledRows(x.values.view(2, 3, 48), x.scale.view(2, 3, 1))
    expected = scaled_product(x, weight, bias, torch.bfloat16)
    assert expected.shape == (2, 3, 32)
    calls = []

    def product(a, b, scale_a, scale_b, *, bias, out_dtype, use_fast_accum):
        assert (a.shape, b.shape) == ((6, 48), (48, 32))
        assert a.is_contiguous()
        assert b.stride() == (1, 48)  # column by column
        assert (scale_a.shape, scale_b.shape) == ((6, 1), (1, 32))
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert bias.dtype == out_dtype == torch.bfloat16
        calls.append(use_fast_accum)
        rows = ScaledRows(a, scale_a), ScaledRows(b.t(), scale_b.t())
        return scaled_product_reference(*rows, bias, out_dtype)

    monkeypatch.setattr(products, "emulated", lambda device: None)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    assert torch.equal(scaled_product(x, weight, bias, torch.bfloat16), expected)
    assert calls == [True]


@pytest.mark.parametrize(("capability", "hip", "has_products"), [
    ((8, 0), None, False), ((8, 6), None, False), ((8, 9), None, True), ((9, 0), None, True),
    ((10, 0), None, True), ((12, 0), None, True), ((9, 4), "6.2", False),
])  # fmt: skip
def test_which_devices_multiply_float8(capability, hip, has_products, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    module._emulated.cache_clear()
    try:
        assert (module.emulated(torch.device("cuda", 0)) is None) == has_products
    finally:
        module._emulated.cache_clear()
    assert "cpu has no" in module.emulated(torch.device("cpu"))


def test_an_index_chooses_rows():
    rows = scaled_rows(_random(3, 4, 16))
    some = rows[:, 1:3]
    assert (some.values.shape, some.scale.shape) == ((3, 2, 16), (3, 2, 1))
    assert torch.equal(_values(some), _values(rows)[:, 1:3])

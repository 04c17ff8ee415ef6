"""bfloat16 in kernels: casts, arithmetic and products, against PyTorch's roundings.

On a GPU the same tests say whether it computes what tests/support/bf16_interpreter.py emulates.
"""

from __future__ import annotations

import kernels_here
import pytest
import torch
import triton
import triton.language as tl
from kernels_here import DEVICE, NATIVE

BF16 = torch.bfloat16
interpreted = pytest.mark.skipif(NATIVE, reason="the interpreter serves where there is no GPU")


@triton.jit
def _copy(p_x, p_y, N: tl.constexpr):
    """Casts: the interpreter rounds what a store of another type is given."""
    o = tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o).to(p_y.dtype.element_ty))


@triton.jit
def _arithmetic(p_x, p_y, p_out, N: tl.constexpr):
    """Rows of out: sum, difference, product, quotient, fma, negative, and the greater."""
    o = tl.arange(0, N)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    tl.store(p_out + o, b_x + b_y)
    tl.store(p_out + N + o, b_x - b_y)
    tl.store(p_out + 2 * N + o, b_x * b_y)
    tl.store(p_out + 3 * N + o, b_x / b_y)
    tl.store(p_out + 4 * N + o, tl.fma(b_x, b_y, b_x))
    tl.store(p_out + 5 * N + o, -b_x)
    tl.store(p_out + 6 * N + o, tl.where(b_x > b_y, b_x, b_y))


@triton.jit
def _constant(p_out, N: tl.constexpr):
    tl.store(p_out + tl.arange(0, N), tl.full([N], 0.1, tl.bfloat16) * 1.0)


@triton.jit
def _product(p_a, p_b, p_out, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_out + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))


@triton.jit
def _sum(p_x, p_out, N: tl.constexpr):
    tl.store(p_out, tl.sum(tl.load(p_x + tl.arange(0, N)), axis=0))


def _random(*shape, dtype=BF16, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)


def _cast(x, dtype):
    y = torch.empty_like(x, dtype=dtype)
    _copy[(1,)](x, y, len(x))
    return y


def _same(x, y):
    """Equal, nan and the sign of a zero included."""
    zero = (x == 0) & (y == 0)
    return bool(((x == y) | (x.isnan() & y.isnan())).all()) and torch.equal(
        x[zero].signbit(), y[zero].signbit()
    )


def _special():
    """float32: ties to either side, carries into the exponent, the largest, subnormals, nan."""
    bits = [
        0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF,  # ties at 1, and beside one
        0x3FFF8000, 0x3FFFFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF,  # carries: 2, infinity
        0x00000001, 0x00008000, 0x00008001, 0x00018000, 0x007FFFFF, 0x00800000,  # subnormals
        0x00000000, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000,  # 0, infinity, nan
    ]  # fmt: skip
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return torch.cat((x, -x, _random(64 - 2 * len(x), dtype=torch.float32).cpu())).to(DEVICE)


def test_casts_to_bfloat16_round_to_the_nearest_even():
    for x in (_special(), _random(4096, dtype=torch.float32), _random(256, dtype=torch.float16)):
        assert _same(_cast(x, BF16), x.to(BF16))
    x = torch.tensor([0, 1, -3, 257, 259, 65535, -(2**30) - 1, 2**31 - 1], device=DEVICE)
    assert _same(_cast(x.int(), BF16), x.int().to(BF16))


def test_casts_from_bfloat16_are_exact():
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).to(DEVICE)
    assert _same(_cast(codes, torch.float32), codes.float())
    small = codes[codes.float().abs() < 1000]
    small = small[: 1 << (len(small).bit_length() - 1)]  # lengths of blocks are powers of two
    assert _same(_cast(small, torch.float16), small.half())
    assert torch.equal(_cast(small, torch.int32), small.int())


def _arithmetic_results():
    x, y = _random(4096, seed=1), _random(4096, seed=2)
    x[:4] = torch.tensor([torch.inf, torch.nan, -0.0, 1e-39], dtype=BF16)
    out = torch.full((7, 4096), torch.nan, dtype=BF16, device=DEVICE)
    _arithmetic[(1,)](x, y, out, 4096)
    return x, y, out


def _arithmetic_expected(x, y):
    """In float64, whose digits are more than twice those of bfloat16: rounding twice is as once."""
    a, b = x.double(), y.double()
    results = a + b, a - b, a * b, a / b, a * b + a, 0 - a
    return *(r.to(BF16) for r in results), torch.where(x > y, x, y)


def test_arithmetic_rounds_once():
    x, y, out = _arithmetic_results()
    for n, right in enumerate(_arithmetic_expected(x, y)):
        assert _same(out[n], right), n


def test_constants_round():
    out = torch.zeros(16, dtype=BF16, device=DEVICE)
    _constant[(1,)](out, 16)
    assert (out == torch.tensor(0.1, dtype=BF16, device=DEVICE)).all()


def _products(n=32):
    a, b = _random(n, n, seed=3), _random(n, n, seed=4)
    out = torch.full((n, n), torch.nan, device=DEVICE)
    _product[(1,)](a, b, out, n)
    return out.double(), a.double() @ b.double()


def test_products_are_summed_in_float32():
    out, exact = _products()
    assert (out - exact).abs().max() < 1e-6 * exact.abs().max()


@interpreted
def test_sums_in_bfloat16_are_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="cast to float32 before it"):
        _sum[(1,)](_random(16), torch.zeros(1, dtype=BF16), 16)


@interpreted
def test_the_interpreter_alone_is_wrong():
    """Where one of these becomes right, there is less to emulate."""
    with kernels_here.bf16_interpreter.removed():
        x = _random(4096, dtype=torch.float32)
        cut = (x.view(torch.int32) >> 16).to(torch.int16).view(BF16)
        assert _same(_cast(x, BF16), cut)
        out, exact = _products()
        assert (out - exact).abs().max() > exact.abs().max()
        x, y, out = _arithmetic_results()
        for n, right in enumerate(_arithmetic_expected(x, y)):
            assert not _same(out[n], right), n
    test_products_are_summed_in_float32()

"""Rows in float8 (e4m3) with a scale each, after an activation.

    scale_i = max(max_j |f(x_ij)| / 448, 2^-126),  value_ij = f(x_ij) / scale_i  rounded to e4m3

448 is the largest e4m3, so that nothing saturates: an outlier takes digits from the rest of its
row only. The least scale keeps rows of zeros from a division by 0. NaN or infinity anywhere in a
row make its scale NaN, so that every product of that row, and of no other, is NaN.

The inverse of a scale is rounded once (``div_rn``), as PyTorch's calls do on every device: with no
activation the bits are the same everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from . import scaled_rows_plan as plan

_LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(2.0**-126)
_ROOT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def activated(b_x, ACTIVATION: tl.constexpr):
    """The erf GELU or QuickGELU of a float32 block, or the block."""
    if ACTIVATION == "gelu":
        b_x = 0.5 * b_x * (1.0 + tl.erf(b_x * _ROOT_HALF))
    if ACTIVATION == "quick_gelu":
        b_x = b_x / (1.0 + tl.exp(-1.702 * b_x))
    return b_x


@triton.jit
def nearest(b_y):
    """A float32 block of at most 448 rounded to the values that e4m3 has, ties to even.

    Adding and subtracting 1.5 * 2^23 steps leaves whole steps; a step is 1/8 of the power of two
    below, and 2^-9 below 2^-6.
    """
    b_exponent = tl.maximum(b_y.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    b_shift = b_exponent.to(tl.float32, bitcast=True) * (1.5 * 2.0**20)
    return (b_y + b_shift) - b_shift


@triton.jit
def scaled(b_y, ROUND: tl.constexpr):
    """Scales [BR] and e4m3 values [BR, BD] of float32 rows [BR, BD], which are 0 beyond their end.

    A maximum need not show NaN; a sum of |y| * 0 does, and infinity as NaN, too.
    """
    b_size = tl.abs(b_y)
    b_scale = tl.maximum(tl.max(b_size, axis=1) * (1.0 / _LARGEST), _LEAST)
    b_scale += tl.sum(b_size * 0.0, axis=1)
    b_y *= tl.div_rn(1.0, b_scale)[:, None]
    if ROUND:
        b_y = nearest(b_y)
    return b_scale, b_y.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["n"])
def _rows_in_float8_kernel(
    p_x, p_values, p_scale, s_n, n, D,
    ACTIVATION: tl.constexpr, ROUND: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BR rows: e4m3 values [n, D] and scales [n]."""
    i_n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_x = (i_n < n)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + i_n[:, None] * s_n + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_scale, b_values = scaled(activated(b_x, ACTIVATION), ROUND)
    tl.store(p_values + i_n[:, None] * D + o_d[None, :], b_values, mask=m_x)
    tl.store(p_scale + i_n, b_scale, mask=i_n < n)


def scaled_rows(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Values [..., D] in e4m3 and scales [..., 1] in float32 of x [..., D] after an activation."""
    values, scale = empty_rows(x)
    rows = side_by_side(x)
    n, width = rows.shape
    rowwise = plan.rows(n, width, x.device.type == "cpu", activation)
    launch.run(_rows_in_float8_kernel, rowwise, rows, values, scale, rows.stride(0), n, width)
    return values, scale


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised values and scales of rows like x [..., D]."""
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def side_by_side(x: Tensor) -> Tensor:
    """x [..., D] as rows [n, D] whose values lie side by side, if possible a view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()

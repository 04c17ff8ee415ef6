"""A branch added to the residual stream, and the LayerNorm of the sum in float8, in one pass.

    t = x + y,  n = w (t - mean) rstd + b,  rstd = (var + eps)^-1/2, var = mean of (t - mean)²
    n in e4m3 with a scale a row, as scaled_rows.py has it

Without gradients: what follows multiplies frozen weights. The normalised tokens are never written
in another type.

Source: Ba et al., "Layer Normalization", 2016.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from . import scaled_rows_plan as plan
from .scaled_rows import empty_rows, scaled, side_by_side


@triton.jit(do_not_specialize=["n"])
def _normalise_in_float8_kernel(
    p_x, p_y, p_w, p_b, p_total, p_values, p_scale, sx, sy, n, D, eps,
    ROUND: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BR rows: their sum [n, D] where there is a branch, e4m3 values [n, D] and scales [n]."""
    i_n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_t = (i_n < n)[:, None] & m_d[None, :]
    b_t = tl.load(p_x + i_n[:, None] * sx + o_d[None, :], mask=m_t, other=0.0).to(tl.float32)
    if p_y is not None:
        p_branch = p_y + i_n[:, None] * sy + o_d[None, :]
        b_sum = b_t + tl.load(p_branch, mask=m_t, other=0.0).to(tl.float32)
        b_sum = b_sum.to(p_total.dtype.element_ty)
        tl.store(p_total + i_n[:, None] * D + o_d[None, :], b_sum, mask=m_t)
        b_t = b_sum.to(tl.float32)  # what the next block reads is what is normalised
    b_mean = tl.sum(b_t, axis=1) / D
    b_t = tl.where(m_d[None, :], b_t - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_t * b_t, axis=1) / D + eps)
    b_w = tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale, b_values = scaled(b_t * b_rstd[:, None] * b_w[None, :] + b_b[None, :], ROUND)
    tl.store(p_values + i_n[:, None] * D + o_d[None, :], b_values, mask=m_t)
    tl.store(p_scale + i_n, b_scale, mask=i_n < n)


def scaled_layer_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum [..., D] of residual and branch ([0] without one), and its LayerNorm as e4m3 values
    [..., D] and scales [..., 1] in float32."""
    kind, shape = residual.dtype, residual.shape
    x, y = side_by_side(residual), None
    if branch is not None:
        kind, y = torch.promote_types(kind, branch.dtype), side_by_side(branch)
    total = torch.empty((0,) if y is None else shape, dtype=kind, device=residual.device)
    values, scale = empty_rows(residual)
    n, width = x.shape
    launch.run(
        _normalise_in_float8_kernel, plan.rows(n, width, x.device.type == "cpu"), x, y, weight,
        bias, total, values, scale, x.stride(0), 0 if y is None else y.stride(0), n, width, eps,
    )  # fmt: skip
    return total, values, scale

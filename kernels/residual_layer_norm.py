"""A branch added to the residual stream, and the LayerNorm of the sum, in one pass; the gradients.

    t = x + y,  n = w (t - mean) rstd + b,  rstd = (var + eps)^-1/2, var = mean of (t - mean)²
    h = w dn,   dt = rstd (h - mean of h - t̂ mean of (h t̂)) + dt',   t̂ = (t - mean) rstd
    dw = sum over the rows of dn t̂,  db = sum over the rows of dn

dt' is the gradient at t by its other uses; dx = dy = dt. A row stays in registers. The variance is
of centred values: a mean of squares less a squared mean loses digits where the mean is large.

Source: Ba et al., "Layer Normalization", 2016.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from . import residual_layer_norm_plan as plan


@triton.jit(do_not_specialize=["n"])
def _normalise_kernel(
    p_x, p_y, p_w, p_b, p_total, p_normed, p_stats, sx_b, sx_t, sy_b, sy_t, n, T, D, eps,
    BD: tl.constexpr,
):  # fmt: skip
    """A row: its sum, the LayerNorm of that, mean and rstd to stats [2, n]."""
    i_row = tl.program_id(0)
    i, i_b, i_t = i_row.to(tl.int64), (i_row // T).to(tl.int64), (i_row % T).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_t = tl.load(p_x + i_b * sx_b + i_t * sx_t + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_y is not None:
        p_y += i_b * sy_b + i_t * sy_t
        b_t += tl.load(p_y + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_sum = b_t.to(p_total.dtype.element_ty)
        tl.store(p_total + i * D + o_d, b_sum, mask=m_d)
        b_t = b_sum.to(tl.float32)  # what the next block reads is what is normalised
    mean = tl.sum(b_t, axis=0) / D
    b_t = tl.where(m_d, b_t - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(b_t * b_t, axis=0) / D + eps)
    b_n = b_t * rstd
    if p_w is not None:
        b_n *= tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_b is not None:
        b_n += tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_normed + i * D + o_d, b_n.to(p_normed.dtype.element_ty), mask=m_d)
    tl.store(p_stats + i, mean)
    tl.store(p_stats + n + i, rstd)


@triton.jit(do_not_specialize=["n"])
def _row_gradients_kernel(
    p_dn, p_dt, p_total, p_stats, p_w, p_grad, p_branch, p_parts,
    sn_b, sn_t, sd_b, sd_t, st_b, st_t, n, T, D, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the gradient at the sum, in its type and in the branch's, and the rows' part
    [2, D] of dw and db; each where its pointer is not None."""
    i_p = tl.program_id(0)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    if p_w is not None:
        b_w = tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dw, b_db = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for r in range(ROWS):
        i_row = i_p * ROWS + r
        i, i_b, i_t = i_row.to(tl.int64), (i_row // T).to(tl.int64), (i_row % T).to(tl.int64)
        m = m_d & (i_row < n)
        b_t = tl.load(p_total + i_b * st_b + i_t * st_t + o_d, mask=m, other=0.0).to(tl.float32)
        b_dn = tl.load(p_dn + i_b * sn_b + i_t * sn_t + o_d, mask=m, other=0.0).to(tl.float32)
        mean = tl.load(p_stats + i, mask=i_row < n, other=0.0)
        rstd = tl.load(p_stats + n + i, mask=i_row < n, other=0.0)
        b_t = tl.where(m_d, (b_t - mean) * rstd, 0.0)
        if p_parts is not None:
            b_dw += b_dn * b_t
            b_db += b_dn
        if (p_grad is not None) or (p_branch is not None):
            if p_w is not None:
                b_dn *= b_w
            b_g = b_dn - tl.sum(b_dn, axis=0) / D - b_t * (tl.sum(b_dn * b_t, axis=0) / D)
            b_g *= rstd
            if p_dt is not None:
                p_other = p_dt + i_b * sd_b + i_t * sd_t
                b_g += tl.load(p_other + o_d, mask=m, other=0.0).to(tl.float32)
            if p_grad is not None:
                tl.store(p_grad + i * D + o_d, b_g.to(p_grad.dtype.element_ty), mask=m)
            if p_branch is not None:
                tl.store(p_branch + i * D + o_d, b_g.to(p_branch.dtype.element_ty), mask=m)
    if p_parts is not None:
        p_parts += i_p.to(tl.int64) * 2 * D
        tl.store(p_parts + o_d, b_dw, mask=m_d)
        tl.store(p_parts + D + o_d, b_db, mask=m_d)


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [B, T, D] with channels side by side, if possible a view."""
    x = x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def residual_layer_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of residual and branch [..., D], its LayerNorm in ``dtype``, and stats [2, rows].

    The sum is [0] without a branch; mean and reciprocal deviation are in float32.
    """
    device, x, y = residual.device, _rows(residual), None if branch is None else _rows(branch)
    kind = residual.dtype
    if branch is not None:
        kind = torch.promote_types(residual.dtype, branch.dtype)
    total = torch.empty((0,) if y is None else residual.shape, dtype=kind, device=device)
    normed = torch.empty(residual.shape, dtype=dtype, device=device)
    n, tokens, width = x.shape[0] * x.shape[1], x.shape[1], x.shape[2]
    stats = torch.empty((2, n), dtype=torch.float32, device=device)
    launch.run(
        _normalise_kernel, plan.rows(n, width), x, y, weight, bias, total, normed, stats,
        *x.stride()[:2], *((0, 0) if y is None else y.stride()[:2]), n, tokens, width, eps,
    )  # fmt: skip
    return total, normed, stats


def residual_layer_norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, stats: Tensor,
    weight: Tensor | None, branch_dtype: torch.dtype, to_total: bool, to_branch: bool,
    to_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients at the sum, in its type and in ``branch_dtype``, and [2, D] on weight and bias.

    What is not asked for is [0].
    """
    device, t, up = total.device, _rows(total), _rows(grad_normed)
    other = None if grad_total is None else _rows(grad_total)
    n, tokens, width = t.shape[0] * t.shape[1], t.shape[1], t.shape[2]
    grad = torch.empty(total.shape if to_total else (0,), dtype=total.dtype, device=device)
    branch = torch.empty(total.shape if to_branch else (0,), dtype=branch_dtype, device=device)
    rowwise = plan.gradient(n, width, to_affine)
    shape = (rowwise.grid[0], 2, width) if to_affine else (0,)
    parts = torch.empty(shape, dtype=torch.float32, device=device)
    launch.run(
        _row_gradients_kernel, rowwise, up, other, t, stats, weight, grad if to_total else None,
        branch if to_branch else None, parts if to_affine else None, *up.stride()[:2],
        *((0, 0) if other is None else other.stride()[:2]), *t.stride()[:2], n, tokens, width,
    )  # fmt: skip
    return grad, branch, parts.sum(dim=0) if to_affine else parts

"""Statistics of every head's attention scores, the bootstrap loss, and their gradients.

A head has few channels and many tokens, so no score is formed. With mean tokens q, k and population
covariances C_Q, C_K of a block's queries and keys, N = |I| |J| scores S = c q k':

    mean = c q.k,  variance = c^2 (q' C_K q + k' C_Q k + <C_Q, C_K>) N / (N - 1)
    dq_i = |J| [a k + b (C_K q_i + ((q_i - q).k) k)],  a = c dmean / N, b = c^2 dstd / (std (N - 1))

and dk_j alike. No term of the variance is negative and tokens are centred before they are
multiplied, so nothing cancels; K'K q_i - |J| (q.k) k, equal on paper, would.

Source: ABPEM, attention bootstrapping; the closed form is ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from . import score_moments_per_head_plan as plan
from .score_blocks import block_gradient, bootstrap_loss


@triton.jit
def _span(m, SPANS: tl.constexpr):
    """First token and token count of modality m.

    The compiler does not see their values: it would unroll loops of a constant length until
    registers spill.
    """
    first, count = m * 0, m * 0
    for n in tl.static_range(len(SPANS)):
        first = tl.where(m > n, first + SPANS[n], first)
        count = tl.where(m == n, SPANS[n], count)
    return first, count


@triton.jit
def _mean_token(p_x, s_t, s_d, first, count, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """Mean [BD] of count tokens from first on."""
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    b_sum = tl.zeros([BT, BD], tl.float32)
    for o in range(0, count, BT):
        m_x = (o + o_t < count)[:, None] & (o_d < D)[None, :]
        p_tokens = p_x + (first + o + o_t)[:, None] * s_t + o_d[None, :] * s_d
        b_sum += tl.load(p_tokens, mask=m_x, other=0.0).to(tl.float32)
    return tl.sum(b_sum, axis=0) / count


@triton.jit
def _covariance(
    p_x, s_t, s_d, first, count, b_mean, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    HALF: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Population covariance [BD, BD] of count tokens from first on.

    With EXACT, half types split centred tokens into two numbers, high + rest: rounded to one, they
    would lose 2e-5 of the variance at 512 x 196, and more on fewer tokens. Both operands are
    loaded: transposing a computed one fails to compile for sm_100 with Triton 3.6.
    """
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    b_c = tl.zeros([BD, BD], tl.float32)
    b_low = tl.zeros([BD, BD], tl.float32)
    for o in range(0, count, BT):
        m_t, m_d = o + o_t < count, o_d < D
        o_x = (first + o + o_t) * s_t
        m_x = m_t[:, None] & m_d[None, :]
        b_x = tl.load(p_x + o_x[:, None] + (o_d * s_d)[None, :], mask=m_x, other=0.0)
        m_y = m_d[:, None] & m_t[None, :]
        b_y = tl.load(p_x + o_x[None, :] + (o_d * s_d)[:, None], mask=m_y, other=0.0)
        dtype = b_x.dtype
        b_x = tl.where(m_x, b_x.to(tl.float32) - b_mean[None, :], 0.0)
        b_y = tl.where(m_y, b_y.to(tl.float32) - b_mean[:, None], 0.0)
        if HALF:
            b_high = b_x.to(dtype)
            b_c = tl.dot(b_y.to(dtype), b_high, b_c)
            if EXACT:
                b_rest = (b_x - b_high.to(tl.float32)).to(dtype)
                b_low = tl.dot(b_y.to(dtype), b_rest, b_low)
        else:
            b_c = tl.dot(b_y, b_x, b_c, input_precision=PRECISION)
    if HALF and EXACT:
        b_c += b_low + tl.trans(b_low)
    return b_c / count


@triton.jit
def _moments_kernel(
    p_q, p_k, p_mean, p_std, p_loss, p_anchor_mean, p_anchor_std,
    sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, c,
    SPANS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_QUERY: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """All blocks of one head of one sample, and its loss."""
    M: tl.constexpr = len(SPANS)
    i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_q += i_b * sq_b + i_h * sq_h
    p_k += i_b * sk_b + i_h * sk_h
    o_b = tl.arange(0, BB)
    b_mean, b_variance = tl.zeros([BB], tl.float32), tl.zeros([BB], tl.float32)
    # compute a key's covariance again for every i: those of all j together would spill
    for i in range(M):
        first, rows = _span(i, SPANS)
        b_q_mean = _mean_token(p_q, sq_t, sq_d, first, rows, D, BD, BT)
        b_q = _covariance(p_q, sq_t, sq_d, first, rows, b_q_mean, D, BD, BT, HALF, True, PRECISION)
        for j in range(M):
            first, columns = _span(j, SPANS)
            b_k_mean = _mean_token(p_k, sk_t, sk_d, first, columns, D, BD, BT)
            b_k = _covariance(
                p_k, sk_t, sk_d, first, columns, b_k_mean, D, BD, BT, HALF, True, PRECISION
            )
            b_terms = b_q * (b_k + b_k_mean[:, None] * b_k_mean[None, :])
            variance = tl.sum(b_terms + b_k * (b_q_mean[:, None] * b_q_mean[None, :]))
            variance = tl.where(variance < 0, 0.0, variance)  # of round-off; nan stays
            count = (rows * columns).to(tl.float32)
            m_block = o_b == i * M + j
            b_mean = tl.where(m_block, c * tl.sum(b_q_mean * b_k_mean, axis=0), b_mean)
            b_variance = tl.where(m_block, c * c * variance * (count / (count - 1.0)), b_variance)
    index = i_b * tl.num_programs(0) + i_h
    o_stats = index * M * M + o_b
    tl.store(p_mean + o_stats, b_mean, mask=o_b < M * M)
    tl.store(p_std + o_stats, tl.sqrt(b_variance), mask=o_b < M * M)
    if p_loss is not None:
        if p_anchor_mean is not None:
            p_anchor_mean += i_h * M
            p_anchor_std += i_h * M
        loss = bootstrap_loss(b_mean, b_variance, p_anchor_mean, p_anchor_std, M, BB, PAIR_QUERY)
        tl.store(p_loss + index, loss)


@triton.jit
def _head_gradient(
    p_x, p_y, p_out, p_grad, p_mean, p_std, p_anchor_mean, p_anchor_std, p_grad_mean, p_grad_std,
    sx_t, sx_d, sy_t, sy_d, so_t, so_d, s_grad, i_b, i_h, H, c,
    SPANS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_QUERY: tl.constexpr, SELF: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of one head of one sample, from x = q and y = k; with KEYS dk, from x = k and y = q."""
    M: tl.constexpr = len(SPANS)
    o_stats = (i_b * H + i_h) * M * M
    upstream = 0.0
    if p_grad is not None:
        upstream = tl.load(p_grad + i_b * s_grad).to(tl.float32) / H
    if p_grad_mean is not None:
        p_grad_mean += o_stats
        p_grad_std += o_stats
    if p_anchor_mean is not None:
        p_anchor_mean += i_h * M
        p_anchor_std += i_h * M
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    m_diagonal = o_d[:, None] == o_d[None, :]
    for a in range(M):
        first, rows = _span(a, SPANS)
        b_x_mean = _mean_token(p_x, sx_t, sx_d, first, rows, D, BD, BT)
        b_constant, scale = tl.zeros([BD], tl.float32), 0.0
        b_matrix = tl.zeros([BD, BD], tl.float32)
        for n in range(M if SELF else M - 1):
            o = n if SELF else n + (n >= a)
            other, columns = _span(o, SPANS)
            i, j = (o, a) if KEYS else (a, o)
            grad_mean, grad_std = block_gradient(
                upstream, p_mean + o_stats, p_std + o_stats, p_anchor_mean, p_anchor_std,
                p_grad_mean, p_grad_std, i, j, M, PAIR_QUERY,
            )  # fmt: skip
            std = tl.load(p_std + o_stats + i * M + j)
            alpha = c * grad_mean / rows  # a |J| and b |J| of the formula above
            beta = c * c * tl.where(std > 0, grad_std / std, 0.0)
            beta *= columns / ((rows * columns).to(tl.float32) - 1.0)
            b_y_mean = _mean_token(p_y, sy_t, sy_d, other, columns, D, BD, BT)
            b_c = _covariance(
                p_y, sy_t, sy_d, other, columns, b_y_mean, D, BD, BT, HALF, False, PRECISION
            )
            b_constant += alpha * b_y_mean + beta * tl.sum(b_x_mean[:, None] * b_c, axis=0)
            b_c += b_y_mean[:, None] * b_y_mean[None, :]
            b_matrix += beta * b_c
            # no entry of a positive semi-definite matrix exceeds its trace
            scale += tl.abs(beta) * tl.sum(tl.where(m_diagonal, b_c, 0.0))
        none = scale < 1e-37  # false for nan
        b_matrix = tl.where(none, 0.0, b_matrix / scale)
        for o in range(0, rows, BT):
            m_x = (o + o_t < rows)[:, None] & (o_d < D)[None, :]
            o_x = first + o + o_t
            b_x = tl.load(p_x + o_x[:, None] * sx_t + (o_d * sx_d)[None, :], mask=m_x, other=0.0)
            dtype = b_x.dtype
            b_x = tl.where(m_x, b_x.to(tl.float32) - b_x_mean[None, :], 0.0)
            if HALF:
                b_out = tl.dot(b_x.to(dtype), b_matrix.to(dtype))
            else:
                b_out = tl.dot(b_x, b_matrix, input_precision=PRECISION)
            b_out = scale * b_out + b_constant[None, :]
            p_rows = p_out + o_x[:, None] * so_t + (o_d * so_d)[None, :]
            tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit
def _gradient_kernel(
    p_q, p_k, p_dq, p_dk, p_grad, p_mean, p_std, p_anchor_mean, p_anchor_std, p_grad_mean,
    p_grad_std, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sdq_b, sdq_h, sdq_t, sdq_d,
    sdk_b, sdk_h, sdk_t, sdk_d, s_grad, H, c,
    SPANS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_QUERY: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """Even programs compute dq, odd ones dk.

    Two calls: with pointers that are selected at run time Triton 3.6 fails to compile for gfx942.
    """
    i_h = (tl.program_id(0) // 2).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    p_q += i_b * sq_b + i_h * sq_h
    p_k += i_b * sk_b + i_h * sk_h
    if tl.program_id(0) % 2 == 0:
        _head_gradient(
            p_q, p_k, p_dq + i_b * sdq_b + i_h * sdq_h, p_grad, p_mean, p_std, p_anchor_mean,
            p_anchor_std, p_grad_mean, p_grad_std, sq_t, sq_d, sk_t, sk_d, sdq_t, sdq_d, s_grad,
            i_b, i_h, H, c, SPANS, D, BD, BT, HALF, PRECISION, PAIR_QUERY, SELF, False,
        )  # fmt: skip
    else:
        _head_gradient(
            p_k, p_q, p_dk + i_b * sdk_b + i_h * sdk_h, p_grad, p_mean, p_std, p_anchor_mean,
            p_anchor_std, p_grad_mean, p_grad_std, sk_t, sk_d, sq_t, sq_d, sdk_t, sdk_d, s_grad,
            i_b, i_h, H, c, SPANS, D, BD, BT, HALF, PRECISION, PAIR_QUERY, SELF, True,
        )  # fmt: skip


def _half(q: Tensor) -> bool:
    return q.dtype != torch.float32


def moments_and_loss(
    q: Tensor, k: Tensor, spans: list[int], scale: float, loss: Tensor | None,
    pair_query: bool, anchor_mean: Tensor | None, anchor_std: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward of each head: mean and std [B, H, M, M] in float32.

    Arguments as in score_moments.moments_and_loss, but loss [B, H] and anchors [H, M].
    """
    batch, heads, _, d = q.shape
    shape = (batch, heads, len(spans), len(spans))
    mean = torch.empty(shape, dtype=torch.float32, device=q.device)
    std = torch.empty_like(mean)
    if batch:
        sizes = batch, heads, spans, d
        launch_plan = plan.moments(launch.architecture(q), _half(q), *sizes, pair_query)
        launch.run(
            _moments_kernel, launch_plan, q, k, mean, std, loss, anchor_mean, anchor_std,
            *q.stride(), *k.stride(), scale,
        )  # fmt: skip
    return mean, std


def gradients(
    q: Tensor, k: Tensor, mean: Tensor, std: Tensor, spans: list[int], scale: float,
    grad: Tensor | None, grad_mean: Tensor | None, grad_std: Tensor | None,
    pair_query: bool, anchor_mean: Tensor | None, anchor_std: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward of each head: dq and dk, as q and k.

    Arguments as in score_moments.gradients, but moments [B, H, M, M] and anchors [H, M].
    """
    batch, heads, _, d = q.shape
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    if batch:
        which = launch.architecture(q), _half(q), batch, heads
        launch_plan = plan.gradients(*which, spans, d, grad is None, pair_query)
        launch.run(
            _gradient_kernel, launch_plan, q, k, dq, dk, grad, mean, std, anchor_mean, anchor_std,
            grad_mean, grad_std, *q.stride(), *k.stride(), *dq.stride(), *dk.stride(),
            0 if grad is None else grad.stride(0), heads, scale,
        )  # fmt: skip
    return dq, dk

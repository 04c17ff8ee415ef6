"""Statistics of every head's attention scores, the bootstrap loss, and their gradients.

A head has few channels and many tokens, so no score is formed. With mean tokens q, k and population
covariances C_Q, C_K of a block's queries and keys, N = |I| |J| scores S = c q k':

    mean = c q.k,  variance = c^2 (q' C_K q + k' C_Q k + <C_Q, C_K>) N / (N - 1)
    dq_i = |J| [a k + b (C_K q_i + ((q_i - q).k) k)],  a = c dmean / N, b = c^2 dstd / (std (N - 1))

and dk_j alike. No term of the variance is negative and tokens are shifted before they are
multiplied, so nothing cancels; K'K q_i - |J| (q.k) k, equal on paper, would.

Both directions begin with every modality's covariance and mean: token_moments, a launch of its own,
whose many small programs read each token once.

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
def _load_tokens(p_x, o_x, s_t, s_d, last, D: tl.constexpr, BD: tl.constexpr):
    """Tokens o_x [BT] below last, as [BT, BD]; 0 beyond them and beyond D channels."""
    o_d = tl.arange(0, BD)
    m_x = (o_x < last)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_x[:, None] * s_t + (o_d * s_d)[None, :], mask=m_x, other=0.0), m_x


@triton.jit
def _along_rows(b_x, BD: tl.constexpr):
    """b_x [BD], as sums along rows are laid out, as a column [BD, 1]."""
    o_d = tl.arange(0, BD)
    b_diagonal = tl.where(o_d[:, None] == o_d[None, :], b_x[None, :], 0.0)
    return tl.sum(b_diagonal, axis=1)[:, None]


@triton.jit
def _one_modality(
    p_x, p_out, s_t, s_d, first, count,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """Population covariance and mean of count tokens from first on, in one pass about a shift.

    The shift s is the mean of the first BT tokens. It loses no digits: the sum of squares about it
    is n (C + (m - s)(m - s)'), and whatever the tokens are, (m - s)^2 is at most n / BT - 1 times a
    channel's variance: 15 at 512 tokens, and about 1 / BT where the first tokens are like the
    others. About a single token it would be up to n times the variance, where that token is an
    outlier. The mean of the first tokens is taken about the first one, so that equal tokens have
    no variance at all.

    Half types split shifted tokens into two numbers, high + rest: rounded to one, they would lose
    2e-5 of the variance at 512 x 196, and more on fewer tokens. The shift is rounded to their type,
    so that nearly every high + rest is exact. Squares of rests are added in bfloat16, where they
    are 4e-6 of the variance; in float16 they are below what float32 holds. With TWICE both operands
    of a product are loaded: transposing a computed one fails to compile for sm_100 with Triton 3.6.
    """
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    last = first + count
    b_first = tl.load(p_x + first * s_t + o_d * s_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_x, m_x = _load_tokens(p_x, first + o_t, s_t, s_d, last, D, BD)
    b_x = tl.where(m_x, b_x.to(tl.float32) - b_first[None, :], 0.0)
    b_shift = b_first + tl.sum(b_x, axis=0) / tl.minimum(count, BT).to(tl.float32)
    if HALF:
        b_shift = b_shift.to(p_x.dtype.element_ty).to(tl.float32)
    if TWICE:
        b_shift_across = _along_rows(b_shift, BD)
    b_sum = tl.zeros([BT, BD], tl.float32)
    b_c = tl.zeros([BD, BD], tl.float32)
    b_low = tl.zeros([BD, BD], tl.float32)
    for o in range(0, count, BT):
        b_x, m_x = _load_tokens(p_x, first + o + o_t, s_t, s_d, last, D, BD)
        dtype = b_x.dtype
        b_x = tl.where(m_x, b_x.to(tl.float32) - b_shift[None, :], 0.0)
        b_sum += b_x
        if TWICE:
            o_x = (first + o + o_t)[None, :] * s_t + o_d[:, None] * s_d
            m_across = (first + o + o_t < last)[None, :] & (o_d < D)[:, None]
            b_across = tl.load(p_x + o_x, mask=m_across, other=0.0).to(tl.float32)
            b_across_x = tl.where(m_across, b_across - b_shift_across, 0.0)
            b_across = b_across_x.to(dtype)
        else:
            b_across = tl.trans(b_x.to(dtype))
        if HALF:
            b_high = b_x.to(dtype)
            b_rest = (b_x - b_high.to(tl.float32)).to(dtype)
            b_c = tl.dot(b_across, b_high, b_c)
            b_low = tl.dot(b_across, b_rest, b_low)
            if dtype == tl.bfloat16:
                if TWICE:
                    b_rest_across = (b_across_x - b_across.to(tl.float32)).to(dtype)
                else:
                    b_rest_across = tl.trans(b_rest)
                b_c = tl.dot(b_rest_across, b_rest, b_c)
        else:
            b_c = tl.dot(b_across, b_x, b_c, input_precision=PRECISION)
    if HALF:
        b_c += b_low + tl.trans(b_low)
    b_rest_mean = tl.sum(b_sum, axis=0) / count
    p_c = p_out + o_d[:, None] * D + o_d[None, :]
    m_d = o_d < D
    b_c = b_c / count - _along_rows(b_rest_mean, BD) * b_rest_mean[None, :]
    tl.store(p_c, b_c, mask=m_d[:, None] & m_d[None, :])
    tl.store(p_out + D * D + o_d, b_shift + b_rest_mean, mask=m_d)


@triton.jit
def _token_moments_kernel(
    p_q, p_k, p_tokens, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, H,
    SPANS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """Covariance and mean of one modality's queries or keys of a head of a sample.

    Two calls: with pointers that are selected at run time Triton 3.6 fails to compile for gfx942.
    """
    M: tl.constexpr = len(SPANS)
    i_h, i_x = (tl.program_id(0) % H).to(tl.int64), tl.program_id(0) // H
    i_b = tl.program_id(1).to(tl.int64)
    first, count = _span(i_x // 2, SPANS)
    p_tokens += ((i_b * H + i_h) * 2 * M + i_x // 2) * ((D + 1) * D)
    if i_x % 2 == 0:
        p_q += i_b * sq_b + i_h * sq_h
        _one_modality(p_q, p_tokens, sq_t, sq_d, first, count, D, BD, BT, HALF, PRECISION, TWICE)
    else:
        p_k += i_b * sk_b + i_h * sk_h
        p_tokens += M * ((D + 1) * D)
        _one_modality(p_k, p_tokens, sk_t, sk_d, first, count, D, BD, BT, HALF, PRECISION, TWICE)


@triton.jit
def _covariance(p_tokens, m, D: tl.constexpr, BD: tl.constexpr):
    """Covariance [BD, BD], and mean [BD] along its rows and along its columns, of modality m."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_tokens += m * ((D + 1) * D)
    p_c = p_tokens + o_d[:, None] * D + o_d[None, :]
    b_c = tl.load(p_c, mask=m_d[:, None] & m_d[None, :], other=0.0)
    b_column = tl.load(p_tokens + D * D + o_d[:, None], mask=m_d[:, None], other=0.0)
    b_row = tl.load(p_tokens + D * D + o_d[None, :], mask=m_d[None, :], other=0.0)
    return b_c, b_column, b_row


@triton.jit
def _moments_kernel(
    p_tokens, p_mean, p_std, p_loss, p_anchor_mean, p_anchor_std, c,
    SPANS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAIR_QUERY: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """All blocks of one head of one sample, and its loss."""
    M: tl.constexpr = len(SPANS)
    i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = i_b * tl.num_programs(0) + i_h
    p_queries = p_tokens + index * 2 * M * ((D + 1) * D)
    p_keys = p_queries + M * ((D + 1) * D)
    o_b = tl.arange(0, BB)
    b_mean, b_variance = tl.zeros([BB], tl.float32), tl.zeros([BB], tl.float32)
    for n in range(M * M):
        i, j = n // M, n % M
        b_q, b_q_column, b_q_row = _covariance(p_queries, i, D, BD)
        b_k, b_k_column, b_k_row = _covariance(p_keys, j, D, BD)
        b_terms = b_q * (b_k + b_k_column * b_k_row) + b_k * (b_q_column * b_q_row)
        variance = tl.sum(b_terms)
        variance = tl.where(variance < 0, 0.0, variance)  # of round-off; nan stays
        _, rows = _span(i, SPANS)
        _, columns = _span(j, SPANS)
        count = (rows * columns).to(tl.float32)
        b_mean = tl.where(o_b == n, c * tl.sum(b_q_row * b_k_row), b_mean)
        b_variance = tl.where(o_b == n, c * c * variance * (count / (count - 1.0)), b_variance)
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
def _modality_gradient(
    p_x, p_own, p_other, p_out, p_grad, p_mean, p_std, p_anchor_mean, p_anchor_std, p_grad_mean,
    p_grad_std, sx_t, sx_d, so_t, so_d, s_grad, a, i_b, i_h, H, c,
    SPANS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_QUERY: tl.constexpr, SELF: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of modality a, from x = q and moments of q and of the others k; with KEYS dk, alike.

    Half types are multiplied as they are: (x - m) M = x M - m M, with the same rounded M in both
    products, loses what float32 loses of the mean, and the types cannot hold a mean of more than
    256 (bfloat16) or 2048 (float16) deviations anyway. float32 tokens are centred first.
    """
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
    first, rows = _span(a, SPANS)
    p_own += a * ((D + 1) * D) + D * D
    b_column = tl.load(p_own + o_d[:, None], mask=(o_d < D)[:, None], other=0.0)
    b_constant, scale = tl.zeros([1, BD], tl.float32), 0.0
    b_matrix = tl.zeros([BD, BD], tl.float32)
    for n in range(M if SELF else M - 1):
        o = n if SELF else n + (n >= a)
        _, columns = _span(o, SPANS)
        i, j = (o, a) if KEYS else (a, o)
        grad_mean, grad_std = block_gradient(
            upstream, p_mean + o_stats, p_std + o_stats, p_anchor_mean, p_anchor_std,
            p_grad_mean, p_grad_std, i, j, M, PAIR_QUERY,
        )  # fmt: skip
        std = tl.load(p_std + o_stats + i * M + j)
        alpha = c * grad_mean / rows  # a |J| and b |J| of the formula above
        beta = c * c * tl.where(std > 0, grad_std / std, 0.0)
        beta *= columns / ((rows * columns).to(tl.float32) - 1.0)
        b_c, b_y_column, b_y_row = _covariance(p_other, o, D, BD)
        b_constant += alpha * b_y_row + beta * tl.sum(b_column * b_c, axis=0)[None, :]
        b_c += b_y_column * b_y_row
        b_matrix += beta * b_c
        # no entry of a positive semi-definite matrix exceeds its trace
        scale += tl.abs(beta) * tl.sum(tl.where(m_diagonal, b_c, 0.0))
    none = scale < 1e-37  # false for nan
    b_matrix = tl.where(none, 0.0, b_matrix / scale)
    b_row = tl.load(p_own + o_d, mask=o_d < D, other=0.0)
    if HALF:
        b_half = b_matrix.to(p_x.dtype.element_ty)
        b_constant -= scale * tl.sum(b_column * b_half.to(tl.float32), axis=0)[None, :]
    for o in range(0, rows, BT):
        o_x = first + o + o_t
        b_x, m_x = _load_tokens(p_x, o_x, sx_t, sx_d, first + rows, D, BD)
        if HALF:
            b_out = tl.dot(b_x, b_half)
        else:
            b_x = tl.where(m_x, b_x - b_row[None, :], 0.0)
            b_out = tl.dot(b_x, b_matrix, input_precision=PRECISION)
        b_out = scale * b_out + b_constant
        p_rows = p_out + o_x[:, None] * so_t + (o_d * so_d)[None, :]
        tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit
def _gradient_kernel(
    p_q, p_k, p_tokens, p_dq, p_dk, p_grad, p_mean, p_std, p_anchor_mean, p_anchor_std,
    p_grad_mean, p_grad_std, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sdq_b, sdq_h, sdq_t,
    sdq_d, sdk_b, sdk_h, sdk_t, sdk_d, s_grad, H, c,
    SPANS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_QUERY: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """dq or dk of one modality of a head of a sample; two calls, as in _token_moments_kernel."""
    M: tl.constexpr = len(SPANS)
    i_h, i_x = (tl.program_id(0) % H).to(tl.int64), tl.program_id(0) // H
    i_b = tl.program_id(1).to(tl.int64)
    p_queries = p_tokens + (i_b * H + i_h) * 2 * M * ((D + 1) * D)
    p_keys = p_queries + M * ((D + 1) * D)
    if i_x % 2 == 0:
        _modality_gradient(
            p_q + i_b * sq_b + i_h * sq_h, p_queries, p_keys, p_dq + i_b * sdq_b + i_h * sdq_h,
            p_grad, p_mean, p_std, p_anchor_mean, p_anchor_std, p_grad_mean, p_grad_std,
            sq_t, sq_d, sdq_t, sdq_d, s_grad, i_x // 2, i_b, i_h, H, c,
            SPANS, D, BD, BT, HALF, PRECISION, PAIR_QUERY, SELF, False,
        )  # fmt: skip
    else:
        _modality_gradient(
            p_k + i_b * sk_b + i_h * sk_h, p_keys, p_queries, p_dk + i_b * sdk_b + i_h * sdk_h,
            p_grad, p_mean, p_std, p_anchor_mean, p_anchor_std, p_grad_mean, p_grad_std,
            sk_t, sk_d, sdk_t, sdk_d, s_grad, i_x // 2, i_b, i_h, H, c,
            SPANS, D, BD, BT, HALF, PRECISION, PAIR_QUERY, SELF, True,
        )  # fmt: skip


def _half(q: Tensor) -> bool:
    return q.dtype != torch.float32


def token_moments(q: Tensor, k: Tensor, spans: list[int]) -> Tensor:
    """Covariances and means of tokens of q and k [B, H, T, d]: [B, H, 2, M, d + 1, d] in float32.

    Of q, then of k, of each modality: a population covariance [d, d] and below it the mean token.
    """
    batch, heads, _, d = q.shape
    shape = (batch, heads, 2, len(spans), d + 1, d)
    tokens = torch.empty(shape, dtype=torch.float32, device=q.device)
    if batch:
        launch_plan = plan.token_moments(launch.architecture(q), _half(q), batch, heads, spans, d)
        launch.run(
            _token_moments_kernel, launch_plan, q, k, tokens, *q.stride(), *k.stride(), heads
        )
    return tokens


def moments_and_loss(
    q: Tensor, k: Tensor, spans: list[int], scale: float, loss: Tensor | None,
    pair_query: bool, anchor_mean: Tensor | None, anchor_std: Tensor | None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward of each head: mean and std [B, H, M, M] in float32.

    Arguments as in score_moments.moments_and_loss, but loss [B, H] and anchors [H, M], and
    ``token_moments`` of q and k, where they are there already.
    """
    batch, heads, _, d = q.shape
    shape = (batch, heads, len(spans), len(spans))
    mean = torch.empty(shape, dtype=torch.float32, device=q.device)
    std = torch.empty_like(mean)
    if batch:
        tokens = token_moments(q, k, spans) if tokens is None else tokens
        launch.run(
            _moments_kernel, plan.moments(batch, heads, spans, d, pair_query), tokens, mean, std,
            loss, anchor_mean, anchor_std, scale,
        )  # fmt: skip
    return mean, std


def gradients(
    q: Tensor, k: Tensor, mean: Tensor, std: Tensor, spans: list[int], scale: float,
    grad: Tensor | None, grad_mean: Tensor | None, grad_std: Tensor | None,
    pair_query: bool, anchor_mean: Tensor | None, anchor_std: Tensor | None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward of each head: dq and dk, as q and k.

    Arguments as in score_moments.gradients, but moments [B, H, M, M] and anchors [H, M], and
    ``token_moments`` of q and k, where the forward has kept them.
    """
    batch, heads, _, d = q.shape
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    if batch:
        tokens = token_moments(q, k, spans) if tokens is None else tokens
        which = launch.architecture(q), _half(q), batch, heads
        launch_plan = plan.gradients(*which, spans, d, grad is None, pair_query)
        launch.run(
            _gradient_kernel, launch_plan, q, k, tokens, dq, dk, grad, mean, std, anchor_mean,
            anchor_std, grad_mean, grad_std, *q.stride(), *k.stride(), *dq.stride(),
            *dk.stride(), 0 if grad is None else grad.stride(0), heads, scale,
        )  # fmt: skip
    return dq, dk

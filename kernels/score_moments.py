"""Statistics of attention scores averaged over heads, the bootstrap loss, and their gradients.

    A = sum over heads of q k',  S = c A,  c = scale / heads           [T, T], never stored

Mean and unbiased variance of each block (i, j) of modalities. When the loop over heads ends, a tile
of A is complete in registers: it is centred on its own mean there, and tiles are merged by Chan's
rule in a fixed order. The variance is exact to 1e-7 at any mean, where sums of squares lose 1.7e-3
at mean = 100 std (float32, 512 x 196).

Source: ABPEM, attention bootstrapping, whose official code forms the [H, T, T] scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, score_moments_per_head
from . import score_moments_plan as plan
from .launch_plan import integer
from .score_blocks import (
    BLOCK_I,
    BLOCK_J,
    COLUMN_TILES,
    COLUMNS,
    FIRST_COLUMN,
    FIRST_ROW,
    FIRST_TILE,
    OFFSET,
    PITCH,
    ROWS,
    ROWS_COUNT,
    ROWS_TOKEN,
    SOURCE_BLOCK,
    SOURCE_COUNT,
    SOURCE_OFFSET,
    SOURCE_PITCH,
    SOURCE_TOKEN,
    block_gradient,
    bootstrap_loss,
    look_up,
    row_of,
    score_gradient,
)


@triton.jit
def _products(
    p_q, p_k, sq_h, sq_t, sq_d, sk_h, sk_t, sk_d, H, o_m, o_n, m_m, m_n,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A of BM query tokens and BN key tokens; 0 where a mask is off."""
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    o_d = tl.arange(0, BD)
    p_q += o_m[:, None] * sq_t + o_d[None, :] * sq_d  # [BM, BD]
    p_k += o_n[None, :] * sk_t + o_d[:, None] * sk_d  # [BD, BN]
    b_a = tl.zeros([BM, BN], tl.float32)
    for n in range(H * CHUNKS):
        h, o_c = n // CHUNKS, n % CHUNKS * BD
        m_d = o_c + o_d < D
        b_q = tl.load(p_q + h * sq_h + o_c * sq_d, mask=m_m[:, None] & m_d[None, :], other=0.0)
        b_k = tl.load(p_k + h * sk_h + o_c * sk_d, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_a = tl.dot(b_q, b_k, b_a, input_precision=PRECISION)
    return b_a


@triton.jit
def _tile_offsets(i_t, i_block, BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of a tile, counted from the first of its block."""
    i_in_block = i_t - look_up(i_block, BLOCKS, FIRST_TILE)
    across = look_up(i_block, BLOCKS, COLUMN_TILES)
    o_m = i_in_block // across * BM + tl.arange(0, BM)
    o_n = i_in_block % across * BN + tl.arange(0, BN)
    return o_m, o_n


@triton.jit
def _tile_moments(
    p_q, p_k, p_tiles, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, H, i_t, i_b,
    BLOCKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile's mean and its sum of squares about that mean, to tiles [B, TILES, 2]."""
    i_block = row_of(i_t, BLOCKS)
    o_m, o_n = _tile_offsets(i_t, i_block, BLOCKS, BM, BN)
    m_m, m_n = o_m < look_up(i_block, BLOCKS, ROWS), o_n < look_up(i_block, BLOCKS, COLUMNS)
    o_row, o_column = look_up(i_block, BLOCKS, FIRST_ROW), look_up(i_block, BLOCKS, FIRST_COLUMN)
    b_a = _products(
        p_q + i_b * sq_b, p_k + i_b * sk_b, sq_h, sq_t, sq_d, sk_h, sk_t, sk_d, H,
        o_row + o_m, o_column + o_n, m_m, m_n, D, BD, BM, BN, PRECISION,
    )  # fmt: skip
    count = tl.sum(m_m.to(tl.int32), axis=0) * tl.sum(m_n.to(tl.int32), axis=0)
    mean = tl.sum(b_a) / count.to(tl.float32)
    b_a = tl.where(m_m[:, None] & m_n[None, :], b_a - mean, 0.0)
    squares = tl.sum(b_a * b_a)
    p_tiles += (i_b * TILES + i_t) * 2
    tl.store(p_tiles, mean)
    tl.store(p_tiles + 1, squares)


@triton.jit
def _tiles_kernel(
    p_q, p_k, p_tiles, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, H, B,
    BLOCKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, TILES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """A tile, or with PERSISTENT every so many-th one of all samples.

    There the loop over tiles and that over heads become one, so that the loads of a tile begin
    while the last one's moments are computed.
    """
    if PERSISTENT:
        rounds = tl.cdiv(TILES * B - tl.program_id(0), tl.num_programs(0))
        for n in tl.range(0, rounds, flatten=True):
            i = tl.program_id(0) + n * tl.num_programs(0)
            _tile_moments(
                p_q, p_k, p_tiles, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, H, i % TILES,
                (i // TILES).to(tl.int64), BLOCKS, D, BD, BM, BN, PRECISION, TILES,
            )  # fmt: skip
    else:
        _tile_moments(
            p_q, p_k, p_tiles, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, H,
            tl.program_id(0), tl.program_id(1).to(tl.int64), BLOCKS, D, BD, BM, BN, PRECISION,
            TILES,
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    p_tiles, p_mean, p_std, p_loss, p_anchor_mean, p_anchor_std, c,
    BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    M: tl.constexpr, BB: tl.constexpr, BT: tl.constexpr, PAIR_QUERY: tl.constexpr,
):  # fmt: skip
    """Merges one sample's tiles to the mean and std of each block, and all blocks to the loss.

    mean = sum n_t mean_t / N, variance = sum [M2_t + n_t (mean_t - mean)^2] / (N - 1).
    """
    i_s = tl.program_id(0).to(tl.int64)
    i_t, i_b = tl.arange(0, BT), tl.arange(0, BB)
    m_t = i_t < TILES
    b_tile_mean = tl.load(p_tiles + (i_s * TILES + i_t) * 2, mask=m_t, other=0.0)
    b_squares = tl.load(p_tiles + (i_s * TILES + i_t) * 2 + 1, mask=m_t, other=0.0)
    i_block = row_of(i_t, BLOCKS)
    i_in_block = i_t - look_up(i_block, BLOCKS, FIRST_TILE)
    across = look_up(i_block, BLOCKS, COLUMN_TILES)
    b_rows = tl.minimum(look_up(i_block, BLOCKS, ROWS) - i_in_block // across * BM, BM)
    b_columns = tl.minimum(look_up(i_block, BLOCKS, COLUMNS) - i_in_block % across * BN, BN)
    # tiles of other blocks are left out by selection: nan times 0 would spread
    m_own = (i_block[None, :] == i_b[:, None]) & m_t[None, :]  # [BB, BT]
    b_count = tl.where(m_own, (b_rows * b_columns).to(tl.float32)[None, :], 0.0)
    b_total = tl.sum(b_count, axis=1)
    b_tile_mean = tl.where(m_own, b_tile_mean[None, :], 0.0)
    b_mean = tl.sum(b_count * b_tile_mean, axis=1) / b_total
    # correct the mean by what it leaves: the first sum rounds at the size of the mean
    b_shift = tl.where(m_own, b_tile_mean - b_mean[:, None], 0.0)
    b_mean += tl.sum(b_count * b_shift, axis=1) / b_total
    b_shift = tl.where(m_own, b_tile_mean - b_mean[:, None], 0.0)
    b_squares = tl.where(m_own, b_squares[None, :], 0.0) + b_count * b_shift * b_shift
    b_variance = c * c * (tl.sum(b_squares, axis=1) / (b_total - 1.0))
    b_mean *= c
    m_b = i_b < M * M
    tl.store(p_mean + i_s * M * M + i_b, b_mean, mask=m_b)
    tl.store(p_std + i_s * M * M + i_b, tl.sqrt(b_variance), mask=m_b)
    if p_loss is not None:
        loss = bootstrap_loss(b_mean, b_variance, p_anchor_mean, p_anchor_std, M, BB, PAIR_QUERY)
        tl.store(p_loss + i_s, loss)


@triton.jit
def _weighted_scores_kernel(
    p_q, p_k, p_work, p_scale, p_grad, p_mean, p_std, p_anchor_mean, p_anchor_std,
    p_grad_mean, p_grad_std, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, s_grad, s_work, H, c,
    BLOCKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, PAIR_QUERY: tl.constexpr,
):  # fmt: skip
    """dL/dA of a tile, divided by its block's scale, in the type of q; the scale to [B, blocks]."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_block = row_of(i_t, BLOCKS)
    i, j = look_up(i_block, BLOCKS, BLOCK_I), look_up(i_block, BLOCKS, BLOCK_J)
    rows, columns = look_up(i_block, BLOCKS, ROWS), look_up(i_block, BLOCKS, COLUMNS)
    o_m, o_n = _tile_offsets(i_t, i_block, BLOCKS, BM, BN)
    m_m, m_n = o_m < rows, o_n < columns
    o_row, o_column = look_up(i_block, BLOCKS, FIRST_ROW), look_up(i_block, BLOCKS, FIRST_COLUMN)
    b_a = _products(
        p_q + i_b * sq_b, p_k + i_b * sk_b, sq_h, sq_t, sq_d, sk_h, sk_t, sk_d, H,
        o_row + o_m, o_column + o_n, m_m, m_n, D, BD, BM, BN, PRECISION,
    )  # fmt: skip
    o_stats = i_b * M * M
    upstream = 0.0
    if p_grad is not None:
        upstream = tl.load(p_grad + i_b * s_grad).to(tl.float32)
    if p_grad_mean is not None:
        p_grad_mean += o_stats
        p_grad_std += o_stats
    grad_mean, grad_std = block_gradient(
        upstream, p_mean + o_stats, p_std + o_stats, p_anchor_mean, p_anchor_std,
        p_grad_mean, p_grad_std, i, j, M, PAIR_QUERY,
    )  # fmt: skip
    mean, std = tl.load(p_mean + o_stats + i * M + j), tl.load(p_std + o_stats + i * M + j)
    count = (rows * columns).to(tl.float32)
    scale, a, b = score_gradient(grad_mean, grad_std, std, c, count)
    # store zeros in the padding columns, so that the next launch can read whole rows
    b_w = tl.where(m_n[None, :], a + b * (b_a - mean / c), 0.0)
    pitch = look_up(i_block, BLOCKS, PITCH)
    p_work += i_b * s_work + look_up(i_block, BLOCKS, OFFSET)
    p_w = p_work + o_m[:, None] * pitch + o_n[None, :]
    b_w = b_w.to(p_work.dtype.element_ty)
    tl.store(p_w, b_w, mask=m_m[:, None] & (o_n < pitch)[None, :])
    if i_t == look_up(i_block, BLOCKS, FIRST_TILE):
        tl.store(p_scale + i_b * len(BLOCKS) + i_block, scale)


@triton.jit
def _weighted_tokens(
    p_work, p_scale, p_y, p_out, sy_h, sy_t, sy_d, so_h, so_t, so_d, H, i_row, i_column,
    TOKEN_ROWS: tl.constexpr, SOURCES: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """BM rows of dq = sum over blocks of scale W k, or with KEYS of dk = scale W' q, times BN
    columns. SOURCES are the blocks of each term, a block a modality."""
    MODALITIES: tl.constexpr = len(TOKEN_ROWS)
    i_m = row_of(i_row, TOKEN_ROWS)
    o_row, rows = look_up(i_m, TOKEN_ROWS, ROWS_TOKEN), look_up(i_m, TOKEN_ROWS, ROWS_COUNT)
    o_m = (i_row - look_up(i_m, TOKEN_ROWS, FIRST_TILE)) * BM + tl.arange(0, BM)
    o_n = i_column * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < rows, o_n < H * D
    p_y += (o_n // D * sy_h + o_n % D * sy_d)[None, :]
    b_out = tl.zeros([BM, BN], tl.float32)
    for n in tl.static_range(len(SOURCES) // MODALITIES):
        i_s = n * MODALITIES + i_m
        o_y, count = look_up(i_s, SOURCES, SOURCE_TOKEN), look_up(i_s, SOURCES, SOURCE_COUNT)
        o_w, pitch = look_up(i_s, SOURCES, SOURCE_OFFSET), look_up(i_s, SOURCES, SOURCE_PITCH)
        b_part = tl.zeros([BM, BN], tl.float32)
        for o in range(0, count, BK):
            m_k = o + o_k < count
            if KEYS:
                p_w = p_work + o_w + (o + o_k)[None, :] * pitch + o_m[:, None]
                m_w = (o_m < pitch)[:, None] & m_k[None, :]
            else:
                p_w = p_work + o_w + o_m[:, None] * pitch + (o + o_k)[None, :]
                m_w = m_m[:, None] & (o + o_k < pitch)[None, :]
            b_w = tl.load(p_w, mask=m_w, other=0.0)
            p_rows = p_y + (o_y + o + o_k)[:, None] * sy_t
            b_y = tl.load(p_rows, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_part = tl.dot(b_w, b_y, b_part, input_precision=PRECISION)
        b_out += tl.load(p_scale + look_up(i_s, SOURCES, SOURCE_BLOCK)) * b_part
    p_out += (o_row + o_m)[:, None] * so_t + (o_n // D * so_h + o_n % D * so_d)[None, :]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _token_gradients_kernel(
    p_work, p_scale, p_q, p_k, p_dq, p_dk, s_work, sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d,
    sdq_b, sdq_h, sdq_t, sdq_d, sdk_b, sdk_h, sdk_t, sdk_d, H,
    TOKEN_ROWS: tl.constexpr, QUERY_SOURCES: tl.constexpr, KEY_SOURCES: tl.constexpr,
    BLOCKS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows times BN columns of dq or dk: one program sums and writes them, in a fixed order."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(H * D, BN)
    i_row, i_column = i_t // 2 // across, i_t // 2 % across
    p_work += i_b * s_work
    p_scale += i_b * BLOCKS
    if i_t % 2 == 0:
        _weighted_tokens(
            p_work, p_scale, p_k + i_b * sk_b, p_dq + i_b * sdq_b, sk_h, sk_t, sk_d,
            sdq_h, sdq_t, sdq_d, H, i_row, i_column, TOKEN_ROWS, QUERY_SOURCES, D, BM, BN, BK,
            PRECISION, False,
        )  # fmt: skip
    else:
        _weighted_tokens(
            p_work, p_scale, p_q + i_b * sq_b, p_dk + i_b * sdk_b, sq_h, sq_t, sq_d,
            sdk_h, sdk_t, sdk_d, H, i_row, i_column, TOKEN_ROWS, KEY_SOURCES, D, BM, BN, BK,
            PRECISION, True,
        )  # fmt: skip


def _half(q: Tensor) -> bool:
    return q.dtype != torch.float32


def moments_and_loss(
    q: Tensor, k: Tensor, spans: list[int], scale: float, loss: Tensor | None,
    pair_query: bool, anchor_mean: Tensor | None, anchor_std: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward of the head mean.

    Args:
        q, k: [B, H, T, d] of any strides, of one type.
        spans, scale: tokens of each of M modalities, and the factor of q·k.
        loss: [B] in float32, where the bootstrap loss is written; None: it is not computed.
        pair_query: whether block (i, j) is compared with (i, i), not with (j, j).
        anchor_mean, anchor_std: [M] in float32, in place of the self blocks' moments, or None.

    Returns:
        Mean and std [B, M, M] in float32.
    """
    batch, heads, _, d = q.shape
    mean = torch.empty((batch, len(spans), len(spans)), dtype=torch.float32, device=q.device)
    std = torch.empty_like(mean)
    if not batch:
        return mean, std
    tiling = plan.score_tiles(launch.architecture(q), _half(q), batch, spans, d)
    merging = plan.merge_tiles(tiling, batch, spans, pair_query)
    shape = (batch, integer(tiling.constants, "TILES"), 2)
    tiles = torch.empty(shape, dtype=torch.float32, device=q.device)
    launch.run(_tiles_kernel, tiling, q, k, tiles, *q.stride(), *k.stride(), heads, batch)
    launch.run(
        _merge_kernel, merging, tiles, mean, std, loss, anchor_mean, anchor_std, scale / heads
    )
    return mean, std


def gradients(
    q: Tensor, k: Tensor, mean: Tensor, std: Tensor, spans: list[int], scale: float,
    grad: Tensor | None, grad_mean: Tensor | None, grad_std: Tensor | None,
    pair_query: bool, anchor_mean: Tensor | None, anchor_std: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward of the head mean: dq and dk, as q and k.

    Args:
        mean, std: of the forward.
        grad: [B], of the bootstrap loss, which has a gradient in the cross blocks alone; or None.
        grad_mean, grad_std: [B, M, M], of the moments of all blocks, where grad is None.
        pair_query, anchor_mean, anchor_std: as in ``moments_and_loss``.
    """
    batch, heads, _, d = q.shape
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    if not batch:
        return dq, dk
    self_blocks = grad is None
    if len(spans) == 1 and not self_blocks:
        return dq.zero_(), dk.zero_()
    which = launch.architecture(q), _half(q), batch
    weighing, table = plan.weighted_scores(*which, spans, d, self_blocks, pair_query)
    summing = plan.token_gradients(*which, heads, d, table)
    work = torch.empty((batch, plan.workspace(table)), dtype=q.dtype, device=q.device)
    scales = torch.empty((batch, len(table)), dtype=torch.float32, device=q.device)
    strides = *q.stride(), *k.stride()
    launch.run(
        _weighted_scores_kernel, weighing, q, k, work, scales, grad, mean, std, anchor_mean,
        anchor_std, grad_mean, grad_std, *strides, 0 if grad is None else grad.stride(0),
        work.stride(0), heads, scale / heads,
    )  # fmt: skip
    launch.run(
        _token_gradients_kernel, summing, work, scales, q, k, dq, dk, work.stride(0), *strides,
        *dq.stride(), *dk.stride(), heads,
    )  # fmt: skip
    return dq, dk


def score_moments(
    q: Tensor, k: Tensor, spans: list[int], scale: float, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Mean and std of q, k [B, H, T, d] of any strides: [B, M, M], or [B, H, M, M] per head."""
    moments = score_moments_per_head.moments_and_loss if per_head else moments_and_loss
    return moments(q, k, spans, scale, None, False, None, None)


def score_moments_backward(
    grad_mean: Tensor, grad_std: Tensor, q: Tensor, k: Tensor, std: Tensor, spans: list[int],
    scale: float, per_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, dk of all blocks. The means over heads are computed again."""
    if per_head:
        of_head = score_moments_per_head.gradients
        return of_head(q, k, std, std, spans, scale, None, grad_mean, grad_std, False, None, None)
    mean, _ = score_moments(q, k, spans, scale, False)
    return gradients(q, k, mean, std, spans, scale, None, grad_mean, grad_std, False, None, None)

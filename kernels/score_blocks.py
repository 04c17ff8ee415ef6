"""Blocks of attention scores: rows of a plan's tables, the divergence of blocks, its gradient."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .score_moments_plan import Block, Source, TokenRows


def _place(row: type[NamedTuple], field: str) -> tl.constexpr:
    """Where a row of a plan's table has a field."""
    return tl.constexpr(row._fields.index(field))


FIRST_TILE = _place(Block, "first_tile")  # of a TokenRows too
COLUMN_TILES = _place(Block, "column_tiles")
BLOCK_I = _place(Block, "i")
BLOCK_J = _place(Block, "j")
FIRST_ROW = _place(Block, "first_row")
FIRST_COLUMN = _place(Block, "first_column")
ROWS = _place(Block, "rows")
COLUMNS = _place(Block, "columns")
OFFSET = _place(Block, "offset")
PITCH = _place(Block, "pitch")

ROWS_TOKEN = _place(TokenRows, "first_token")
ROWS_COUNT = _place(TokenRows, "tokens")

SOURCE_TOKEN = _place(Source, "first_token")
SOURCE_COUNT = _place(Source, "tokens")
SOURCE_BLOCK = _place(Source, "block")
SOURCE_OFFSET = _place(Source, "offset")
SOURCE_PITCH = _place(Source, "pitch")


@triton.jit
def row_of(i_tile, TABLE: tl.constexpr):
    """Index of the table's row that a tile (or each of several) belongs to."""
    index = i_tile * 0
    for n in tl.static_range(len(TABLE)):
        index = tl.where(i_tile >= TABLE[n][FIRST_TILE], n, index)
    return index


@triton.jit
def look_up(index, TABLE: tl.constexpr, FIELD: tl.constexpr):
    """TABLE[index][FIELD] for an index (or several) that only the running kernel knows."""
    value = index * 0
    for n in tl.static_range(len(TABLE)):
        value = tl.where(index == n, TABLE[n][FIELD], value)
    return value


@triton.jit
def bootstrap_loss(
    b_mean,
    b_variance,
    p_anchor_mean,
    p_anchor_std,
    M: tl.constexpr,
    BB: tl.constexpr,
    PAIR_QUERY: tl.constexpr,
):
    """Sum over the cross blocks of KL(N(block) || N(its self block or anchor)).

    mean and variance are [BB], with those of block (i, j) at index i M + j.

    KL = (r - 1 - ln r) / 2 + (mean - mean_s)^2 / (2 var_s), r = var / var_s: no square roots.
    """
    i_b = tl.arange(0, BB)
    i, j = i_b // M, i_b % M
    s = i if PAIR_QUERY else j
    if p_anchor_mean is not None:
        b_mean_s = tl.load(p_anchor_mean + s, mask=i_b < M * M, other=0.0)
        b_std_s = tl.load(p_anchor_std + s, mask=i_b < M * M, other=1.0)
        b_variance_s = b_std_s * b_std_s
    else:
        b_anchor = (s * (M + 1))[:, None] == tl.arange(0, BB)[None, :]
        b_mean_s = tl.sum(tl.where(b_anchor, b_mean[None, :], 0.0), axis=1)
        b_variance_s = tl.sum(tl.where(b_anchor, b_variance[None, :], 0.0), axis=1)
    b_r = b_variance / b_variance_s
    b_shift = b_mean - b_mean_s
    b_kl = 0.5 * (b_r - 1.0 - tl.log(b_r)) + b_shift * b_shift / (2.0 * b_variance_s)
    return tl.sum(tl.where((i_b < M * M) & (i != j), b_kl, 0.0), axis=0)


@triton.jit
def block_gradient(
    upstream,
    p_mean,
    p_std,
    p_anchor_mean,
    p_anchor_std,
    p_grad_mean,
    p_grad_std,
    i,
    j,
    M: tl.constexpr,
    PAIR_QUERY: tl.constexpr,
):
    """dL/dmean and dL/dstd of block (i, j), loaded, or those of the bootstrap loss times upstream.

    A sample whose loss is not used (upstream 0) may have undefined statistics.
    """
    if p_grad_mean is not None:
        grad_mean = tl.load(p_grad_mean + i * M + j).to(tl.float32)
        grad_std = tl.load(p_grad_std + i * M + j).to(tl.float32)
    else:
        s = i if PAIR_QUERY else j
        mean, std = tl.load(p_mean + i * M + j), tl.load(p_std + i * M + j)
        if p_anchor_mean is not None:
            mean_s, std_s = tl.load(p_anchor_mean + s), tl.load(p_anchor_std + s)
        else:
            mean_s, std_s = tl.load(p_mean + s * M + s), tl.load(p_std + s * M + s)
        variance_s = std_s * std_s
        grad_mean = tl.where(upstream != 0, upstream * (mean - mean_s) / variance_s, 0.0)
        grad_std = tl.where(upstream != 0, upstream * (std / variance_s - 1.0 / std), 0.0)
    return grad_mean, grad_std


@triton.jit
def score_gradient(grad_mean, grad_std, std, c, count):
    """(scale, a, b) of dL/dA = scale (a + b (A - mean A)) for raw products A = S / c of a block.

    dL/dS = alpha + beta (S - mean), alpha = grad_mean / N, beta = grad_std / ((N - 1) std);
    a and b times A's deviation are at most 1, so the bracket fits into float16. A constant block
    has no direction: beta 0.
    """
    alpha = grad_mean * c / count
    deviation = std / tl.abs(c)  # of A
    beta = tl.where(std > 0, grad_std * tl.abs(c) / (count - 1.0), 0.0)
    scale = tl.abs(alpha) + tl.abs(beta)
    none = scale < 1e-37  # false for nan
    a = tl.where(none, 0.0, alpha / scale)
    b = tl.where(none | (beta == 0), 0.0, beta / scale / deviation)
    return tl.where(none, 0.0, scale), a, b

"""Blocks of attention scores: their place in a plan's table, their divergence, its gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_block(i_tile, BLOCKS: tl.constexpr):
    """Index and fields of the block that a tile (or each of several) lies in."""
    first, across, i, j = i_tile * 0, i_tile * 0, i_tile * 0, i_tile * 0
    o_row, o_column, rows, columns = i_tile * 0, i_tile * 0, i_tile * 0, i_tile * 0
    offset, pitch, index = i_tile * 0, i_tile * 0, i_tile * 0
    for b in tl.static_range(len(BLOCKS)):
        here = i_tile >= BLOCKS[b][0]
        first = tl.where(here, BLOCKS[b][0], first)
        across = tl.where(here, BLOCKS[b][1], across)
        i = tl.where(here, BLOCKS[b][2], i)
        j = tl.where(here, BLOCKS[b][3], j)
        o_row = tl.where(here, BLOCKS[b][4], o_row)
        o_column = tl.where(here, BLOCKS[b][5], o_column)
        rows = tl.where(here, BLOCKS[b][6], rows)
        columns = tl.where(here, BLOCKS[b][7], columns)
        offset = tl.where(here, BLOCKS[b][8], offset)
        pitch = tl.where(here, BLOCKS[b][9], pitch)
        index = tl.where(here, b, index)
    return index, first, across, i, j, o_row, o_column, rows, columns, offset, pitch


@triton.jit
def bootstrap_loss(
    mean,
    variance,
    p_anchor_mean,
    p_anchor_std,
    M: tl.constexpr,
    BB: tl.constexpr,
    PAIR_QUERY: tl.constexpr,
):
    """Sum over the cross blocks of KL(N(block) || N(its self block or anchor)); mean, variance [BB]
    of block i M + j at that index.

    KL = (r - 1 - ln r) / 2 + (mean - mean_s)^2 / (2 var_s), r = var / var_s: no square roots.
    """
    i_b = tl.arange(0, BB)
    i, j = i_b // M, i_b % M
    s = i if PAIR_QUERY else j
    if p_anchor_mean is not None:
        mean_s = tl.load(p_anchor_mean + s, mask=i_b < M * M, other=0.0)
        std_s = tl.load(p_anchor_std + s, mask=i_b < M * M, other=1.0)
        variance_s = std_s * std_s
    else:
        anchor = (s * (M + 1))[:, None] == tl.arange(0, BB)[None, :]
        mean_s = tl.sum(tl.where(anchor, mean[None, :], 0.0), axis=1)
        variance_s = tl.sum(tl.where(anchor, variance[None, :], 0.0), axis=1)
    r = variance / variance_s
    shift = mean - mean_s
    kl = 0.5 * (r - 1.0 - tl.log(r)) + shift * shift / (2.0 * variance_s)
    return tl.sum(tl.where((i_b < M * M) & (i != j), kl, 0.0), axis=0)


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
    """dL/dmean and dL/dstd of block (i, j): given, or those of the bootstrap loss times upstream.

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

"""Causal attention of packed sequences with a shared prefix in front of each, and its gradients.

    S = scale q k',  A = exp(S - L),  L = ln sum exp S,  O = A v
    dv = A' dO,  dS = A (dO v' - mean),  mean = sum dO O,  dq = scale dS k,  dk = scale dS' q

A tile holds complete sequences, of at most 64 tokens in all, so no other tile adds to the gradients
of its tokens. The prefix gets a partial sum of each tile, and a second launch adds these in a fixed
order. A query sees the prefix and an interval of the packed rows: that is the only mask.

Sequences of a tile share products, yet nan or infinity of one must not reach another. So products
take 0 in place of what is not finite, and the attention to it becomes nan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from . import shared_prefix_attention_plan as plan
from .launch_plan import Plan

# not specialised: for a size of 1 Triton unrolls a loop, whose registers spill
_SIZES = "Q", "P", "H"


@triton.jit
def _load(p_x, s_t, o_t, m_t, D, BD: tl.constexpr, WIDE: tl.constexpr):
    """Rows o_t of a matrix whose rows are s_t apart, as [rows, BD]."""
    o_d = tl.arange(0, BD)
    m_x = m_t[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_t[:, None] * s_t + o_d[None, :], mask=m_x, other=0.0)
    return b_x.to(tl.float32) if WIDE else b_x


@triton.jit
def _load_across(p_x, s_t, o_t, m_t, D, BD: tl.constexpr, WIDE: tl.constexpr):
    """The same rows as columns, [BD, rows]; loaded again, as in flat_attention.py."""
    o_d = tl.arange(0, BD)
    m_x = (o_d < D)[:, None] & m_t[None, :]
    b_x = tl.load(p_x + o_t[None, :] * s_t + o_d[:, None], mask=m_x, other=0.0)
    return b_x.to(tl.float32) if WIDE else b_x


@triton.jit
def _finite(b_x):
    """0 in place of what is not finite."""
    return tl.where(tl.abs(b_x.to(tl.float32)) < float("inf"), b_x, 0.0)


@triton.jit
def _nan_if_not_finite(b_x, axis: tl.constexpr):
    """Sums along an axis: 0 where all is finite, else nan."""
    return tl.sum(0.0 * b_x.to(tl.float32), axis=axis)


@triton.jit
def _visible_rows(
    p_starts, first_sequence, last_sequence, o_q, m_q, LAST: tl.constexpr, BS: tl.constexpr
):
    """The packed rows [begin, end) that each query sees; none for masked queries."""
    if LAST:
        b_begin = tl.load(p_starts + o_q, mask=m_q, other=0)
        b_end = tl.load(p_starts + o_q + 1, mask=m_q, other=0)
    else:
        o_s = first_sequence + tl.arange(0, BS)
        b_start = tl.load(p_starts + o_s, mask=o_s < last_sequence, other=2147483647)
        m_earlier = b_start[None, :] <= o_q[:, None]
        b_begin = tl.max(tl.where(m_earlier, b_start[None, :], 0), axis=1)
        b_end = tl.where(m_q, o_q + 1, 0)
    return b_begin, b_end


@triton.jit
def _attend_further(
    b_q, p_k, p_v, s_k, s_v, o_k, m_k, m_s, D, scale, b_top, b_total, b_out,
    BD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Updates the maximum, sum and output of queries by further keys."""
    b_k = _load_across(p_k, s_k, o_k, m_k, D, BD, WIDE)
    b_s = tl.where(m_s, scale * tl.dot(b_q, b_k, input_precision=PRECISION), -float("inf"))
    b_higher = tl.maximum(b_top, tl.max(b_s, axis=1))
    b_base = tl.where(b_higher == -float("inf"), 0.0, b_higher)  # no key seen so far
    b_p = tl.exp(b_s - b_base[:, None])
    b_keep = tl.exp(b_top - b_base)
    b_total = b_total * b_keep + tl.sum(b_p, axis=1)
    b_v = _load(p_v, s_v, o_k, m_k, D, BD, WIDE)
    b_p = tl.where(m_s, b_p + _nan_if_not_finite(b_v, 1)[None, :], 0.0)
    b_out *= b_keep[:, None]
    b_out = tl.dot(b_p.to(b_v.dtype), _finite(b_v), b_out, input_precision=PRECISION)
    return b_higher, b_total, b_out


@triton.jit(do_not_specialize=_SIZES)
def _prefix_attention_kernel(
    p_q, p_k, p_v, p_prefix_k, p_prefix_v, p_starts, p_tiles, p_out, p_lse,
    s_qb, s_q, s_kb, s_k, s_vb, s_v, s_pkb, s_pk, s_pvb, s_pv, Q, P, H, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BM queries of a tile."""
    i_tile, i_part = tl.program_id(0) // (BS // BM), tl.program_id(0) % (BS // BM)
    first_sequence = tl.load(p_tiles + i_tile)
    last_sequence = tl.load(p_tiles + i_tile + 1)
    first = tl.load(p_starts + first_sequence)
    stop = tl.load(p_starts + last_sequence)
    first_query = (first_sequence if LAST else first) + i_part * BM
    last_query = last_sequence if LAST else stop
    if first_query >= last_query:
        return
    i_head = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    o_q = first_query + tl.arange(0, BM)
    m_q = o_q < last_query
    b_begin, b_end = _visible_rows(p_starts, first_sequence, last_sequence, o_q, m_q, LAST, BS)
    b_q = _load(p_q + i_b * s_qb + i_h * D, s_q, o_q, m_q, D, BD, WIDE)
    p_k += i_b * s_kb + i_h * D
    p_v += i_b * s_vb + i_h * D
    p_prefix_k += i_b * s_pkb + i_h * D
    p_prefix_v += i_b * s_pvb + i_h * D
    b_top = tl.full([BM], -float("inf"), tl.float32)
    b_total = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BD], tl.float32)
    for o in range(0, P, BP):
        o_k = o + tl.arange(0, BP)
        m_k = o_k < P
        m_s = m_q[:, None] & m_k[None, :]
        b_top, b_total, b_out = _attend_further(
            b_q, p_prefix_k, p_prefix_v, s_pk, s_pv, o_k, m_k, m_s, D, scale, b_top, b_total,
            b_out, BD, WIDE, PRECISION,
        )  # fmt: skip
    for o in range(first, stop if LAST else tl.minimum(stop, first_query + BM), BN):
        o_k = o + tl.arange(0, BN)
        m_s = (o_k[None, :] >= b_begin[:, None]) & (o_k[None, :] < b_end[:, None])
        b_top, b_total, b_out = _attend_further(
            b_q, p_k, p_v, s_k, s_v, o_k, o_k < stop, m_s, D, scale, b_top, b_total, b_out,
            BD, WIDE, PRECISION,
        )  # fmt: skip
    b_total = tl.where(m_q, b_total, 1.0)
    o_d = tl.arange(0, BD)
    p_out += i_b * Q * H * D + i_h * D + o_q[:, None] * (H * D) + o_d[None, :]
    m_out = m_q[:, None] & (o_d < D)[None, :]
    tl.store(p_out, (b_out / b_total[:, None]).to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + i_head * Q + o_q, b_top + tl.log(b_total), mask=m_q)


@triton.jit
def _add_query_gradients(
    b_q, b_grad, b_mean, b_lse, p_k, p_v, s_k, s_v, o_k, m_k, m_s, D, scale, b_dq,
    BD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what further keys contribute to dq."""
    b_k = _load_across(p_k, s_k, o_k, m_k, D, BD, WIDE)
    b_a = tl.exp(scale * tl.dot(b_q, b_k, input_precision=PRECISION) - b_lse[:, None])
    b_v = _load_across(p_v, s_v, o_k, m_k, D, BD, WIDE)
    b_ds = b_a * (tl.dot(b_grad, b_v, input_precision=PRECISION) - b_mean[:, None])
    b_ds = tl.where(m_s, b_ds, 0.0)
    b_k = _finite(_load(p_k, s_k, o_k, m_k, D, BD, WIDE))
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _query_gradients(
    p_q, p_k, p_v, p_prefix_k, p_prefix_v, p_grad, p_out, p_lse, p_starts, p_dq,
    s_q, s_k, s_v, s_pk, s_pv, s_out, first_sequence, last_sequence, first, stop, first_query,
    last_query, P, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BM queries."""
    o_q = first_query + tl.arange(0, BM)
    m_q = o_q < last_query
    b_begin, b_end = _visible_rows(p_starts, first_sequence, last_sequence, o_q, m_q, LAST, BS)
    b_q = _load(p_q, s_q, o_q, m_q, D, BD, WIDE)
    b_grad = _load(p_grad, s_out, o_q, m_q, D, BD, WIDE)
    b_out = _load(p_out, s_out, o_q, m_q, D, BD, WIDE)
    b_mean = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), axis=1)
    b_lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for o in range(0, P, BP):
        o_k = o + tl.arange(0, BP)
        m_k = o_k < P
        m_s = m_q[:, None] & m_k[None, :]
        b_dq = _add_query_gradients(
            b_q, b_grad, b_mean, b_lse, p_prefix_k, p_prefix_v, s_pk, s_pv, o_k, m_k, m_s, D,
            scale, b_dq, BD, WIDE, PRECISION,
        )  # fmt: skip
    for o in range(first, stop if LAST else tl.minimum(stop, first_query + BM), BN):
        o_k = o + tl.arange(0, BN)
        m_s = (o_k[None, :] >= b_begin[:, None]) & (o_k[None, :] < b_end[:, None])
        b_dq = _add_query_gradients(
            b_q, b_grad, b_mean, b_lse, p_k, p_v, s_k, s_v, o_k, o_k < stop, m_s, D, scale, b_dq,
            BD, WIDE, PRECISION,
        )  # fmt: skip
    o_d = tl.arange(0, BD)
    m_out = m_q[:, None] & (o_d < D)[None, :]
    p_dq += o_q[:, None] * s_out + o_d[None, :]
    tl.store(p_dq, (scale * b_dq).to(p_dq.dtype.element_ty), mask=m_out)


@triton.jit
def _key_gradients(
    p_q, p_k, p_v, p_grad, p_out, p_lse, p_starts, p_dk, p_dv, s_q, s_k, s_v, s_out,
    first_sequence, last_sequence, first_query, last_query, first_key, last_key, D, scale,
    PREFIX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BS: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BM keys: rows of the tile, or of the prefix, which every query sees."""
    o_k = first_key + tl.arange(0, BM)
    m_k = o_k < last_key
    b_k = _load(p_k, s_k, o_k, m_k, D, BD, WIDE)
    b_v = _load(p_v, s_v, o_k, m_k, D, BD, WIDE)
    b_dk, b_dv = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    for o in range(first_query, last_query, BN):
        o_q = o + tl.arange(0, BN)
        m_q = o_q < last_query
        b_lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
        b_q = _load_across(p_q, s_q, o_q, m_q, D, BD, WIDE)
        # a key a row
        b_a = tl.exp(scale * tl.dot(b_k, b_q, input_precision=PRECISION) - b_lse[None, :])
        b_grad = _load_across(p_grad, s_out, o_q, m_q, D, BD, WIDE)
        b_out = _load_across(p_out, s_out, o_q, m_q, D, BD, WIDE)
        b_mean = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), axis=0)
        b_ds = b_a * (tl.dot(b_v, b_grad, input_precision=PRECISION) - b_mean[None, :])
        b_a += _nan_if_not_finite(b_grad, 0)[None, :]
        if not PREFIX:
            b_begin, b_end = _visible_rows(
                p_starts, first_sequence, last_sequence, o_q, m_q, LAST, BS
            )
            m_s = (o_k[:, None] >= b_begin[None, :]) & (o_k[:, None] < b_end[None, :])
            b_a, b_ds = tl.where(m_s, b_a, 0.0), tl.where(m_s, b_ds, 0.0)
        b_grad = _finite(_load(p_grad, s_out, o_q, m_q, D, BD, WIDE))
        b_dv = tl.dot(b_a.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
        b_q = _finite(_load(p_q, s_q, o_q, m_q, D, BD, WIDE))
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_d = tl.arange(0, BD)
    m_out = m_k[:, None] & (o_d < D)[None, :]
    o_out = o_k[:, None] * s_out + o_d[None, :]
    tl.store(p_dk + o_out, (scale * b_dk).to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=(*_SIZES, "S", "tiles"))
def _prefix_gradients_kernel(
    p_q, p_k, p_v, p_prefix_k, p_prefix_v, p_grad, p_out, p_lse, p_starts, p_tiles,
    p_dq, p_dk, p_dv, p_partial,
    s_qb, s_q, s_kb, s_k, s_vb, s_v, s_pkb, s_pk, s_pvb, s_pv, Q, S, P, H, D, tiles, scale,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's first programs compute dq, the next ones dk and dv, the others its part of the
    prefix's gradients."""
    parts = 2 * (BS // BM) + tl.cdiv(P, BP)
    i_tile, i_part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first_sequence = tl.load(p_tiles + i_tile)
    last_sequence = tl.load(p_tiles + i_tile + 1)
    first = tl.load(p_starts + first_sequence)
    stop = tl.load(p_starts + last_sequence)
    first_query, last_query = first_sequence if LAST else first, last_sequence if LAST else stop
    i_head = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    s_out = H * D
    p_q += i_b * s_qb + i_h * D
    p_k += i_b * s_kb + i_h * D
    p_v += i_b * s_vb + i_h * D
    p_prefix_k += i_b * s_pkb + i_h * D
    p_prefix_v += i_b * s_pvb + i_h * D
    p_grad += i_b * Q * s_out + i_h * D
    p_out += i_b * Q * s_out + i_h * D
    p_lse += i_head * Q
    if i_part < BS // BM:
        first_row = first_query + i_part * BM
        if first_row < last_query:
            _query_gradients(
                p_q, p_k, p_v, p_prefix_k, p_prefix_v, p_grad, p_out, p_lse, p_starts,
                p_dq + i_b * Q * s_out + i_h * D, s_q, s_k, s_v, s_pk, s_pv, s_out,
                first_sequence, last_sequence, first, stop, first_row, last_query, P, D, scale,
                BM, BN, BP, BD, BS, LAST, WIDE, PRECISION,
            )  # fmt: skip
    elif i_part < 2 * (BS // BM):
        first_row = first + (i_part - BS // BM) * BM
        if first_row < stop:
            o_rows = i_b * S * s_out + i_h * D
            _key_gradients(
                p_q, p_k, p_v, p_grad, p_out, p_lse, p_starts, p_dk + o_rows, p_dv + o_rows,
                s_q, s_k, s_v, s_out, first_sequence, last_sequence,
                first_query if LAST else first_row, last_query, first_row, stop, D, scale,
                False, BM, BN, BD, BS, LAST, WIDE, PRECISION,
            )  # fmt: skip
    else:
        p_partial += (i_b * tiles + i_tile) * 2 * P * s_out + i_h * D
        _key_gradients(
            p_q, p_prefix_k, p_prefix_v, p_grad, p_out, p_lse, p_starts,
            p_partial, p_partial + P * s_out, s_q, s_pk, s_pv, s_out, first_sequence,
            last_sequence, first_query, last_query, (i_part - 2 * (BS // BM)) * BP, P, D, scale,
            True, BP, BN, BD, BS, LAST, WIDE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=("tiles",))
def _add_tiles_kernel(
    p_partial, p_dk, p_dv, tiles, SIZE, BT: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """Sums the tiles' parts [tiles, 2, P, H d] of the gradients of a sample's prefix."""
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.arange(0, BT)
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    m_e = o_e < 2 * SIZE
    p_partial += i_b * tiles * 2 * SIZE
    b_sum = tl.zeros([BT, BE], tl.float32)
    for o in range(0, tiles, BT):
        o_part = (o + o_t).to(tl.int64)[:, None] * (2 * SIZE) + o_e[None, :]
        m_part = (o + o_t < tiles)[:, None] & m_e[None, :]
        b_sum += tl.load(p_partial + o_part, mask=m_part, other=0.0)
    b_x = tl.sum(b_sum, axis=0).to(p_dk.dtype.element_ty)
    tl.store(p_dk + i_b * SIZE + o_e, b_x, mask=o_e < SIZE)
    tl.store(p_dv + i_b * SIZE + o_e - SIZE, b_x, mask=(o_e >= SIZE) & m_e)


def _packed(*tensors: Tensor) -> list[int]:
    """Strides of the first two dimensions of each tensor: samples and rows."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _plan(make, q: Tensor, k: Tensor, prefix: Tensor, tiles: Tensor, heads: int) -> Plan:
    batch, queries, width = q.shape
    return make(
        launch.architecture(q), q.dtype == torch.bfloat16, batch * heads, len(tiles) - 1,
        prefix.shape[1], width // heads, queries != k.shape[1],
    )  # fmt: skip


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor,
    tiles: Tensor, longest: int, heads: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of packed sequences, all with contiguous rows and of one type.

    Args:
        q: [B, Q, H d]: all tokens, or the last one of each sequence.
        k, v: [B, S, H d]. prefix_k, prefix_v: [B, P, H d].
        starts, tiles: int32, where sequences begin among tokens, and tiles among sequences.
        longest: tokens of the longest sequence; not used, as the plan holds for 64.
        heads: H. scale: factor of the scores.

    Returns:
        The output [B, Q, H d] in the type of q, and the log-sum-exp [B, H, Q] in float32.
    """
    batch, queries, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    launch.run(
        _prefix_attention_kernel, _plan(plan.forward, q, k, prefix_k, tiles, heads),
        q, k, v, prefix_k, prefix_v, starts, tiles, out, lse,
        *_packed(q, k, v, prefix_k, prefix_v), queries, prefix_k.shape[1], heads, width // heads,
        scale,
    )  # fmt: skip
    return out, lse


def shared_prefix_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor,
    lse: Tensor, starts: Tensor, tiles: Tensor, longest: int, heads: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the prefixes, in their types; grad, out and lse are contiguous."""
    (batch, queries, width), tokens, prefix = q.shape, k.shape[1], prefix_k.shape[1]
    dq, dk, dv, dprefix_k, dprefix_v = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, prefix_k, prefix_v)
    )
    count, size = len(tiles) - 1, prefix * width
    partial = torch.empty((batch, count, 2, size), dtype=torch.float32, device=q.device)
    launch.run(
        _prefix_gradients_kernel, _plan(plan.gradients, q, k, prefix_k, tiles, heads),
        q, k, v, prefix_k, prefix_v, grad, out, lse, starts, tiles, dq, dk, dv, partial,
        *_packed(q, k, v, prefix_k, prefix_v), queries, tokens, prefix, heads, width // heads,
        count, scale,
    )  # fmt: skip
    if size:
        launch.run(
            _add_tiles_kernel, plan.prefix_sum(batch, size), partial, dprefix_k, dprefix_v, count,
            size,
        )  # fmt: skip
    return dq, dk, dv, dprefix_k, dprefix_v

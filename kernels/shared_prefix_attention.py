"""Causal attention of packed sequences with a shared prefix in front of each, and its gradients.

    S = scale q k',  A = exp(S - L),  L = ln sum exp S,  O = A v
    dv = A' dO,  dS = A (dO v' - mean),  mean = sum dO O,  dq = scale dS k,  dk = scale dS' q

Sequences are taken in tiles, whole ones of at most 64 tokens in all, so that a tile's gradients
are its own; those of the prefix are partial sums of the tiles, added in a fixed order by a second
launch. A query sees the prefix and an interval of the packed rows, which is all of the mask.

A sequence sees nothing of another's nan or infinity although they share products: what is not
finite there is 0, and attention to it nan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from . import shared_prefix_attention_plan as plan
from .launch_plan import Plan

_SIZES = "Q", "P", "H"  # for one of 1 a loop unrolled would spill


@triton.jit
def _rows(p_x, s_t, o_t, m_t, D, BD: tl.constexpr, WIDE: tl.constexpr):
    """Rows o_t, s_t apart, as [rows, BD]."""
    o_d = tl.arange(0, BD)
    m = m_t[:, None] & (o_d < D)[None, :]
    x = tl.load(p_x + o_t[:, None] * s_t + o_d[None, :], mask=m, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _columns(p_x, s_t, o_t, m_t, D, BD: tl.constexpr, WIDE: tl.constexpr):
    """The same rows as columns, [BD, rows]: see flat_attention.py."""
    o_d = tl.arange(0, BD)
    m = (o_d < D)[:, None] & m_t[None, :]
    x = tl.load(p_x + o_t[None, :] * s_t + o_d[:, None], mask=m, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def _echo(x, axis: tl.constexpr):
    """0 of finite rows or columns, nan of others."""
    return tl.sum(0.0 * x.to(tl.float32), axis=axis)


@triton.jit
def _seen(p_starts, first_sequence, last_sequence, o_q, m_q, LAST: tl.constexpr, BS: tl.constexpr):
    """Rows from the first to before the second that queries see; none of what is no query."""
    if LAST:
        begin = tl.load(p_starts + o_q, mask=m_q, other=0)
        end = tl.load(p_starts + o_q + 1, mask=m_q, other=0)
    else:
        o_s = first_sequence + tl.arange(0, BS)
        start = tl.load(p_starts + o_s, mask=o_s < last_sequence, other=2147483647)
        earlier = start[None, :] <= o_q[:, None]
        begin = tl.max(tl.where(earlier, start[None, :], 0), axis=1)
        end = tl.where(m_q, o_q + 1, 0)
    return begin, end


@triton.jit
def _attend(
    q, p_k, p_v, s_k, s_v, o_k, m_k, m, D, scale, top, total, out,
    BD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output of queries with further keys."""
    k = _columns(p_k, s_k, o_k, m_k, D, BD, WIDE)
    s = tl.where(m, scale * tl.dot(q, k, input_precision=PRECISION), -float("inf"))
    higher = tl.maximum(top, tl.max(s, axis=1))
    base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen as yet
    p = tl.exp(s - base[:, None])
    keep = tl.exp(top - base)
    total = total * keep + tl.sum(p, axis=1)
    v = _rows(p_v, s_v, o_k, m_k, D, BD, WIDE)
    p = tl.where(m, p + _echo(v, 1)[None, :], 0.0)
    out = tl.dot(p.to(v.dtype), _finite(v), out * keep[:, None], input_precision=PRECISION)
    return higher, total, out


@triton.jit(do_not_specialize=_SIZES)
def _prefix_attention_kernel(
    p_q, p_k, p_v, p_prefix_k, p_prefix_v, p_starts, p_tiles, p_out, p_lse,
    s_qb, s_q, s_kb, s_k, s_vb, s_v, s_pkb, s_pk, s_pvb, s_pv, Q, P, H, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes BM queries of a tile."""
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
    begin, end = _seen(p_starts, first_sequence, last_sequence, o_q, m_q, LAST, BS)
    q = _rows(p_q + i_b * s_qb + i_h * D, s_q, o_q, m_q, D, BD, WIDE)
    p_k += i_b * s_kb + i_h * D
    p_v += i_b * s_vb + i_h * D
    p_prefix_k += i_b * s_pkb + i_h * D
    p_prefix_v += i_b * s_pvb + i_h * D
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    for o in range(0, P, BP):
        o_k = o + tl.arange(0, BP)
        m_k = o_k < P
        m = m_q[:, None] & m_k[None, :]
        top, total, out = _attend(
            q, p_prefix_k, p_prefix_v, s_pk, s_pv, o_k, m_k, m, D, scale, top, total, out,
            BD, WIDE, PRECISION,
        )  # fmt: skip
    for o in range(first, stop if LAST else tl.minimum(stop, first_query + BM), BN):
        o_k = o + tl.arange(0, BN)
        m = (o_k[None, :] >= begin[:, None]) & (o_k[None, :] < end[:, None])
        top, total, out = _attend(
            q, p_k, p_v, s_k, s_v, o_k, o_k < stop, m, D, scale, top, total, out,
            BD, WIDE, PRECISION,
        )  # fmt: skip
    total = tl.where(m_q, total, 1.0)
    o_d = tl.arange(0, BD)
    p_out += i_b * Q * H * D + i_h * D + o_q[:, None] * (H * D) + o_d[None, :]
    m_out = m_q[:, None] & (o_d < D)[None, :]
    tl.store(p_out, (out / total[:, None]).to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + i_head * Q + o_q, top + tl.log(total), mask=m_q)


@triton.jit
def _ds_times_k(
    q, grad, mean, lse, p_k, p_v, s_k, s_v, o_k, m_k, m, D, scale, dq,
    BD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of queries with what further keys add."""
    k = _columns(p_k, s_k, o_k, m_k, D, BD, WIDE)
    a = tl.exp(scale * tl.dot(q, k, input_precision=PRECISION) - lse[:, None])
    v = _columns(p_v, s_v, o_k, m_k, D, BD, WIDE)
    ds = a * (tl.dot(grad, v, input_precision=PRECISION) - mean[:, None])
    ds = tl.where(m, ds, 0.0)
    k = _finite(_rows(p_k, s_k, o_k, m_k, D, BD, WIDE))
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


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
    begin, end = _seen(p_starts, first_sequence, last_sequence, o_q, m_q, LAST, BS)
    q = _rows(p_q, s_q, o_q, m_q, D, BD, WIDE)
    grad = _rows(p_grad, s_out, o_q, m_q, D, BD, WIDE)
    out = _rows(p_out, s_out, o_q, m_q, D, BD, WIDE)
    mean = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    for o in range(0, P, BP):
        o_k = o + tl.arange(0, BP)
        m_k = o_k < P
        m = m_q[:, None] & m_k[None, :]
        dq = _ds_times_k(
            q, grad, mean, lse, p_prefix_k, p_prefix_v, s_pk, s_pv, o_k, m_k, m, D, scale, dq,
            BD, WIDE, PRECISION,
        )  # fmt: skip
    for o in range(first, stop if LAST else tl.minimum(stop, first_query + BM), BN):
        o_k = o + tl.arange(0, BN)
        m = (o_k[None, :] >= begin[:, None]) & (o_k[None, :] < end[:, None])
        dq = _ds_times_k(
            q, grad, mean, lse, p_k, p_v, s_k, s_v, o_k, o_k < stop, m, D, scale, dq,
            BD, WIDE, PRECISION,
        )  # fmt: skip
    o_d = tl.arange(0, BD)
    m_out = m_q[:, None] & (o_d < D)[None, :]
    p_dq += o_q[:, None] * s_out + o_d[None, :]
    tl.store(p_dq, (scale * dq).to(p_dq.dtype.element_ty), mask=m_out)


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
    k = _rows(p_k, s_k, o_k, m_k, D, BD, WIDE)
    v = _rows(p_v, s_v, o_k, m_k, D, BD, WIDE)
    dk, dv = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    for o in range(first_query, last_query, BN):
        o_q = o + tl.arange(0, BN)
        m_q = o_q < last_query
        lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
        q = _columns(p_q, s_q, o_q, m_q, D, BD, WIDE)
        a = tl.exp(scale * tl.dot(k, q, input_precision=PRECISION) - lse[None, :])  # a key a row
        grad = _columns(p_grad, s_out, o_q, m_q, D, BD, WIDE)
        out = _columns(p_out, s_out, o_q, m_q, D, BD, WIDE)
        mean = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=0)
        ds = a * (tl.dot(v, grad, input_precision=PRECISION) - mean[None, :])
        a += _echo(grad, 0)[None, :]
        if not PREFIX:
            begin, end = _seen(p_starts, first_sequence, last_sequence, o_q, m_q, LAST, BS)
            m = (o_k[:, None] >= begin[None, :]) & (o_k[:, None] < end[None, :])
            a, ds = tl.where(m, a, 0.0), tl.where(m, ds, 0.0)
        grad = _finite(_rows(p_grad, s_out, o_q, m_q, D, BD, WIDE))
        dv = tl.dot(a.to(grad.dtype), grad, dv, input_precision=PRECISION)
        q = _finite(_rows(p_q, s_q, o_q, m_q, D, BD, WIDE))
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    o_d = tl.arange(0, BD)
    m_out = m_k[:, None] & (o_d < D)[None, :]
    o_out = o_k[:, None] * s_out + o_d[None, :]
    tl.store(p_dk + o_out, (scale * dk).to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out, dv.to(p_dv.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=(*_SIZES, "S", "tiles"))
def _prefix_gradients_kernel(
    p_q, p_k, p_v, p_prefix_k, p_prefix_v, p_grad, p_out, p_lse, p_starts, p_tiles,
    p_dq, p_dk, p_dv, p_partial,
    s_qb, s_q, s_kb, s_k, s_vb, s_v, s_pkb, s_pk, s_pvb, s_pv, Q, S, P, H, D, tiles, scale,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a tile, first programs take dq, further ones dk and dv, the rest those of the prefix."""
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
        own = first_query + i_part * BM
        if own < last_query:
            _query_gradients(
                p_q, p_k, p_v, p_prefix_k, p_prefix_v, p_grad, p_out, p_lse, p_starts,
                p_dq + i_b * Q * s_out + i_h * D, s_q, s_k, s_v, s_pk, s_pv, s_out,
                first_sequence, last_sequence, first, stop, own, last_query, P, D, scale,
                BM, BN, BP, BD, BS, LAST, WIDE, PRECISION,
            )  # fmt: skip
    elif i_part < 2 * (BS // BM):
        own = first + (i_part - BS // BM) * BM
        if own < stop:
            o_own = i_b * S * s_out + i_h * D
            _key_gradients(
                p_q, p_k, p_v, p_grad, p_out, p_lse, p_starts, p_dk + o_own, p_dv + o_own,
                s_q, s_k, s_v, s_out, first_sequence, last_sequence,
                first_query if LAST else own, last_query, own, stop, D, scale,
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
    """Gradients of a sample's prefix from those of the tiles [tiles, 2, P, H d]."""
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.arange(0, BT)
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    m_e = o_e < 2 * SIZE
    p_partial += i_b * tiles * 2 * SIZE
    b_sum = tl.zeros([BT, BE], tl.float32)
    for o in range(0, tiles, BT):
        at = (o + o_t).to(tl.int64)[:, None] * (2 * SIZE) + o_e[None, :]
        b_sum += tl.load(p_partial + at, mask=(o + o_t < tiles)[:, None] & m_e[None, :], other=0.0)
    x = tl.sum(b_sum, axis=0).to(p_dk.dtype.element_ty)
    tl.store(p_dk + i_b * SIZE + o_e, x, mask=o_e < SIZE)
    tl.store(p_dv + i_b * SIZE + o_e - SIZE, x, mask=(o_e >= SIZE) & m_e)


def _packed(*tensors: Tensor) -> list[int]:
    """Strides of samples and of rows."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _plan(find, q: Tensor, k: Tensor, prefix: Tensor, tiles: Tensor, heads: int) -> Plan:
    batch, queries, width = q.shape
    return find(
        launch.architecture(q), q.dtype == torch.bfloat16, batch * heads, len(tiles) - 1,
        prefix.shape[1], width // heads, queries != k.shape[1],
    )  # fmt: skip


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor,
    tiles: Tensor, longest: int, heads: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, Q, H d], k and v [B, S, H d], prefixes [B, P, H d], all with contiguous rows
    -> out [B, Q, H d] in their type and the log-sum-exp [B, H, Q] in float32."""
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
    """Gradients of q, k, v and the prefixes in their types; grad, out and lse are contiguous."""
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

"""Attention whose softmax runs over all K x K scores of a head at once, and its gradients.

    S = scale q k',  A = K exp(S - L),  L = ln sum exp S,  O = A v
    dv = A' dO,  dS = A (dO v' - mean),  mean = sum dO O / K,  dq = scale dS k,  dk = scale dS' q

A is a row softmax whose rows are weighted by K times their share of the sum. So the forward is row
attention, which keeps the log-sum-exp of every row, and a second launch that weights the rows. A
log-sum-exp is kept as a maximum and a rest: their rounded sum would cost digits of the exponentials
of large scores. No K x K matrix is written, and the backward takes two launches too. The batch may
share its queries. Sums run in a fixed order.

Source: RAda (its attention over classes); the row form is ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import flat_attention_plan as plan
from . import launch
from .launch_plan import Plan


@triton.jit
def _load(p_x, first, K, D, B: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Rows first to first + B of a matrix [K, D] as [B, BD]."""
    o_t, o_d = first + tl.arange(0, B), tl.arange(0, BD)
    m_x = (o_t < K)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_t[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
    return b_x.to(tl.float32) if WIDE else b_x


@triton.jit
def _load_across(p_x, first, K, D, B: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """The same rows as columns, [BD, B].

    They are loaded again: transposing a computed tile fails to compile for sm_100 with Triton 3.6.
    """
    o_t, o_d = first + tl.arange(0, B), tl.arange(0, BD)
    m_x = (o_d < D)[:, None] & (o_t < K)[None, :]
    b_x = tl.load(p_x + o_t[None, :] * D + o_d[:, None], mask=m_x, other=0.0)
    return b_x.to(tl.float32) if WIDE else b_x


@triton.jit
def _row_attention_kernel(
    p_q, p_k, p_v, p_out, p_top, p_rest, s_q, H, K, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows of row attention, and the maximum and the rest of their log-sum-exp."""
    i_head = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    first = tl.program_id(0) * BM
    b_q = _load(p_q + i_b * s_q + i_h * K * D, first, K, D, BM, BD, WIDE)
    p_k += i_head * K * D
    p_v += i_head * K * D
    o_n = tl.arange(0, BN)
    b_top = tl.full([BM], -float("inf"), tl.float32)
    b_total = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BD], tl.float32)
    for o in range(0, K, BN):
        b_k = _load_across(p_k, o, K, D, BN, BD, WIDE)
        b_s = scale * tl.dot(b_q, b_k, input_precision=PRECISION)
        b_s = tl.where((o + o_n < K)[None, :], b_s, -float("inf"))
        b_higher = tl.maximum(b_top, tl.max(b_s, axis=1))
        b_p = tl.exp(b_s - b_higher[:, None])
        b_keep = tl.exp(b_top - b_higher)
        b_total = b_total * b_keep + tl.sum(b_p, axis=1)
        b_v = _load(p_v, o, K, D, BN, BD, WIDE)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_keep[:, None], input_precision=PRECISION)
        b_top = b_higher
    o_m, o_d = first + tl.arange(0, BM), tl.arange(0, BD)
    m_out = (o_m < K)[:, None] & (o_d < D)[None, :]
    p_out += i_head * K * D + o_m[:, None] * D + o_d[None, :]
    tl.store(p_out, (b_out / b_total[:, None]).to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_top + i_head * K + o_m, b_top, mask=o_m < K)
    tl.store(p_rest + i_head * K + o_m, tl.log(b_total), mask=o_m < K)


@triton.jit
def _log_sum_of_all(p_top, p_rest, K, BK: tl.constexpr):
    """Maximum and rest of the log-sum-exp of all scores of a head, from those of its rows."""
    o_k = tl.arange(0, BK)
    b_top = tl.full([BK], -float("inf"), tl.float32)
    for o in range(0, K, BK):
        b_top = tl.maximum(b_top, tl.load(p_top + o + o_k, mask=o + o_k < K, other=-float("inf")))
    top = tl.max(b_top, axis=0)
    b_sum = tl.zeros([BK], tl.float32)
    for o in range(0, K, BK):
        m_k = o + o_k < K
        b_row = tl.load(p_top + o + o_k, mask=m_k, other=-float("inf")) - top
        b_sum += tl.exp(b_row + tl.load(p_rest + o + o_k, mask=m_k, other=0.0))
    return top, tl.log(tl.sum(b_sum, axis=0))


@triton.jit
def _weigh_rows_kernel(
    p_out, p_top, p_rest, K, D, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr
):
    """Multiplies BM rows by K times their share of the sum of all exponentials."""
    i_head = tl.program_id(1).to(tl.int64)
    p_top += i_head * K
    p_rest += i_head * K
    top, rest = _log_sum_of_all(p_top, p_rest, K, BK)
    o_m, o_d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    m_m = o_m < K
    b_row = tl.load(p_top + o_m, mask=m_m, other=0.0) - top
    b_share = tl.exp(b_row + tl.load(p_rest + o_m, mask=m_m, other=0.0) - rest)
    m_out = m_m[:, None] & (o_d < D)[None, :]
    p_out += i_head * K * D + o_m[:, None] * D + o_d[None, :]
    b_out = tl.load(p_out, mask=m_out, other=0.0).to(tl.float32) * (b_share * K)[:, None]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _sums_kernel(p_grad, p_out, p_top, p_rest, p_sums, K, SIZE, BK: tl.constexpr, BE: tl.constexpr):
    """Stores a head's mean of the formulas, and its log-sum-exp's maximum and rest: [heads, 3]."""
    i_head = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BE)
    b_sum = tl.zeros([BE], tl.float64)  # its rounding is multiplied by the largest shares
    p_grad += i_head * SIZE
    p_out += i_head * SIZE
    for o in range(0, SIZE, BE):
        m_e = o + o_e < SIZE
        b_grad = tl.load(p_grad + o + o_e, mask=m_e, other=0.0).to(tl.float64)
        b_sum += b_grad * tl.load(p_out + o + o_e, mask=m_e, other=0.0).to(tl.float64)
    top, rest = _log_sum_of_all(p_top + i_head * K, p_rest + i_head * K, K, BK)
    tl.store(p_sums + i_head * 3, (tl.sum(b_sum, axis=0) / K).to(tl.float32))
    tl.store(p_sums + i_head * 3 + 1, top)
    tl.store(p_sums + i_head * 3 + 2, rest)


@triton.jit
def _query_gradients(
    p_q, p_k, p_v, p_grad, p_sums, p_dq, i_h, i_b, samples, s_q, first, H, K, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BM rows, summed over so many samples from i_b on."""
    o_m, o_n = first + tl.arange(0, BM), tl.arange(0, BN)
    b_q = _load(p_q + i_b * s_q + i_h * K * D, first, K, D, BM, BD, WIDE)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for i in range(samples):
        i_head = (i_b + i) * H + i_h
        mean, top = tl.load(p_sums + i_head * 3), tl.load(p_sums + i_head * 3 + 1)
        rest = tl.load(p_sums + i_head * 3 + 2)
        o_head = i_head * K * D
        b_grad = _load(p_grad + o_head, first, K, D, BM, BD, WIDE)
        for o in range(0, K, BN):
            b_k = _load_across(p_k + o_head, o, K, D, BN, BD, WIDE)
            b_s = scale * tl.dot(b_q, b_k, input_precision=PRECISION)
            b_a = K * tl.exp(b_s - top - rest)
            b_v = _load_across(p_v + o_head, o, K, D, BN, BD, WIDE)
            b_ds = b_a * (tl.dot(b_grad, b_v, input_precision=PRECISION) - mean)
            b_ds = tl.where((o + o_n < K)[None, :], b_ds, 0.0)
            b_k = _load(p_k + o_head, o, K, D, BN, BD, WIDE)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    o_d = tl.arange(0, BD)
    m_out = (o_m < K)[:, None] & (o_d < D)[None, :]
    p_dq += i_b * s_q + i_h * K * D + o_m[:, None] * D + o_d[None, :]
    tl.store(p_dq, (scale * b_dq).to(p_dq.dtype.element_ty), mask=m_out)


@triton.jit
def _key_gradients(
    p_q, p_k, p_v, p_grad, p_sums, p_dk, p_dv, i_h, i_b, s_q, first, H, K, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BM rows."""
    o_m, o_n = first + tl.arange(0, BM), tl.arange(0, BN)
    i_head = i_b * H + i_h
    mean, top = tl.load(p_sums + i_head * 3), tl.load(p_sums + i_head * 3 + 1)
    rest = tl.load(p_sums + i_head * 3 + 2)
    o_head = i_head * K * D
    p_q += i_b * s_q + i_h * K * D
    b_k = _load(p_k + o_head, first, K, D, BM, BD, WIDE)
    b_v = _load(p_v + o_head, first, K, D, BM, BD, WIDE)
    b_dk, b_dv = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    for o in range(0, K, BN):
        b_q = _load_across(p_q, o, K, D, BN, BD, WIDE)
        b_s = scale * tl.dot(b_k, b_q, input_precision=PRECISION)  # a key a row
        b_a = tl.where((o + o_n < K)[None, :], K * tl.exp(b_s - top - rest), 0.0)
        b_grad = _load(p_grad + o_head, o, K, D, BN, BD, WIDE)
        b_dv = tl.dot(b_a.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
        b_grad = _load_across(p_grad + o_head, o, K, D, BN, BD, WIDE)
        b_ds = b_a * (tl.dot(b_v, b_grad, input_precision=PRECISION) - mean)
        b_q = _load(p_q, o, K, D, BN, BD, WIDE)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_d = tl.arange(0, BD)
    m_out = (o_m < K)[:, None] & (o_d < D)[None, :]
    o_out = o_head + o_m[:, None] * D + o_d[None, :]
    tl.store(p_dk + o_out, (scale * b_dk).to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_out)


@triton.jit
def _attention_gradients_kernel(
    p_q, p_k, p_v, p_grad, p_sums, p_dq, p_dk, p_dv, s_q, H, K, D, shared, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Even programs compute dq, odd ones dk and dv. The first sample computes dq of shared queries.

    shared: samples that share the queries, 0 if each has its own.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    first = tl.program_id(0) // 2 * BM
    if tl.program_id(0) % 2 == 1:
        _key_gradients(
            p_q, p_k, p_v, p_grad, p_sums, p_dk, p_dv, i_h, i_b, s_q, first, H, K, D, scale,
            BM, BN, BD, WIDE, PRECISION,
        )  # fmt: skip
    elif (shared == 0) | (i_b == 0):
        _query_gradients(
            p_q, p_k, p_v, p_grad, p_sums, p_dq, i_h, i_b, tl.maximum(shared, 1), s_q, first, H,
            K, D, scale, BM, BN, BD, WIDE, PRECISION,
        )  # fmt: skip


def _plan(q: Tensor, heads: int) -> tuple[Plan, Plan]:
    return plan.forward(launch.architecture(q), q.dtype == torch.bfloat16, heads, *q.shape[-2:])


def flat_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q [B or 1, H, K, d] and of k, v [B, H, K, d], all contiguous and of one type.

    Returns:
        The output [B, H, K, d] in their type, and the maximum and the rest of the rows' log-sum-exp
        [B, H, K] in float32.
    """
    batch, heads, count, d = k.shape
    out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    top, rest = (torch.empty(k.shape[:3], dtype=torch.float32, device=k.device) for _ in range(2))
    if k.numel():
        rows, weights = _plan(q, batch * heads)
        s_q = 0 if len(q) < batch else q.stride(0)
        launch.run(
            _row_attention_kernel, rows, q, k, v, out, top, rest, s_q, heads, count, d, scale
        )
        launch.run(_weigh_rows_kernel, weights, out, top, rest, count, d)
    return out, top, rest


def flat_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, rest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their types and shapes, from grad [B, H, K, d].

    All tensors are contiguous; out, top and rest are what the forward returned.
    """
    batch, heads, count, d = k.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if k.numel():
        sums = torch.empty((batch * heads, 3), dtype=torch.float32, device=k.device)
        gradients = plan.gradients(
            launch.architecture(q), q.dtype == torch.bfloat16, batch * heads, count, d
        )
        launch.run(
            _sums_kernel, plan.head_sums(batch * heads), grad, out, top, rest, sums, count,
            count * d,
        )  # fmt: skip
        shared = batch if len(q) < batch else 0
        launch.run(
            _attention_gradients_kernel, gradients, q, k, v, grad, sums, dq, dk, dv,
            0 if shared else q.stride(0), heads, count, d, shared, scale,
        )  # fmt: skip
    return dq, dk, dv

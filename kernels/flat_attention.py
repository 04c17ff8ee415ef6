"""Attention whose softmax runs over all K x K scores of a head at once, and its gradients.

    S = scale q k',  A = K exp(S - L),  L = ln sum exp S,  O = A v
    dv = A' dO,  dS = A (dO v' - mean),  mean = sum dO O / K,  dq = scale dS k,  dk = scale dS' q

A is a row softmax whose rows are weighted by K times their share of the sum, so the forward is
that of row attention with the rows' sums kept, as maximum and rest, because their rounded sum would
cost digits of exponentials of large scores; then rows are weighted. No K x K matrix is written and
both directions take two launches. Queries may be shared by the batch; sums run in a fixed order.

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
    m = (o_t < K)[:, None] & (o_d < D)[None, :]
    x = tl.load(p_x + o_t[:, None] * D + o_d[None, :], mask=m, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _load_across(p_x, first, K, D, B: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """The same rows as columns, [BD, B]: transposing a computed tile fails to compile for sm_100
    with Triton 3.6."""
    o_t, o_d = first + tl.arange(0, B), tl.arange(0, BD)
    m = (o_d < D)[:, None] & (o_t < K)[None, :]
    x = tl.load(p_x + o_t[None, :] * D + o_d[:, None], mask=m, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _row_attention_kernel(
    p_q, p_k, p_v, p_out, p_top, p_rest, s_q, H, K, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Row softmax times v, and the maximum and the rest of the rows' log-sum-exp."""
    i_head = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    first = tl.program_id(0) * BM
    q = _load(p_q + i_b * s_q + i_h * K * D, first, K, D, BM, BD, WIDE)
    p_k += i_head * K * D
    p_v += i_head * K * D
    o_n = tl.arange(0, BN)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    for o in range(0, K, BN):
        k = _load_across(p_k, o, K, D, BN, BD, WIDE)
        s = scale * tl.dot(q, k, input_precision=PRECISION)
        s = tl.where((o + o_n < K)[None, :], s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp(s - higher[:, None])
        keep = tl.exp(top - higher)
        total = total * keep + tl.sum(p, axis=1)
        v = _load(p_v, o, K, D, BN, BD, WIDE)
        out = tl.dot(p.to(v.dtype), v, out * keep[:, None], input_precision=PRECISION)
        top = higher
    o_m, o_d = first + tl.arange(0, BM), tl.arange(0, BD)
    m_out = (o_m < K)[:, None] & (o_d < D)[None, :]
    p_out += i_head * K * D + o_m[:, None] * D + o_d[None, :]
    tl.store(p_out, (out / total[:, None]).to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_top + i_head * K + o_m, top, mask=o_m < K)
    tl.store(p_rest + i_head * K + o_m, tl.log(total), mask=o_m < K)


@triton.jit
def _whole(p_top, p_rest, K, BK: tl.constexpr):
    """Maximum and rest of the log-sum-exp of all scores, from those of the rows."""
    o_k = tl.arange(0, BK)
    b_top = tl.full([BK], -float("inf"), tl.float32)
    for o in range(0, K, BK):
        b_top = tl.maximum(b_top, tl.load(p_top + o + o_k, mask=o + o_k < K, other=-float("inf")))
    top = tl.max(b_top, axis=0)
    b_sum = tl.zeros([BK], tl.float32)
    for o in range(0, K, BK):
        m = o + o_k < K
        row = tl.load(p_top + o + o_k, mask=m, other=-float("inf")) - top
        b_sum += tl.exp(row + tl.load(p_rest + o + o_k, mask=m, other=0.0))
    return top, tl.log(tl.sum(b_sum, axis=0))


@triton.jit
def _weigh_rows_kernel(
    p_out, p_top, p_rest, K, D, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr
):
    """Rows times K times their share of the sum of all exponentials."""
    i_head = tl.program_id(1).to(tl.int64)
    p_top += i_head * K
    p_rest += i_head * K
    top, rest = _whole(p_top, p_rest, K, BK)
    o_m, o_d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    m_m = o_m < K
    row = tl.load(p_top + o_m, mask=m_m, other=0.0) - top
    share = tl.exp(row + tl.load(p_rest + o_m, mask=m_m, other=0.0) - rest)
    m_out = m_m[:, None] & (o_d < D)[None, :]
    p_out += i_head * K * D + o_m[:, None] * D + o_d[None, :]
    out = tl.load(p_out, mask=m_out, other=0.0).to(tl.float32) * (share * K)[:, None]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _sums_kernel(p_grad, p_out, p_top, p_rest, p_sums, K, SIZE, BK: tl.constexpr, BE: tl.constexpr):
    """Of a head: mean of its gradient, maximum and rest of the log-sum-exp, to sums [heads, 3]."""
    i_head = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BE)
    b_sum = tl.zeros([BE], tl.float64)  # its rounding is multiplied by the largest shares
    p_grad += i_head * SIZE
    p_out += i_head * SIZE
    for o in range(0, SIZE, BE):
        m = o + o_e < SIZE
        grad = tl.load(p_grad + o + o_e, mask=m, other=0.0).to(tl.float64)
        b_sum += grad * tl.load(p_out + o + o_e, mask=m, other=0.0).to(tl.float64)
    top, rest = _whole(p_top + i_head * K, p_rest + i_head * K, K, BK)
    tl.store(p_sums + i_head * 3, (tl.sum(b_sum, axis=0) / K).to(tl.float32))
    tl.store(p_sums + i_head * 3 + 1, top)
    tl.store(p_sums + i_head * 3 + 2, rest)


@triton.jit
def _query_gradients(
    p_q, p_k, p_v, p_grad, p_sums, p_dq, i_h, i_b, samples, s_q, first, H, K, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BM rows, summed over samples from i_b on."""
    o_m, o_n = first + tl.arange(0, BM), tl.arange(0, BN)
    q = _load(p_q + i_b * s_q + i_h * K * D, first, K, D, BM, BD, WIDE)
    dq = tl.zeros([BM, BD], tl.float32)
    for i in range(samples):
        i_head = (i_b + i) * H + i_h
        mean, top = tl.load(p_sums + i_head * 3), tl.load(p_sums + i_head * 3 + 1)
        rest = tl.load(p_sums + i_head * 3 + 2)
        o_head = i_head * K * D
        grad = _load(p_grad + o_head, first, K, D, BM, BD, WIDE)
        for o in range(0, K, BN):
            k = _load_across(p_k + o_head, o, K, D, BN, BD, WIDE)
            s = scale * tl.dot(q, k, input_precision=PRECISION)
            a = K * tl.exp(s - top - rest)
            v = _load_across(p_v + o_head, o, K, D, BN, BD, WIDE)
            ds = a * (tl.dot(grad, v, input_precision=PRECISION) - mean)
            ds = tl.where((o + o_n < K)[None, :], ds, 0.0)
            k = _load(p_k + o_head, o, K, D, BN, BD, WIDE)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    o_d = tl.arange(0, BD)
    m_out = (o_m < K)[:, None] & (o_d < D)[None, :]
    p_dq += i_b * s_q + i_h * K * D + o_m[:, None] * D + o_d[None, :]
    tl.store(p_dq, (scale * dq).to(p_dq.dtype.element_ty), mask=m_out)


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
    k = _load(p_k + o_head, first, K, D, BM, BD, WIDE)
    v = _load(p_v + o_head, first, K, D, BM, BD, WIDE)
    dk, dv = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    for o in range(0, K, BN):
        q = _load_across(p_q, o, K, D, BN, BD, WIDE)
        s = scale * tl.dot(k, q, input_precision=PRECISION)  # a key a row
        a = tl.where((o + o_n < K)[None, :], K * tl.exp(s - top - rest), 0.0)
        grad = _load(p_grad + o_head, o, K, D, BN, BD, WIDE)
        dv = tl.dot(a.to(grad.dtype), grad, dv, input_precision=PRECISION)
        grad = _load_across(p_grad + o_head, o, K, D, BN, BD, WIDE)
        ds = a * (tl.dot(v, grad, input_precision=PRECISION) - mean)
        q = _load(p_q, o, K, D, BN, BD, WIDE)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    o_d = tl.arange(0, BD)
    m_out = (o_m < K)[:, None] & (o_d < D)[None, :]
    o_out = o_head + o_m[:, None] * D + o_d[None, :]
    tl.store(p_dk + o_out, (scale * dk).to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out, dv.to(p_dv.dtype.element_ty), mask=m_out)


@triton.jit
def _attention_gradients_kernel(
    p_q, p_k, p_v, p_grad, p_sums, p_dq, p_dk, p_dv, s_q, H, K, D, shared, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Even programs dq, odd ones dk and dv. dq of shared queries is the first sample's work."""
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
    """q [B or 1, H, K, d], k and v [B, H, K, d], contiguous -> out [B, H, K, d] in their type,
    maximum and rest of the rows' log-sum-exp [B, H, K] in float32."""
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
    """Gradients of q, k and v in their types; all tensors contiguous."""
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

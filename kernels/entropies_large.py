"""Entropies of rows too long for registers: swept in chunks, which stay in the L2 cache.

Formulas are those of entropies.py. Two launches: samples (maximum, sum, selection, entropy), then
the gradient. The adaptation head of such rows begins with the first.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import entropies_plan as plan
from . import launch
from .class_selection import KEY_BITS, order_keys, principal_terms


@triton.jit
def _merged_softmax(z_max, e_sum, b_z, m_z):
    """Merges a chunk of logits into the maximum and the sum of exponentials so far.

    Returns the new maximum, the old sum scaled to it, and the chunk's exponentials.
    """
    new = tl.maximum(z_max, tl.max(tl.where(m_z, b_z, -float("inf")), axis=0))
    shift = tl.where(new == -float("inf"), 0.0, new)  # -inf - -inf is nan
    b_e = tl.where(m_z, tl.exp(b_z - shift), 0.0)
    return new, e_sum * tl.exp(z_max - shift), b_e


@triton.jit(do_not_specialize=["n", "k"])
def _samples_kernel(
    p_z, p_entropy, p_rows, p_selection, s_n, s_c, n, C, k, eps,
    SELECT: tl.constexpr, BITS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One sample: principal entropy, [max, sum, <p, g>], and [smallest selected key, last index at
    which a key equal to it is selected]."""
    i = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    p_z += i * s_n
    z_max, e_sum = tl.full([1], -float("inf"), tl.float32), tl.zeros([1], tl.float32)
    for o in range(0, C, BC):
        m_c = o + o_c < C
        b_z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=-float("inf")).to(tl.float32)
        z_max, e_sum, b_e = _merged_softmax(z_max, e_sum, b_z, m_c)
        e_sum += tl.sum(b_e, axis=0)
    threshold, left = tl.full([1], 0, tl.uint32), tl.full([1], 0, tl.int32)
    if SELECT:
        # two bits of the k-th largest key a sweep; three counts of up to 1023 chunks in a lane
        unit = tl.full([1], 1 << (BITS - 2), tl.uint32)
        for _ in range(BITS // 2):
            b_counts = tl.zeros([BC], tl.int32)
            for o in range(0, C, BC):
                m_c = o + o_c < C
                b_z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
                b_key = order_keys(b_z, BITS)
                b_count = (b_key >= threshold + unit).to(tl.int32)
                b_count += (b_key >= threshold + unit * 2).to(tl.int32) << 10
                b_count += (b_key >= threshold + unit * 3).to(tl.int32) << 20
                b_counts += tl.where(m_c, b_count, 0)
            steps = (tl.sum(b_counts & 1023, axis=0) >= k).to(tl.uint32)
            steps += (tl.sum((b_counts >> 10) & 1023, axis=0) >= k).to(tl.uint32)
            steps += (tl.sum(b_counts >> 20, axis=0) >= k).to(tl.uint32)
            threshold += steps * unit
            unit = unit >> 2
        b_counts = tl.zeros([BC], tl.int32)
        for o in range(0, C, BC):
            m_c = o + o_c < C
            b_z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
            b_counts += tl.where(m_c, (order_keys(b_z, BITS) > threshold).to(tl.int32), 0)
        left = k - tl.sum(b_counts, axis=0) + left
    last = tl.full([1], -1, tl.int32)
    b_terms, b_slopes = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for o in range(0, C, BC):
        m_c = o + o_c < C
        b_z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=-float("inf")).to(tl.float32)
        m_selected = m_c
        if SELECT:
            b_key = order_keys(b_z, BITS)
            m_tied = (b_key == threshold) & m_c
            m_chosen = m_tied & (tl.cumsum(m_tied.to(tl.int32), axis=0) <= left)
            left -= tl.sum(m_tied.to(tl.int32), axis=0)
            last = tl.maximum(last, tl.max(tl.where(m_chosen, o + o_c, -1), axis=0))
            m_selected = ((b_key > threshold) & m_c) | m_chosen
        b_p = tl.exp(b_z - z_max) / e_sum
        b_chunk_terms, b_chunk_slopes = principal_terms(b_p, m_selected, eps)
        b_terms += tl.where(m_c, b_chunk_terms, 0.0)
        b_slopes += tl.where(m_c, b_chunk_slopes, 0.0)
    o_1 = tl.arange(0, 1)
    tl.store(p_entropy + i, tl.sum(b_terms, axis=0))
    tl.store(p_rows + i * 3 + o_1, z_max)
    tl.store(p_rows + i * 3 + 1 + o_1, e_sum)
    tl.store(p_rows + i * 3 + 2, tl.sum(b_slopes, axis=0))
    tl.store(p_selection + i * 2 + o_1, threshold.to(tl.int32, bitcast=True))
    tl.store(p_selection + i * 2 + 1 + o_1, last)


@triton.jit
def chunk_slopes(
    b_z, m_c, o_c, z_max, e_sum, threshold, last, eps, SELECT: tl.constexpr, BITS: tl.constexpr
):
    """Probabilities of a chunk, and p g of the formulas on the classes that are selected."""
    b_p = tl.exp(b_z - z_max) / e_sum
    m_selected = m_c
    if SELECT:
        b_key = order_keys(b_z, BITS)
        m_selected = (b_key > threshold) | ((b_key == threshold) & (o_c <= last))
    _, b_slopes = principal_terms(b_p, m_selected, eps)
    return b_p, b_slopes


@triton.jit
def _gradient_kernel(
    p_z, p_upstream, p_rows, p_selection, p_grad, s_n, s_c, s_upstream, sg_n, sg_c, C, eps,
    SELECT: tl.constexpr, BITS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One sample's gradient of the principal entropy times upstream."""
    i = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    p_z += i * s_n
    z_max, e_sum = tl.load(p_rows + i * 3), tl.load(p_rows + i * 3 + 1)
    slope = tl.load(p_rows + i * 3 + 2)
    threshold = tl.load(p_selection + i * 2).to(tl.uint32, bitcast=True)
    last = tl.load(p_selection + i * 2 + 1)
    upstream = tl.load(p_upstream + i * s_upstream).to(tl.float32)
    for o in range(0, C, BC):
        m_c = o + o_c < C
        b_z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
        b_p, b_slopes = chunk_slopes(
            b_z, m_c, o + o_c, z_max, e_sum, threshold, last, eps, SELECT, BITS
        )
        b_grad = upstream * (b_slopes - b_p * slope)
        p_out = p_grad + i * sg_n + (o + o_c) * sg_c
        tl.store(p_out, b_grad.to(p_grad.dtype.element_ty), mask=m_c)


def run_samples(logits: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the first sweep over logits [n, C].

    Returns:
        Entropy [n]; maximum, sum of exponentials and <p, g> [n, 3]; and [n, 2] int32, the key of
        the smallest selected logit and the last index at which an equal one is selected.
    """
    n, classes = logits.shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    entropy, rows = empty(n), empty((n, 3))
    selection = torch.empty((n, 2), dtype=torch.int32, device=logits.device)
    if n:
        samples = plan.long_rows(n, classes, k, KEY_BITS[logits.dtype])
        launch.run(
            _samples_kernel, samples, logits, entropy, rows, selection, *logits.stride(), n,
            classes, k, eps,
        )  # fmt: skip
    return entropy, rows, selection


def principal_entropy(logits: Tensor, k: int, eps: float) -> Tensor:
    """As entropies.principal_entropy."""
    return run_samples(logits, k, eps)[0]


def principal_entropy_backward(upstream: Tensor, logits: Tensor, k: int, eps: float) -> Tensor:
    """As entropies.principal_entropy_backward."""
    n, classes = logits.shape
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if n:
        _, rows, selection = run_samples(logits, k, eps)
        gradient = plan.long_row_gradient(n, classes, k, KEY_BITS[logits.dtype])
        launch.run(
            _gradient_kernel, gradient, logits, upstream, rows, selection, grad,
            *logits.stride(), upstream.stride(0), *grad.stride(), classes, eps,
        )  # fmt: skip
    return grad

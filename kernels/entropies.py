"""Entropy and principal entropy of each sample, and their gradients.

    entropy_i = sum over the k largest p_ic of -p_ic ln(p_ic + eps),  p = softmax(z)
    d entropy_i / dz_i = p (g - <p, g>),  g = -ln(p + eps) - p / (p + eps) on the selected

Rows of at most 4096 logits stay in registers; entropies_large.py has the kernels of longer ones.
The plain entropy is k = C, eps = 0. The launch of the rows also serves the adaptation head, which
needs more of each.

Source: ABPEM (principal entropy). Of equal logits the lowest index is selected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import entropies_large as large
from . import entropies_plan as plan
from . import launch
from .class_selection import KEY_BITS, order_keys, principal_terms, smallest_selected


@triton.jit(do_not_specialize=["n", "k", "R"])
def _rows_kernel(
    p_z, p_weight, p_upstream, p_entropy, p_grad, p_rows, p_mass,
    s_n, s_c, s_weight, s_upstream, sg_n, sg_c, n, C, k, R, eps,
    SELECT: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """R samples: principal entropy [n], its gradient [n, C], maximum and sum of the softmax [2, n],
    and the sum of weighted predictions [programs, C]; each where its pointer is not None."""
    i_p = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_mass = tl.zeros([BC], tl.float32)
    for r in range(R):
        i = i_p * R + r
        m_z = m_c & (i < n)
        b_z = tl.load(p_z + i * s_n + o_c * s_c, mask=m_z, other=-float("inf")).to(tl.float32)
        z_max = tl.max(b_z, axis=0)
        b_e = tl.exp(b_z - z_max)
        e_sum = tl.sum(tl.where(m_c, b_e, 0.0), axis=0)
        b_p = b_e / e_sum
        m_selected = m_c
        if SELECT:
            b_key = tl.where(m_c, order_keys(b_z, BITS), 0)
            threshold = smallest_selected(b_key, k, BITS, PACKED)
            m_above, m_tied = b_key > threshold, (b_key == threshold) & m_c
            left = k - tl.sum(m_above.to(tl.int32), axis=0)
            m_selected = m_above | (m_tied & (tl.cumsum(m_tied.to(tl.int32), axis=0) <= left))
        b_terms, b_slopes = principal_terms(b_p, m_selected, eps)
        if p_entropy is not None:
            tl.store(p_entropy + i, tl.sum(b_terms, axis=0), mask=i < n)
        if p_grad is not None:
            b_grad = b_slopes - b_p * tl.sum(b_slopes, axis=0)
            if p_upstream is not None:
                upstream = tl.load(p_upstream + i * s_upstream, mask=i < n, other=0.0)
                b_grad *= upstream.to(tl.float32)
            p_out = p_grad + i * sg_n + o_c * sg_c
            tl.store(p_out, b_grad.to(p_grad.dtype.element_ty), mask=m_z)
        if p_mass is not None:
            tl.store(p_rows + i, z_max, mask=i < n)
            tl.store(p_rows + n + i, e_sum, mask=i < n)
            if p_weight is not None:
                b_p *= tl.load(p_weight + i * s_weight, mask=i < n, other=0.0).to(tl.float32)
            b_mass += tl.where(m_z, b_p, 0.0)
    if p_mass is not None:
        tl.store(p_mass + i_p * C + o_c, b_mass, mask=m_c)


@triton.jit
def mean_entropy(p_entropy, p_weight, s_weight, n, BN: tl.constexpr):
    """Weighted mean of the samples' entropies [n], and the sum of the weights (n without them)."""
    o_n = tl.arange(0, BN)
    weight_sum, entropy = 0.0, 0.0
    for o in range(0, n, BN):
        m_n = o + o_n < n
        b_entropy = tl.load(p_entropy + o + o_n, mask=m_n, other=0.0)
        if p_weight is not None:
            b_w = tl.load(p_weight + (o + o_n) * s_weight, mask=m_n, other=0.0).to(tl.float32)
            b_entropy *= b_w
            weight_sum += tl.sum(b_w, axis=0)
        entropy += tl.sum(b_entropy, axis=0)
    if p_weight is None:
        weight_sum += n
    return entropy / weight_sum, weight_sum


def run_rows(
    logits: Tensor, k: int, eps: float, *, weight: Tensor | None = None,
    upstream: Tensor | None = None, entropy: Tensor | None = None, grad: Tensor | None = None,
    rows: Tensor | None = None, mass: Tensor | None = None, samples: int = 1,
) -> None:  # fmt: skip
    """Launches the kernel of rows of at most plan.ROW_CLASSES logits.

    Args:
        logits: [n, C] of any strides.
        k, eps: classes that count, and what is added to a probability before its logarithm.
        weight: [n], of the samples in ``mass``.
        upstream: [n], by which ``grad`` is multiplied.
        entropy, grad, rows, mass: written where they are not None: [n], [n, C], [2, n] (maximum of
            a row, and sum of the exponentials less that), [parts, C] (sums of predictions).
        samples: that one program takes, and one part of ``mass`` sums.
    """
    n, classes = logits.shape
    if not n:
        return
    rowwise = plan.rows(n, classes, k, KEY_BITS[logits.dtype], samples)
    launch.run(
        _rows_kernel, rowwise, logits, weight, upstream, entropy, grad, rows, mass,
        *logits.stride(), *(0 if x is None else x.stride(0) for x in (weight, upstream)),
        *((0, 0) if grad is None else grad.stride()), n, classes, k, samples, eps,
    )  # fmt: skip


def principal_entropy(logits: Tensor, k: int, eps: float) -> Tensor:
    """Entropy [n] of the k largest probabilities, in float32, of logits [n, C]."""
    if logits.shape[1] > plan.ROW_CLASSES:
        return large.principal_entropy(logits, k, eps)
    entropy = torch.empty(logits.shape[:1], dtype=torch.float32, device=logits.device)
    run_rows(logits, k, eps, entropy=entropy)
    return entropy


def principal_entropy_backward(upstream: Tensor, logits: Tensor, k: int, eps: float) -> Tensor:
    """Gradient [n, C], in the type of the logits, from upstream [n]."""
    if logits.shape[1] > plan.ROW_CLASSES:
        return large.principal_entropy_backward(upstream, logits, k, eps)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    run_rows(logits, k, eps, upstream=upstream, grad=grad)
    return grad


def entropy(logits: Tensor) -> Tensor:
    """Entropy [n], in float32, of logits [n, C]."""
    return principal_entropy(logits, logits.shape[1], 0.0)


def entropy_backward(upstream: Tensor, logits: Tensor) -> Tensor:
    """Gradient [n, C], in the type of the logits, from upstream [n]."""
    return principal_entropy_backward(upstream, logits, logits.shape[1], 0.0)

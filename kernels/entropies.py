"""Entropy and principal entropy of each sample, and their gradients; rows of at most 4096 logits.

    entropy_i = sum over the k largest p_ic of -p_ic ln(p_ic + eps),  p = softmax(z)
    d entropy_i / dz_i = p (g - <p, g>),  g = -ln(p + eps) - p / (p + eps) on the selected

A row stays in registers. The plain entropy is k = C, eps = 0. The launch of the rows also serves
the adaptation head, which needs more of each.

Source: ABPEM (principal entropy). Of equal logits the lowest index is selected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adaptation_head_large as large
from . import launch, plan
from .class_selection import order_keys, principal_terms, smallest_selected

_KEY_BITS = {torch.bfloat16: 16, torch.float16: 20}


@triton.jit(do_not_specialize=["n", "k", "R"])
def _rows_kernel(
    p_z, p_weight, p_upstream, p_entropy, p_grad, p_rows, p_mass,
    s_n, s_c, s_weight, s_upstream, sg_n, sg_c, n, C, k, R, eps,
    SELECT: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """R samples: principal entropy [n], its gradient [n, C], max and sum of the softmax [2, n],
    and the sum of weighted predictions [programs, C]; each where its pointer is given."""
    i_p = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_mass = tl.zeros([BC], tl.float32)
    for r in range(R):
        i = i_p * R + r
        m_z = m_c & (i < n)
        z = tl.load(p_z + i * s_n + o_c * s_c, mask=m_z, other=-float("inf")).to(tl.float32)
        z_max = tl.max(z, axis=0)
        e = tl.exp(z - z_max)
        e_sum = tl.sum(tl.where(m_c, e, 0.0), axis=0)
        p = e / e_sum
        selected = m_c
        if SELECT:
            key = tl.where(m_c, order_keys(z, BITS), 0)
            t = smallest_selected(key, k, BITS, PACKED)
            above, tied = key > t, (key == t) & m_c
            left = k - tl.sum(above.to(tl.int32), axis=0)
            selected = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= left))
        terms, slopes = principal_terms(p, selected, eps)
        if p_entropy is not None:
            tl.store(p_entropy + i, tl.sum(terms, axis=0), mask=i < n)
        if p_grad is not None:
            grad = slopes - p * tl.sum(slopes, axis=0)
            if p_upstream is not None:
                up = tl.load(p_upstream + i * s_upstream, mask=i < n, other=0.0)
                grad *= up.to(tl.float32)
            p_out = p_grad + i * sg_n + o_c * sg_c
            tl.store(p_out, grad.to(p_grad.dtype.element_ty), mask=m_z)
        if p_mass is not None:
            tl.store(p_rows + i, z_max, mask=i < n)
            tl.store(p_rows + n + i, e_sum, mask=i < n)
            if p_weight is not None:
                p *= tl.load(p_weight + i * s_weight, mask=i < n, other=0.0).to(tl.float32)
            b_mass += tl.where(m_z, p, 0.0)
    if p_mass is not None:
        tl.store(p_mass + i_p * C + o_c, b_mass, mask=m_c)


def run_rows(
    logits: Tensor, k: int, eps: float, *, weight: Tensor | None = None,
    upstream: Tensor | None = None, entropy: Tensor | None = None, grad: Tensor | None = None,
    rows: Tensor | None = None, mass: Tensor | None = None, samples: int = 1,
) -> None:  # fmt: skip
    """samples: how many a program takes."""
    n, classes = logits.shape
    if not n:
        return
    rowwise = plan.head_rows(n, classes, k, _KEY_BITS.get(logits.dtype, 32), samples)
    launch.run(
        _rows_kernel, rowwise, logits, weight, upstream, entropy, grad, rows, mass,
        *logits.stride(), *(0 if x is None else x.stride(0) for x in (weight, upstream)),
        *((0, 0) if grad is None else grad.stride()), n, classes, k, samples, eps,
    )  # fmt: skip


def principal_entropy(logits: Tensor, k: int, eps: float) -> Tensor:
    """[n, C] -> [n]"""
    if logits.shape[1] > plan.ROW_CLASSES:
        return large.principal_entropy(logits, k, eps)
    entropy = torch.empty(logits.shape[:1], dtype=torch.float32, device=logits.device)
    run_rows(logits, k, eps, entropy=entropy)
    return entropy


def principal_entropy_backward(upstream: Tensor, logits: Tensor, k: int, eps: float) -> Tensor:
    """upstream [n], gradient [n, C] in the type of the logits."""
    if logits.shape[1] > plan.ROW_CLASSES:
        return large.principal_entropy_backward(upstream, logits, k, eps)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    run_rows(logits, k, eps, upstream=upstream, grad=grad)
    return grad


def entropy(logits: Tensor) -> Tensor:
    """[n, C] -> [n]"""
    return principal_entropy(logits, logits.shape[1], 0.0)


def entropy_backward(upstream: Tensor, logits: Tensor) -> Tensor:
    """upstream [n], gradient [n, C] in the type of the logits."""
    return principal_entropy_backward(upstream, logits, logits.shape[1], 0.0)

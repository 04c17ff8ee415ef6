"""The adaptation head for rows too long for registers: swept in chunks, which stay in the L2 cache.

Formulas are those of adaptation_head.py. Three launches: samples (entropies_large.py), columns
(predictions summed over samples), gradient.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adaptation_head_plan as plan
from . import launch
from .class_selection import KEY_BITS, surprise
from .entropies import mean_entropy
from .entropies_large import chunk_slopes, run_samples


@triton.jit(do_not_specialize=["n"])
def _columns_kernel(
    p_z, p_weight, p_rows, p_mass, s_n, s_c, s_weight, n, C,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Weighted predictions summed over the samples, to mass [C]."""
    o_r, o_c = tl.arange(0, BR), tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_mass = tl.zeros([BC], tl.float32)
    for o in range(0, n, BR):
        i, m_r = (o + o_r).to(tl.int64), o + o_r < n
        m_z = m_r[:, None] & m_c[None, :]
        b_z = tl.load(p_z + i[:, None] * s_n + o_c[None, :] * s_c, mask=m_z, other=0.0)
        b_z_max = tl.load(p_rows + i * 3, mask=m_r, other=0.0)
        b_w = 1.0 / tl.load(p_rows + i * 3 + 1, mask=m_r, other=1.0)
        if p_weight is not None:
            b_w *= tl.load(p_weight + i * s_weight, mask=m_r, other=0.0).to(tl.float32)
        b_e = tl.exp(b_z.to(tl.float32) - b_z_max[:, None]) * b_w[:, None]
        b_mass += tl.sum(tl.where(m_z, b_e, 0.0), axis=0)
    tl.store(p_mass + o_c, b_mass, mask=m_c)


@triton.jit
def _mass_scale(p_mass, weight_sum, C, SOFTMAX_SUM: tl.constexpr, BC: tl.constexpr):
    """What turns mass into the class distribution m: its maximum (0 for the mean) and its sum."""
    mass_max, mass_sum = 0.0, weight_sum
    if SOFTMAX_SUM:
        o_c = tl.arange(0, BC)
        b_max = tl.full([BC], -float("inf"), tl.float32)
        for o in range(0, C, BC):
            b_mass = tl.load(p_mass + o + o_c, mask=o + o_c < C, other=-float("inf"))
            b_max = tl.maximum(b_max, b_mass)
        mass_max = tl.max(b_max, axis=0)
        b_sum = tl.zeros([BC], tl.float32)
        for o in range(0, C, BC):
            b_mass = tl.load(p_mass + o + o_c, mask=o + o_c < C, other=-float("inf"))
            b_sum += tl.exp(b_mass - mass_max)
        mass_sum = tl.sum(b_sum, axis=0)
    return mass_max, mass_sum


@triton.jit
def _distribution(p_mass, o_c, m_c, mass_max, mass_sum, SOFTMAX_SUM: tl.constexpr):
    """The class distribution m of a chunk."""
    b_m = tl.load(p_mass + o_c, mask=m_c, other=0.0)
    if SOFTMAX_SUM:
        b_m = tl.exp(b_m - mass_max)
    return b_m / mass_sum


@triton.jit
def _balance(
    p_z, s_c, z_max, e_sum, p_mass, mass_max, mass_sum, weight_sum, C,
    SOFTMAX_SUM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The balance, and <p, h> of one sample: h is the balance's derivative on its predictions."""
    o_c = tl.arange(0, BC)
    b_balance, b_along = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    b_along_mass = tl.zeros([BC], tl.float32)
    for o in range(0, C, BC):
        m_c = o + o_c < C
        b_m = _distribution(p_mass, o + o_c, m_c, mass_max, mass_sum, SOFTMAX_SUM)
        b_m = tl.where(m_c, b_m, 0.0)
        b_h = surprise(b_m, 0.0)
        b_z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
        b_p = tl.where(m_c, tl.exp(b_z - z_max) / e_sum, 0.0)
        b_balance += b_m * b_h
        b_along += b_p * (b_m * b_h if SOFTMAX_SUM else b_h)
        b_along_mass += b_p * b_m
    balance = tl.sum(b_balance, axis=0)
    along = tl.sum(b_along, axis=0)
    if SOFTMAX_SUM:  # <p, m (h - balance)>
        along -= balance * tl.sum(b_along_mass, axis=0)
    else:
        along /= weight_sum
    return balance, along


@triton.jit(do_not_specialize=["n"])
def _gradient_kernel(
    p_z, p_weight, p_entropy, p_rows, p_selection, p_mass, p_total, p_mean_entropy, p_balance,
    p_grad, s_n, s_c, s_weight, n, C, eps, entropy_weight, balance_weight,
    SELECT: tl.constexpr, BITS: tl.constexpr, SOFTMAX_SUM: tl.constexpr, BC: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One sample's gradient of the total; the first program also stores the three losses."""
    i = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    p_z += i * s_n
    z_max, e_sum = tl.load(p_rows + i * 3), tl.load(p_rows + i * 3 + 1)
    slope = tl.load(p_rows + i * 3 + 2)
    entropy, weight_sum = mean_entropy(p_entropy, p_weight, s_weight, n, BN)
    mass_max, mass_sum = _mass_scale(p_mass, weight_sum, C, SOFTMAX_SUM, BC)
    balance, along = _balance(
        p_z, s_c, z_max, e_sum, p_mass, mass_max, mass_sum, weight_sum, C, SOFTMAX_SUM, BC
    )
    if i == 0:
        tl.store(p_total, entropy_weight * entropy - balance_weight * balance)
        tl.store(p_mean_entropy, entropy)
        tl.store(p_balance, balance)
    of_entropy = entropy_weight / weight_sum
    threshold = tl.load(p_selection + i * 2).to(tl.uint32, bitcast=True)
    last = tl.load(p_selection + i * 2 + 1)
    for o in range(0, C, BC):
        m_c = o + o_c < C
        b_z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
        b_p, b_slopes = chunk_slopes(
            b_z, m_c, o + o_c, z_max, e_sum, threshold, last, eps, SELECT, BITS
        )
        b_grad = of_entropy * (b_slopes - b_p * slope)
        b_m = _distribution(p_mass, o + o_c, m_c, mass_max, mass_sum, SOFTMAX_SUM)
        b_h = surprise(b_m, 0.0)
        b_h = b_m * (b_h - balance) if SOFTMAX_SUM else b_h / mass_sum
        b_grad -= balance_weight * b_p * (b_h - along)
        if p_weight is not None:
            b_grad *= tl.load(p_weight + i * s_weight).to(tl.float32)
        tl.store(p_grad + i * C + o + o_c, b_grad, mask=m_c)


def adaptation_head(
    logits: Tensor, k: int, entropy_weight: float, balance_weight: float, softmax_sum: bool,
    eps: float, weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As adaptation_head.adaptation_head."""
    n, classes = logits.shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    mass, grad = empty((classes,)), empty((n, classes))
    total, entropy_loss, balance = (empty(()) for _ in range(3))
    s_weight = 0 if weight is None else weight.stride(0)
    entropy, rows, selection = run_samples(logits, k, eps)
    launch.run(
        _columns_kernel, plan.long_columns(classes), logits, weight, rows, mass,
        *logits.stride(), s_weight, n, classes,
    )  # fmt: skip
    gradient = plan.long_gradient(n, classes, k, KEY_BITS[logits.dtype], softmax_sum)
    launch.run(
        _gradient_kernel, gradient, logits, weight, entropy, rows, selection, mass, total,
        entropy_loss, balance, grad, *logits.stride(), s_weight, n, classes, eps, entropy_weight,
        balance_weight,
    )  # fmt: skip
    return total, entropy_loss, balance, grad

"""Principal entropy and balance of softmax predictions, value and gradient together; C <= 4096.

    entropy = sum_i share_i sum over the k largest p_ic of -p_ic ln(p_ic + eps)
    balance = -sum_c m_c ln m_c,  m = mean of p over samples, or softmax of their sum
    total   = entropy_weight entropy - balance_weight balance
    d entropy / dz_i = share_i p (g - <p, g>),  g = -ln(p + eps) - p / (p + eps) on the selected
    d balance / dz_i = p (h - <p, h>),  h = -ln(m) / n, or m (-ln(m) - balance)

Two launches: rows, which hold what a sample needs of itself, then what needs all samples. Sums over
samples are taken in order, so results do not depend on scheduling. The plain entropy is k = C,
eps = 0.

Source: ABPEM (principal entropy), READ (balance). Of equal logits the lowest index is selected.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adaptation_head_large as large
from . import launch, plan
from .class_selection import order_keys, principal_terms, smallest_selected, surprise

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


@triton.jit(do_not_specialize=["n", "PARTS"])
def _batch_kernel(
    p_z, p_weight, p_entropy, p_rows, p_mass, p_total, p_mean_entropy, p_balance, p_grad,
    s_n, s_c, s_weight, n, C, PARTS, entropy_weight, balance_weight,
    SOFTMAX_SUM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Balance and its gradient, added to the entropy's; their total, entropy and balance."""
    i_p = tl.program_id(0).to(tl.int64)
    o_r, o_c, o_n = tl.arange(0, BR), tl.arange(0, BC), tl.arange(0, BN)
    m_c = o_c < C
    b_mass = tl.zeros([BC], tl.float32)
    for o in range(0, PARTS, BR):
        m_p = (o + o_r < PARTS)[:, None] & m_c[None, :]
        p_part = p_mass + (o + o_r)[:, None] * C + o_c[None, :]
        b_mass += tl.sum(tl.load(p_part, mask=m_p, other=0.0), axis=0)
    weight_sum, entropy = 0.0, 0.0
    for o in range(0, n, BN):
        m_n = o + o_n < n
        b_entropy = tl.load(p_entropy + o + o_n, mask=m_n, other=0.0)
        if p_weight is not None:
            w = tl.load(p_weight + (o + o_n) * s_weight, mask=m_n, other=0.0).to(tl.float32)
            b_entropy *= w
            weight_sum += tl.sum(w, axis=0)
        entropy += tl.sum(b_entropy, axis=0)
    if p_weight is None:
        weight_sum += n
    entropy /= weight_sum
    if SOFTMAX_SUM:
        b_mass = tl.where(m_c, b_mass, -float("inf"))
        b_mass = tl.exp(b_mass - tl.max(b_mass, axis=0))
        b_mass /= tl.sum(b_mass, axis=0)
    else:
        b_mass /= weight_sum
    b_h = surprise(b_mass, 0.0)
    balance = tl.sum(b_mass * b_h, axis=0)
    b_h = b_mass * (b_h - balance) if SOFTMAX_SUM else b_h / weight_sum
    if i_p == 0:
        tl.store(p_total, entropy_weight * entropy - balance_weight * balance)
        tl.store(p_mean_entropy, entropy)
        tl.store(p_balance, balance)
    i = i_p * BR + o_r
    m_r = i < n
    m_z = m_r[:, None] & m_c[None, :]
    z = tl.load(p_z + i[:, None] * s_n + o_c[None, :] * s_c, mask=m_z, other=0.0).to(tl.float32)
    z_max = tl.load(p_rows + i, mask=m_r, other=0.0)
    e_sum = tl.load(p_rows + n + i, mask=m_r, other=1.0)
    p = tl.where(m_z, tl.exp(z - z_max[:, None]) / e_sum[:, None], 0.0)
    along = tl.sum(p * b_h[None, :], axis=1)
    of_balance = balance_weight * p * (b_h[None, :] - along[:, None])
    p_out = p_grad + i[:, None] * C + o_c[None, :]
    of_entropy = entropy_weight * tl.load(p_out, mask=m_z, other=0.0) / weight_sum
    grad = of_entropy - of_balance
    if p_weight is not None:
        grad *= tl.load(p_weight + i * s_weight, mask=m_r, other=0.0).to(tl.float32)[:, None]
    tl.store(p_out, grad, mask=m_z)


def _run_rows(
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
    _run_rows(logits, k, eps, entropy=entropy)
    return entropy


def principal_entropy_backward(upstream: Tensor, logits: Tensor, k: int, eps: float) -> Tensor:
    """upstream [n], gradient [n, C] in the type of the logits."""
    if logits.shape[1] > plan.ROW_CLASSES:
        return large.principal_entropy_backward(upstream, logits, k, eps)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run_rows(logits, k, eps, upstream=upstream, grad=grad)
    return grad


def entropy(logits: Tensor) -> Tensor:
    """[n, C] -> [n]"""
    return principal_entropy(logits, logits.shape[1], 0.0)


def entropy_backward(upstream: Tensor, logits: Tensor) -> Tensor:
    """upstream [n], gradient [n, C] in the type of the logits."""
    return principal_entropy_backward(upstream, logits, logits.shape[1], 0.0)


def adaptation_head(
    logits: Tensor, k: int, entropy_weight: float, balance_weight: float, softmax_sum: bool,
    eps: float, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, entropy, balance, and the total's gradient [n, C] in float32, of logits [n, C]."""
    n, classes = logits.shape
    if classes > plan.ROW_CLASSES:
        weights = entropy_weight, balance_weight
        return large.adaptation_head(logits, k, *weights, softmax_sum, eps, weight)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    samples = plan.cdiv(n, plan.HEAD_PARTS)
    parts = plan.cdiv(n, samples)
    entropy, rows = empty(n), empty((2, n))
    mass, grad = empty((parts, classes)), empty((n, classes))
    total, entropy_loss, balance = (empty(()) for _ in range(3))
    _run_rows(
        logits, k, eps, weight=weight, entropy=entropy, grad=grad, rows=rows, mass=mass,
        samples=samples,
    )  # fmt: skip
    launch.run(
        _batch_kernel, plan.head_batch(n, classes, softmax_sum), logits, weight, entropy, rows,
        mass, total, entropy_loss, balance, grad, *logits.stride(),
        0 if weight is None else weight.stride(0), n, classes, parts, entropy_weight,
        balance_weight,
    )  # fmt: skip
    return total, entropy_loss, balance, grad


def balance_entropy(
    logits: Tensor, softmax_sum: bool, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Balance and its gradient [n, C] in float32: the total of weights (0, -1)."""
    classes = logits.shape[1]
    _, _, balance, grad = adaptation_head(logits, classes, 0.0, -1.0, softmax_sum, 0.0, weight)
    return balance, grad

"""Principal entropy and balance of softmax predictions, value and gradient together; C <= 4096.

    entropy = sum_i share_i sum over the k largest p_ic of -p_ic ln(p_ic + eps)
    balance = -sum_c m_c ln m_c,  m = mean of p over samples, or softmax of their sum
    total   = entropy_weight entropy - balance_weight balance
    d entropy / dz_i = share_i p (g - <p, g>),  g = -ln(p + eps) - p / (p + eps) on the selected
    d balance / dz_i = p (h - <p, h>),  h = -ln(m) / n, or m (-ln(m) - balance)

Two launches: rows (entropies.py), which hold what a sample needs of itself, then what needs all
samples. Sums over samples are taken in order, so results do not depend on scheduling.

Source: ABPEM (principal entropy), READ (balance). Of equal logits the lowest index is selected.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adaptation_head_large as large
from . import adaptation_head_plan as plan
from . import entropies_plan, launch
from .class_selection import surprise
from .entropies import mean_entropy, run_rows
from .launch_plan import cdiv


@triton.jit(do_not_specialize=["n", "PARTS"])
def _balance_kernel(
    p_z, p_weight, p_entropy, p_rows, p_mass, p_total, p_mean_entropy, p_balance, p_grad,
    s_n, s_c, s_weight, n, C, PARTS, entropy_weight, balance_weight,
    SOFTMAX_SUM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Balance and its gradient, added to the entropy's; their total, entropy and balance."""
    i_p = tl.program_id(0).to(tl.int64)
    o_r, o_c = tl.arange(0, BR), tl.arange(0, BC)
    m_c = o_c < C
    b_mass = tl.zeros([BC], tl.float32)
    for o in range(0, PARTS, BR):
        m_p = (o + o_r < PARTS)[:, None] & m_c[None, :]
        p_part = p_mass + (o + o_r)[:, None] * C + o_c[None, :]
        b_mass += tl.sum(tl.load(p_part, mask=m_p, other=0.0), axis=0)
    entropy, weight_sum = mean_entropy(p_entropy, p_weight, s_weight, n, BN)
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
    i_r = i_p * BR + o_r
    m_r = i_r < n
    m_z = m_r[:, None] & m_c[None, :]
    b_z = tl.load(p_z + i_r[:, None] * s_n + o_c[None, :] * s_c, mask=m_z, other=0.0)
    b_z_max = tl.load(p_rows + i_r, mask=m_r, other=0.0)
    b_e_sum = tl.load(p_rows + n + i_r, mask=m_r, other=1.0)
    b_p = tl.exp(b_z.to(tl.float32) - b_z_max[:, None]) / b_e_sum[:, None]
    b_p = tl.where(m_z, b_p, 0.0)
    b_along = tl.sum(b_p * b_h[None, :], axis=1)
    b_of_balance = balance_weight * b_p * (b_h[None, :] - b_along[:, None])
    p_out = p_grad + i_r[:, None] * C + o_c[None, :]
    b_of_entropy = entropy_weight * tl.load(p_out, mask=m_z, other=0.0) / weight_sum
    b_grad = b_of_entropy - b_of_balance
    if p_weight is not None:
        b_w = tl.load(p_weight + i_r * s_weight, mask=m_r, other=0.0).to(tl.float32)
        b_grad *= b_w[:, None]
    tl.store(p_out, b_grad, mask=m_z)


def adaptation_head(
    logits: Tensor, k: int, entropy_weight: float, balance_weight: float, softmax_sum: bool,
    eps: float, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, entropy, balance, and the total's gradient [n, C] in float32, of logits [n, C]."""
    n, classes = logits.shape
    if classes > entropies_plan.ROW_CLASSES:
        weights = entropy_weight, balance_weight
        return large.adaptation_head(logits, k, *weights, softmax_sum, eps, weight)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    samples = plan.samples_per_program(n)
    parts = cdiv(n, samples)
    entropy, rows = empty(n), empty((2, n))
    mass, grad = empty((parts, classes)), empty((n, classes))
    total, entropy_loss, balance = (empty(()) for _ in range(3))
    run_rows(
        logits, k, eps, weight=weight, entropy=entropy, grad=grad, rows=rows, mass=mass,
        samples=samples,
    )  # fmt: skip
    launch.run(
        _balance_kernel, plan.balance(n, classes, softmax_sum), logits, weight, entropy, rows,
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

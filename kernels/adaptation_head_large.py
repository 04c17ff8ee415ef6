"""The adaptation head for rows too long for registers: swept in chunks, which stay in the L2 cache.

Formulas are adaptation_head's. Three launches: samples (maximum, sum, selection, entropy), columns
(predictions summed over samples), gradient.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, plan
from .class_selection import order_keys, principal_terms, surprise


@triton.jit
def _merged_softmax(z_max, e_sum, z, m_z):
    """Maximum and sum of exponentials, of what they stand for and z's chunk."""
    new = tl.maximum(z_max, tl.max(tl.where(m_z, z, -float("inf")), axis=0))
    shift = tl.where(new == -float("inf"), 0.0, new)  # -inf - -inf is nan
    e = tl.where(m_z, tl.exp(z - shift), 0.0)
    return new, e_sum * tl.exp(z_max - shift), e, shift


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
        z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=-float("inf")).to(tl.float32)
        z_max, e_sum, e, _ = _merged_softmax(z_max, e_sum, z, m_c)
        e_sum += tl.sum(e, axis=0)
    t, left = tl.full([1], 0, tl.uint32), tl.full([1], 0, tl.int32)
    if SELECT:
        # two bits of the k-th largest key a sweep; three counts of up to 1023 chunks in a lane
        unit = tl.full([1], 1 << (BITS - 2), tl.uint32)
        for _ in range(BITS // 2):
            counts = tl.zeros([BC], tl.int32)
            for o in range(0, C, BC):
                m_c = o + o_c < C
                z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
                key = order_keys(z, BITS)
                count = (key >= t + unit).to(tl.int32)
                count += (key >= t + unit * 2).to(tl.int32) << 10
                count += (key >= t + unit * 3).to(tl.int32) << 20
                counts += tl.where(m_c, count, 0)
            steps = (tl.sum(counts & 1023, axis=0) >= k).to(tl.uint32)
            steps += (tl.sum((counts >> 10) & 1023, axis=0) >= k).to(tl.uint32)
            steps += (tl.sum(counts >> 20, axis=0) >= k).to(tl.uint32)
            t += steps * unit
            unit = unit >> 2
        counts = tl.zeros([BC], tl.int32)
        for o in range(0, C, BC):
            m_c = o + o_c < C
            z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
            counts += tl.where(m_c, (order_keys(z, BITS) > t).to(tl.int32), 0)
        left = k - tl.sum(counts, axis=0) + left
    last = tl.full([1], -1, tl.int32)
    b_terms, b_slopes = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for o in range(0, C, BC):
        m_c = o + o_c < C
        z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=-float("inf")).to(tl.float32)
        selected = m_c
        if SELECT:
            key = order_keys(z, BITS)
            tied = (key == t) & m_c
            chosen = tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= left)
            left -= tl.sum(tied.to(tl.int32), axis=0)
            last = tl.maximum(last, tl.max(tl.where(chosen, o + o_c, -1), axis=0))
            selected = ((key > t) & m_c) | chosen
        terms, slopes = principal_terms(tl.exp(z - z_max) / e_sum, selected, eps)
        b_terms += tl.where(m_c, terms, 0.0)
        b_slopes += tl.where(m_c, slopes, 0.0)
    o_1 = tl.arange(0, 1)
    tl.store(p_entropy + i, tl.sum(b_terms, axis=0))
    tl.store(p_rows + i * 3 + o_1, z_max)
    tl.store(p_rows + i * 3 + 1 + o_1, e_sum)
    tl.store(p_rows + i * 3 + 2, tl.sum(b_slopes, axis=0))
    tl.store(p_selection + i * 2 + o_1, t.to(tl.int32, bitcast=True))
    tl.store(p_selection + i * 2 + 1 + o_1, last)


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
        z = tl.load(p_z + i[:, None] * s_n + o_c[None, :] * s_c, mask=m_z, other=0.0)
        z_max = tl.load(p_rows + i * 3, mask=m_r, other=0.0)
        w = 1.0 / tl.load(p_rows + i * 3 + 1, mask=m_r, other=1.0)
        if p_weight is not None:
            w *= tl.load(p_weight + i * s_weight, mask=m_r, other=0.0).to(tl.float32)
        e = tl.exp(z.to(tl.float32) - z_max[:, None]) * w[:, None]
        b_mass += tl.sum(tl.where(m_z, e, 0.0), axis=0)
    tl.store(p_mass + o_c, b_mass, mask=m_c)


@triton.jit(do_not_specialize=["n"])
def _gradient_kernel(
    p_z, p_weight, p_upstream, p_entropy, p_rows, p_selection, p_mass, p_total, p_mean_entropy,
    p_balance, p_grad,
    s_n, s_c, s_weight, s_upstream, sg_n, sg_c, n, C, eps, entropy_weight, balance_weight,
    SELECT: tl.constexpr, BITS: tl.constexpr, SOFTMAX_SUM: tl.constexpr, BC: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One sample's gradient; with mass that of the total, whose losses [3] it also stores, else
    that of the principal entropy times upstream."""
    i = tl.program_id(0).to(tl.int64)
    o_c, o_n = tl.arange(0, BC), tl.arange(0, BN)
    p_z += i * s_n
    z_max, e_sum = tl.load(p_rows + i * 3), tl.load(p_rows + i * 3 + 1)
    slope = tl.load(p_rows + i * 3 + 2)
    of_entropy, of_balance, along, scale = 1.0, 0.0, 0.0, 1.0
    mass_max, mass_sum, balance = 0.0, 1.0, 0.0
    if p_mass is not None:
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
        else:
            scale = tl.load(p_weight + i * s_weight).to(tl.float32)
        entropy /= weight_sum
        mass_sum = weight_sum
        if SOFTMAX_SUM:
            b_max = tl.full([BC], -float("inf"), tl.float32)
            for o in range(0, C, BC):
                b_max = tl.maximum(
                    b_max, tl.load(p_mass + o + o_c, mask=o + o_c < C, other=-float("inf"))
                )
            mass_max = tl.max(b_max, axis=0)
            b_sum = tl.zeros([BC], tl.float32)
            for o in range(0, C, BC):
                mass = tl.load(p_mass + o + o_c, mask=o + o_c < C, other=-float("inf"))
                b_sum += tl.exp(mass - mass_max)
            mass_sum = tl.sum(b_sum, axis=0)
        b_balance, b_along = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        b_along_mass = tl.zeros([BC], tl.float32)
        for o in range(0, C, BC):
            m_c = o + o_c < C
            mass = tl.load(p_mass + o + o_c, mask=m_c, other=0.0)
            if SOFTMAX_SUM:
                mass = tl.exp(mass - mass_max)
            mass = tl.where(m_c, mass / mass_sum, 0.0)
            h = surprise(mass, 0.0)
            z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
            p = tl.where(m_c, tl.exp(z - z_max) / e_sum, 0.0)
            b_balance += mass * h
            b_along += p * (mass * h if SOFTMAX_SUM else h)
            b_along_mass += p * mass
        balance = tl.sum(b_balance, axis=0)
        along = tl.sum(b_along, axis=0)
        if SOFTMAX_SUM:  # <p, m (h - balance)>
            along -= balance * tl.sum(b_along_mass, axis=0)
        else:
            along /= weight_sum
        of_entropy, of_balance = entropy_weight / weight_sum, balance_weight
        if i == 0:
            tl.store(p_total, entropy_weight * entropy - balance_weight * balance)
            tl.store(p_mean_entropy, entropy)
            tl.store(p_balance, balance)
    else:
        scale = tl.load(p_upstream + i * s_upstream).to(tl.float32)
    t = tl.load(p_selection + i * 2).to(tl.uint32, bitcast=True)
    last = tl.load(p_selection + i * 2 + 1)
    for o in range(0, C, BC):
        m_c = o + o_c < C
        z = tl.load(p_z + (o + o_c) * s_c, mask=m_c, other=0.0).to(tl.float32)
        p = tl.exp(z - z_max) / e_sum
        selected = m_c
        if SELECT:
            key = order_keys(z, BITS)
            selected = (key > t) | ((key == t) & (o + o_c <= last))
        _, slopes = principal_terms(p, selected, eps)
        grad = of_entropy * (slopes - p * slope)
        if p_mass is not None:
            mass = tl.load(p_mass + o + o_c, mask=m_c, other=0.0)
            if SOFTMAX_SUM:
                mass = tl.exp(mass - mass_max)
            mass /= mass_sum
            h = surprise(mass, 0.0)
            h = mass * (h - balance) if SOFTMAX_SUM else h / mass_sum
            grad -= of_balance * p * (h - along)
        p_out = p_grad + i * sg_n + (o + o_c) * sg_c
        tl.store(p_out, (scale * grad).to(p_grad.dtype.element_ty), mask=m_c)


_KEY_BITS = {torch.bfloat16: 16, torch.float16: 20}


def _samples(logits: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    n, classes = logits.shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    entropy, rows = empty(n), empty((n, 3))
    selection = torch.empty((n, 2), dtype=torch.int32, device=logits.device)
    if n:
        samples = plan.large_samples(n, classes, k, _KEY_BITS.get(logits.dtype, 32))
        launch.run(
            _samples_kernel, samples, logits, entropy, rows, selection, *logits.stride(), n,
            classes, k, eps,
        )  # fmt: skip
    return entropy, rows, selection


def principal_entropy(logits: Tensor, k: int, eps: float) -> Tensor:
    return _samples(logits, k, eps)[0]


def principal_entropy_backward(upstream: Tensor, logits: Tensor, k: int, eps: float) -> Tensor:
    n, classes = logits.shape
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if n:
        _, rows, selection = _samples(logits, k, eps)
        gradient = plan.large_gradient(n, classes, k, _KEY_BITS.get(logits.dtype, 32), False)
        launch.run(
            _gradient_kernel, gradient, logits, None, upstream, None, rows, selection, None,
            None, None, None, grad, *logits.stride(), 0, upstream.stride(0), *grad.stride(),
            n, classes, eps, 1.0, 0.0,
        )  # fmt: skip
    return grad


def adaptation_head(
    logits: Tensor, k: int, entropy_weight: float, balance_weight: float, softmax_sum: bool,
    eps: float, weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, classes = logits.shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    mass, grad = empty((classes,)), empty((n, classes))
    total, entropy_loss, balance = (empty(()) for _ in range(3))
    s_weight = 0 if weight is None else weight.stride(0)
    entropy, rows, selection = _samples(logits, k, eps)
    launch.run(
        _columns_kernel, plan.large_columns(classes), logits, weight, rows, mass,
        *logits.stride(), s_weight, n, classes,
    )  # fmt: skip
    gradient = plan.large_gradient(n, classes, k, _KEY_BITS.get(logits.dtype, 32), softmax_sum)
    launch.run(
        _gradient_kernel, gradient, logits, weight, None, entropy, rows, selection, mass,
        total, entropy_loss, balance, grad, *logits.stride(), s_weight, 0, *grad.stride(), n,
        classes, eps, entropy_weight, balance_weight,
    )  # fmt: skip
    return total, entropy_loss, balance, grad

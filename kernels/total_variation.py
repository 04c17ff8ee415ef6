"""Total variation of maps, its gradient, and the ensemble of predictions that it weighs.

    tv_n = sum |x[i + 1, j] - x[i, j]| + |x[i, j + 1] - x[i, j]|                     (anisotropic)
    d tv / dx = sum over the 2 to 4 neighbours of sign(x - neighbour), sign(0) = 0
    w = softmax(-tv / temperature),  probability = sum_n w_n softmax(logits_n)

Source: A-TPT, reliability-weighted ensemble of views.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from . import total_variation_plan as plan
from .launch_plan import integer


@triton.jit
def _variation(p_x, o_h, o_w, H, W, s_h, s_w):
    """Differences of each pixel to the ones below and on the right, added.

    o_h, o_w: row and column of each pixel, to be broadcast.
    """
    m_inside = (o_h < H) & (o_w < W)
    m_below, m_right = m_inside & (o_h + 1 < H), m_inside & (o_w + 1 < W)
    p_x += o_h * s_h + o_w * s_w
    b_x = tl.load(p_x, mask=m_inside, other=0.0).to(tl.float32)
    b_x_below = tl.load(p_x + s_h, mask=m_below, other=0.0).to(tl.float32)
    b_x_right = tl.load(p_x + s_w, mask=m_right, other=0.0).to(tl.float32)
    b_down = tl.where(m_below, tl.abs(b_x_below - b_x), 0.0)
    return b_down + tl.where(m_right, tl.abs(b_x_right - b_x), 0.0)


@triton.jit(do_not_specialize=["N", "C"])
def _strips_kernel(
    p_x, p_z, p_tv, p_rows, s_n, s_h, s_w, sz_n, sz_c, N, H, W, C,
    STRIPS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A strip's part of tv, to [N, STRIPS].

    A program beyond the strips takes the map's logits: maximum and sum of their softmax, to
    rows [2, N].
    """
    i_s, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if i_s < STRIPS:
        o_h = (i_s * BH + tl.arange(0, BH))[:, None]
        b_tv = tl.zeros([BH, BW], tl.float32)
        for o in range(0, W, BW):
            o_w = (o + tl.arange(0, BW))[None, :]
            b_tv += _variation(p_x + i_n * s_n, o_h, o_w, H, W, s_h, s_w)
        tl.store(p_tv + i_n * STRIPS + i_s, tl.sum(tl.sum(b_tv, axis=1), axis=0))
    elif p_z is not None:
        o_c = tl.arange(0, BC)
        p_z += i_n * sz_n
        b_max = tl.full([BC], -float("inf"), tl.float32)
        for o in range(0, C, BC):
            p_c = p_z + (o + o_c) * sz_c
            b_z = tl.load(p_c, mask=o + o_c < C, other=-float("inf")).to(tl.float32)
            b_max = tl.maximum(b_max, b_z)
        z_max = tl.max(b_max, axis=0)
        b_sum = tl.zeros([BC], tl.float32)
        for o in range(0, C, BC):
            p_c = p_z + (o + o_c) * sz_c
            b_z = tl.load(p_c, mask=o + o_c < C, other=-float("inf")).to(tl.float32)
            b_sum += tl.where(o + o_c < C, tl.exp(b_z - z_max), 0.0)
        tl.store(p_rows + i_n, z_max)
        tl.store(p_rows + N + i_n, tl.sum(b_sum, axis=0))


@triton.jit
def _strip_sums(p_tv, o_n, m_n, STRIPS: tl.constexpr, BS: tl.constexpr):
    """tv of maps o_n, from their strips."""
    o_s = tl.arange(0, BS)
    m_s = m_n[:, None] & (o_s < STRIPS)[None, :]
    return tl.sum(tl.load(p_tv + o_n[:, None] * STRIPS + o_s[None, :], mask=m_s, other=0.0), axis=1)


@triton.jit(do_not_specialize=["N", "C"])
def _ensemble_kernel(
    p_strips, p_z, p_rows, p_probability, p_tv, p_weights, sz_n, sz_c, N, C, temperature,
    STRIPS: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BC classes of the ensemble. Every program sums the strips; the first stores tv, weights."""
    i_p = tl.program_id(0)
    o_c, o_n = i_p * BC + tl.arange(0, BC), tl.arange(0, BN)
    m_c = o_c < C
    b_top = tl.full([BN], -float("inf"), tl.float32)
    for o in range(0, N, BN):
        m_n = o + o_n < N
        b_tv = _strip_sums(p_strips, o + o_n, m_n, STRIPS, BS)
        b_top = tl.maximum(b_top, tl.where(m_n, -b_tv / temperature, -float("inf")))
    top = tl.max(b_top, axis=0)
    b_total = tl.zeros([BN], tl.float32)
    for o in range(0, N, BN):
        m_n = o + o_n < N
        b_tv = _strip_sums(p_strips, o + o_n, m_n, STRIPS, BS)
        b_total += tl.where(m_n, tl.exp(-b_tv / temperature - top), 0.0)
    total = tl.sum(b_total, axis=0)
    b_probability = tl.zeros([BC], tl.float32)
    for o in range(0, N, BN):
        m_n = o + o_n < N
        b_tv = _strip_sums(p_strips, o + o_n, m_n, STRIPS, BS)
        b_w = tl.exp(-b_tv / temperature - top) / total
        if i_p == 0:
            tl.store(p_tv + o + o_n, b_tv, mask=m_n)
            tl.store(p_weights + o + o_n, b_w, mask=m_n)
        b_z_max = tl.load(p_rows + o + o_n, mask=m_n, other=0.0)
        b_share = b_w / tl.load(p_rows + N + o + o_n, mask=m_n, other=1.0)
        m_z = m_n[:, None] & m_c[None, :]
        i_n = (o + o_n).to(tl.int64)
        b_z = tl.load(p_z + i_n[:, None] * sz_n + o_c[None, :] * sz_c, mask=m_z, other=0.0)
        b_p = tl.exp(b_z.to(tl.float32) - b_z_max[:, None]) * b_share[:, None]
        b_probability += tl.sum(tl.where(m_z, b_p, 0.0), axis=0)
    tl.store(p_probability + o_c, b_probability, mask=m_c)


@triton.jit(do_not_specialize=["N", "C"])
def _small_kernel(
    p_x, p_z, p_probability, p_tv, p_weights, s_n, s_h, s_w, sz_n, sz_c, N, H, W, C, temperature,
    BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """All maps in one program, side by side, BP pixels or classes at a time."""
    o_n, o_p = tl.arange(0, BN), tl.arange(0, BP)
    m_n, i_n = o_n < N, o_n.to(tl.int64)
    b_tv = tl.zeros([BN], tl.float32)
    for o in range(0, H * W, BP):
        o_h = tl.where(m_n[:, None], (o + o_p)[None, :] // W, H)
        o_w = (o + o_p)[None, :] % W
        b_tv += tl.sum(_variation(p_x + i_n[:, None] * s_n, o_h, o_w, H, W, s_h, s_w), axis=1)
    b_x = tl.where(m_n, -b_tv / temperature, -float("inf"))
    b_e = tl.exp(b_x - tl.max(b_x, axis=0))
    b_w = b_e / tl.sum(b_e, axis=0)
    tl.store(p_tv + o_n, b_tv, mask=m_n)
    tl.store(p_weights + o_n, b_w, mask=m_n)
    p_z += i_n[:, None] * sz_n
    b_z_max = tl.full([BN], -float("inf"), tl.float32)
    for o in range(0, C, BP):
        m_z = m_n[:, None] & (o + o_p < C)[None, :]
        b_z = tl.load(p_z + (o + o_p)[None, :] * sz_c, mask=m_z, other=-float("inf"))
        b_z_max = tl.maximum(b_z_max, tl.max(b_z.to(tl.float32), axis=1))
    b_e_sum = tl.zeros([BN], tl.float32)
    for o in range(0, C, BP):
        m_z = m_n[:, None] & (o + o_p < C)[None, :]
        b_z = tl.load(p_z + (o + o_p)[None, :] * sz_c, mask=m_z, other=0.0).to(tl.float32)
        b_e_sum += tl.sum(tl.where(m_z, tl.exp(b_z - b_z_max[:, None]), 0.0), axis=1)
    b_share = b_w / b_e_sum
    for o in range(0, C, BP):
        m_c = o + o_p < C
        m_z = m_n[:, None] & m_c[None, :]
        b_z = tl.load(p_z + (o + o_p)[None, :] * sz_c, mask=m_z, other=0.0).to(tl.float32)
        b_p = tl.where(m_z, tl.exp(b_z - b_z_max[:, None]) * b_share[:, None], 0.0)
        tl.store(p_probability + o + o_p, tl.sum(b_p, axis=0), mask=m_c)


@triton.jit
def _sign_from(p_neighbour, m_neighbour, b_x):
    """Sign of x - neighbour: 0 at ties and where there is no neighbour."""
    b_step = b_x - tl.load(p_neighbour, mask=m_neighbour, other=0.0).to(tl.float32)
    b_sign = (b_step > 0).to(tl.float32) - (b_step < 0).to(tl.float32)
    return tl.where(m_neighbour, b_sign, 0.0)


@triton.jit
def _gradient_kernel(
    p_up, p_x, p_dx, s_up, s_n, s_h, s_w, sd_n, sd_h, H, W, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A strip of the gradient, times the map's upstream."""
    i_n = tl.program_id(1).to(tl.int64)
    upstream = tl.load(p_up + i_n * s_up).to(tl.float32)
    o_h = (tl.program_id(0) * BH + tl.arange(0, BH))[:, None]
    p_dx += i_n * sd_n
    for o in range(0, W, BW):
        o_w = (o + tl.arange(0, BW))[None, :]
        m_inside = (o_h < H) & (o_w < W)
        p_here = p_x + i_n * s_n + o_h * s_h + o_w * s_w
        b_x = tl.load(p_here, mask=m_inside, other=0.0).to(tl.float32)
        b_dx = tl.zeros([BH, BW], tl.float32)
        b_dx += _sign_from(p_here - s_h, m_inside & (o_h > 0), b_x)
        b_dx += _sign_from(p_here + s_h, m_inside & (o_h + 1 < H), b_x)
        b_dx += _sign_from(p_here - s_w, m_inside & (o_w > 0), b_x)
        b_dx += _sign_from(p_here + s_w, m_inside & (o_w + 1 < W), b_x)
        b_dx = (upstream * b_dx).to(p_dx.dtype.element_ty)
        tl.store(p_dx + o_h * sd_h + o_w, b_dx, mask=m_inside)


def total_variation(maps: Tensor) -> Tensor:
    """Total variation [N], in float32, of maps [N, H, W] of any strides."""
    n, height, width = maps.shape
    if not maps.numel():
        return torch.zeros(n, dtype=torch.float32, device=maps.device)
    strips = plan.strips(n, height, width)
    parts = torch.empty((n, strips.grid[0]), dtype=torch.float32, device=maps.device)
    launch.run(
        _strips_kernel, strips, maps, None, parts, None, *maps.stride(), 0, 0, n, height, width, 0
    )
    return parts.sum(dim=1) if strips.grid[0] > 1 else parts[:, 0]


def total_variation_backward(upstream: Tensor, maps: Tensor) -> Tensor:
    """Gradient [N, H, W], in the type of the maps, from upstream [N]."""
    grad = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    if grad.numel():
        n, height, width = maps.shape
        launch.run(
            _gradient_kernel, plan.gradient(n, height, width), upstream, maps, grad,
            upstream.stride(0), *maps.stride(), *grad.stride()[:2], height, width,
        )  # fmt: skip
    return grad


def reliability_ensemble(
    maps: Tensor, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Ensemble of views by their maps [N, H, W], of logits [N, C]; both of any strides.

    Returns:
        Probability [C], total variation [N] and weights [N], in float32.
    """
    n, height, width = maps.shape
    classes = logits.shape[1]
    empty = functools.partial(torch.empty, dtype=torch.float32, device=maps.device)
    probability, tv, weights = (empty(x) for x in (classes, n, n))
    if small := plan.small_ensemble(n, height, width, classes):
        launch.run(
            _small_kernel, small, maps, logits, probability, tv, weights, *maps.stride(),
            *logits.stride(), n, height, width, classes, temperature,
        )  # fmt: skip
        return probability, tv, weights
    strips = plan.strips(n, height, width, logits=True)
    count = integer(strips.constants, "STRIPS")
    parts, rows = empty((n, count)), empty((2, n))
    launch.run(
        _strips_kernel, strips, maps, logits, parts, rows, *maps.stride(), *logits.stride(), n,
        height, width, classes,
    )  # fmt: skip
    launch.run(
        _ensemble_kernel, plan.ensemble(count, classes), parts, logits, rows, probability, tv,
        weights, *logits.stride(), n, classes, temperature,
    )  # fmt: skip
    return probability, tv, weights

"""GELU and QuickGELU, and their gradients: each value is read once and written once.

    gelu(x) = x Φ(x),  gelu'(x) = Φ(x) + x φ(x),  Φ(x) = (1 + erf(x / √2)) / 2
    quick_gelu(x) = x s,  quick_gelu'(x) = s + 1.702 x s (1 - s),  s = sigmoid(1.702 x)

Sources: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; OpenAI's CLIP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gelu_plan as plan
from . import launch


@triton.jit
def _distribution(b_x, QUICK: tl.constexpr):
    """Φ(x), or the sigmoid in its place."""
    if QUICK:
        return 1.0 / (1.0 + tl.exp(-1.702 * b_x))
    return 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476))


@triton.jit(do_not_specialize=["n"])
def _activation_kernel(p_x, p_bias, p_up, p_y, n, C, QUICK: tl.constexpr, BN: tl.constexpr):
    """BN values of the activation, or of its gradient where p_up is not None."""
    o_first = tl.program_id(0).to(tl.int64) * BN
    o_n = tl.arange(0, BN)
    m_n = o_n < n - o_first
    b_x = tl.load(p_x + o_first + o_n, mask=m_n, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_x += tl.load(p_bias + (o_first + o_n) % C, mask=m_n, other=0.0).to(tl.float32)
    b_cdf = _distribution(b_x, QUICK)
    if p_up is None:
        b_y = b_x * b_cdf
    else:
        if QUICK:
            b_y = b_cdf + 1.702 * b_x * b_cdf * (1.0 - b_cdf)
        else:
            b_y = b_cdf + b_x * 0.3989422804014327 * tl.exp(-0.5 * b_x * b_x)
        b_y *= tl.load(p_up + o_first + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + o_first + o_n, b_y.to(p_y.dtype.element_ty), mask=m_n)


def _run(x: Tensor, bias: Tensor | None, upstream: Tensor | None, quick: bool) -> Tensor:
    """The activation of a tensor without gaps, or its gradient."""
    y = torch.empty_like(x)
    launch.run(
        _activation_kernel, plan.elements(x.numel(), quick), x, bias, upstream, y, x.numel(),
        1 if bias is None else len(bias),
    )  # fmt: skip
    return y


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Φ(x) of x [..., C] without gaps, plus bias [C] if it is given."""
    return _run(x, bias, None, quick=False)


def gelu_backward(upstream: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gradient on x, of its shape, from upstream of the same shape, without gaps."""
    return _run(x, bias, upstream, quick=False)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) of x of any shape without gaps."""
    return _run(x, None, None, quick=True)


def quick_gelu_backward(upstream: Tensor, x: Tensor) -> Tensor:
    """Gradient on x, of its shape, from upstream of the same shape, without gaps."""
    return _run(x, None, upstream, quick=True)

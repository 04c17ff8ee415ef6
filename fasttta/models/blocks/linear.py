"""Linear layers without gradients on a CPU: oneDNN's float32 products, fused with what follows.

PyTorch gives float32 products to MKL. oneDNN's are as fast on Intel processors and up to a fifth
faster on others, and fuse the erf GELU or the addition of a residual. They are operations that
torch.compile emits, no public ones, so they are tried out once and left alone where they fail.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 64  # below, calls cost more than products


@functools.cache
def _works() -> bool:
    """Whether the operations are there and give what they should."""
    x, w, b, y = (
        torch.linspace(-1, 2, n, dtype=torch.float32, device="cpu").view(shape)
        for n, shape in ((24, (2, 3, 4)), (20, (5, 4)), (5, (5,)), (30, (2, 3, 5)))
    )
    right = F.linear(x, w, b)
    try:
        found = (_product(x, w, b), _product(x, w, b, gelu=True), _product(x, w, b, add=y))
        expected = (right, F.gelu(right), y + right)
        return all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, expected, strict=True))
    except Exception:  # private: whatever a version of PyTorch has made of them
        return False


def _product(
    x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, add: Tensor | None = None
) -> Tensor:
    operation = torch.ops.mkldnn._linear_pointwise
    if add is not None:
        return operation.binary(x, add, weight, bias, "add")
    return operation(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


def suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``fused`` is made for a product: no gradient, float32 on a CPU, many rows."""
    return (
        not torch.is_grad_enabled()
        and bias is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and weight.is_contiguous()  # strided ones are a thousand times slower,
        and bias.is_contiguous()  # and here strides are ignored
        and x.numel() >= _ROWS * x.shape[-1]
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
        and _works()
    )


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, add: Tensor | None = None
) -> Tensor:
    """GELU of, or ``add`` plus, x [..., in] times weight [out, in] plus bias [out]."""
    return _product(x, weight, bias, gelu, add)

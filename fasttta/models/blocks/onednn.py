"""Products of linear layers by oneDNN on a CPU, called directly.

In float32 PyTorch's own products go to MKL. oneDNN is as fast on Intel processors and up to a fifth
faster on others. In bf16 they go to oneDNN, which arranges the weight anew in every call: a frozen
weight that is packed once is up to 1.13 times faster (EPYC, 512 to 1024 rows). oneDNN also computes
the erf GELU or the addition of a residual in the same pass. Its operations are those that
torch.compile emits. They are not public, so they are tried out once and not used where they fail.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: weight -> its version and its packed copy
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, add: Tensor | None = None
) -> Tensor:
    """x [..., in] times weight [out, in] plus bias [out], its erf GELU, or its sum with ``add``."""
    operation = torch.ops.mkldnn._linear_pointwise
    if add is not None:
        return operation.binary(x, add, weight, bias, "add")
    return operation(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """``onednn_linear`` of a weight that is packed at its first product, and again after a change.

    The packed weight takes as much memory as the weight, which stays, and lives as long.
    """
    version, packed = _PACKED.get(weight, (-1, weight))
    if version != weight._version:
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        _PACKED[weight] = weight._version, packed
    if not (torch.is_grad_enabled() and x.requires_grad):
        return onednn_linear(x, packed, bias, gelu)
    y = _Product.apply(x, weight, packed, bias)
    return F.gelu(y) if gelu else y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, packed, bias):
        ctx.save_for_backward(weight)
        return onednn_linear(x, packed, bias)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight, None, None, None


def _trial(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, b, y = (
        torch.linspace(-1, 2, n, dtype=torch.float32, device="cpu").view(shape).to(dtype)
        for n, shape in ((24, (2, 3, 4)), (20, (5, 4)), (5, (5,)), (30, (2, 3, 5)))
    )
    return x, w, b, y


@functools.cache
def works() -> bool:
    """Whether this PyTorch has the operations, and they compute what they should."""
    x, w, b, y = _trial(torch.float32)
    product = F.linear(x, w, b)
    expected = (product, F.gelu(product), y + product)
    try:
        results = (
            onednn_linear(x, w, b), onednn_linear(x, w, b, gelu=True), onednn_linear(x, w, b, add=y)
        )  # fmt: skip
        return all(torch.allclose(*pair, atol=1e-5) for pair in zip(results, expected, strict=True))
    except Exception:  # private operations: another version may have made anything of them
        return False


@functools.cache
def packing_works() -> bool:
    """The same, in bf16 and with a packed weight."""
    x, w, b, _ = _trial(torch.bfloat16)
    product = F.linear(x.float(), w.float(), b.float())
    try:
        with torch.inference_mode(False), torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(w)
            results = onednn_linear(x, packed, b), onednn_linear(x, packed, b, gelu=True)
        return all(
            y.dtype == torch.bfloat16 and torch.allclose(y.float(), right, rtol=0.02, atol=0.02)
            for y, right in zip(results, (product, F.gelu(product)), strict=True)
        )
    except Exception:  # as above
        return False

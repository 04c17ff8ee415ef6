"""Tensors of callers, made plain: dense values of the class ``torch.Tensor``, or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LAYOUTS = {
    "sparse_coo": "a sparse COO tensor",
    "sparse_csr": "a sparse CSR tensor",
    "sparse_csc": "a sparse CSC tensor",
    "sparse_bsr": "a sparse BSR tensor",
    "sparse_bsc": "a sparse BSC tensor",
    "_mkldnn": "an MKLDNN tensor",
    "jagged": "a nested tensor",
}
_PAD = "torch.nested.to_padded_tensor(x, 0), or give equal lengths"
# subclasses that hold plain values and only remember what they are of
_MARKED = ("torchvision.tv_tensors",)


def dense(name: str, x: Tensor) -> Tensor:
    """A tensor with its values, without a class of the caller's that states and results would keep.

    ``nn.Parameter``, torchvision's ``tv_tensors`` and subclasses that change no operation become
    ``torch.Tensor`` over the same memory.

    Raises:
        TypeError: it is sparse, nested, quantised, complex, of a subclass with operations of its
            own, fake or inside a transform of ``torch.func``; says which and what to call.
    """
    kind = type(x)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise _refusal(
            name, "inside torch.func (vmap, grad, ...)", "call it outside of the transform"
        )
    if x.layout != torch.strided or x.is_nested:
        layout = "jagged" if x.is_nested else str(x.layout).removeprefix("torch.")
        advice = _PAD if x.is_nested else ".to_dense()"
        raise _refusal(name, _LAYOUTS.get(layout, f"of layout {layout}"), f"call {advice}")
    if kind is not Tensor and kind is not nn.Parameter:
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            advice = "call .full_tensor()" if kind.__name__ == "DTensor" else "give its values"
            raise _refusal(name, f"a {kind.__name__} ({kind.__module__})", advice)
        own = _function_of(kind) is not _function_of(Tensor)
        if own and not kind.__module__.startswith(_MARKED):
            raise _refusal(
                name, f"a {kind.__name__} ({kind.__module__}), whose operations are its own",
                "call .as_subclass(torch.Tensor)",
            )  # fmt: skip
    if kind is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            x = x.as_subclass(Tensor)
    if torch._is_functional_tensor(x):
        raise _refusal(name, "inside torch.func.functionalize", "call it outside of the transform")
    if x.is_quantized:
        raise _refusal(name, f"a quantised tensor ({x.dtype})", "call .dequantize()")
    if x.is_complex():
        raise _refusal(name, f"complex ({x.dtype})", "give its real part, .real, or .abs()")
    return x.resolve_neg()


def _function_of(kind: type) -> Any:
    """The function behind a class' ``__torch_function__``, a class method."""
    method: Any = kind.__torch_function__  # type: ignore[attr-defined]
    return getattr(method, "__func__", method)


def _refusal(name: str, kind: str, advice: str) -> TypeError:
    return TypeError(f"{name} is {kind}; needed a dense torch.Tensor; {advice}")

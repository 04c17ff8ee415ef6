"""Which implementation a call runs: the dispatcher's choice, or the one that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, native, reference, triton
from .score_moments import no_cpp

BACKENDS = ("reference", "triton", "cpp")

# what has no kernel of its own by design, and what serves in its place
_PRODUCTS = "its work is matrix products, for which PyTorch's own kernels serve on a CPU"
_ELEMENTWISE = {
    name: "PyTorch's own elementwise kernels serve on every device"
    for name in ("gaussian_kl", "reliability_weights")
}
# what has a C++ kernel for moments of each head, their fifth argument, alone
_PER_HEAD = ("score_moments", "attention_bootstrap")


def has_kernel(name: str, key: str) -> bool:
    """Whether the dispatcher has a kernel of an operation for "CPU" or "CUDA" alone."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttta::{name}", key)


def _no_cpp(name: str, args: Sequence) -> str | None:
    outcome = native.attempt()
    if name in _PER_HEAD and len(args) > 4 and args[4]:
        missing = f"the C++ kernels are not there: {outcome.reason}"
        return no_cpp(*args[:2]) if outcome.path else missing
    if not has_kernel(name, "CPU"):
        if name not in native.NAMES:
            but = ' but for heads="each"' if name in _PER_HEAD else ""
            return f"{name} has no cpp kernel{but}: {_PRODUCTS}"
        return f"the C++ kernels are not there: {outcome.reason}"
    elsewhere = [x.device for x in args if isinstance(x, Tensor) and x.device.type != "cpu"]
    return f"it needs tensors on the CPU, found {elsewhere[0]}" if elsewhere else None


def refusal(name: str, backend: str, args: Sequence = ()) -> str | None:
    """Why a named backend cannot compute an operation (of these arguments); None if it can."""
    if backend == "reference":
        return None
    if name in _ELEMENTWISE:
        return f"{name} has no {backend} kernel: {_ELEMENTWISE[name]}"
    return _no_cpp(name, args) if backend == "cpp" else triton.refusal(name, args)


def call(name: str, backend: str | None, *args):
    """Computes an operation, differentiably.

    Raises:
        ValueError: the backend is unknown, or cannot compute it; the message says why.
    """
    if backend is None:
        return getattr(reference if name in _ELEMENTWISE else autograd, name)(*args)
    if backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend={backend!r} is unknown; known: None, {known}")
    if reason := refusal(name, backend, args):
        raise ValueError(f"backend={backend!r}: {reason}")
    return getattr(reference if backend == "reference" else autograd, name)(*args)

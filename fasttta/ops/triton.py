"""The Triton kernels, registered for CUDA under the operations' names.

Triton and the kernels are imported on the first call. What a kernel is not made for is computed by
the composite implementation: float64, scale 0, single heads of more than 64 channels, tensors whose
samples span 2^31 elements or whose batch exceeds 65535, packed sequences of more than 64 tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import (
    flat_attention_plan,
    score_moments_per_head_plan,
    score_moments_plan,
    shared_prefix_attention_plan,
)
from . import composite

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_SCORES = {  # places of q, of the spans, and of what is read as if it were contiguous
    "score_moments": (0, 2, ()),
    "score_moments_backward": (2, 5, (0, 1, 4)),
    "attention_bootstrap": (0, 2, (6, 7)),
    "attention_bootstrap_backward": (1, 5, (3, 4, 9, 10)),
}
_HEAD = ("adaptation_head", "balance_entropy")
_ENTROPIES = (
    "entropy", "entropy_backward", "principal_entropy", "principal_entropy_backward",
)  # fmt: skip
_FLAT = ("flat_attention", "flat_attention_backward")
_PREFIX = {"shared_prefix_attention": 0, "shared_prefix_attention_backward": 1}  # places of q
_MAPS = ("reliability_ensemble", "total_variation", "total_variation_backward")


def _not_there() -> str | None:
    """Why Triton cannot be imported; that is tried only where kernels could run."""
    try:
        there = importlib.util.find_spec("triton") is not None
    except Exception:  # whatever a finder of other packages raises
        there = False
    if not there:
        return "Triton is not installed: pip install triton"
    if torch.cuda.is_available():
        try:
            import_module("triton")
        except Exception as error:  # a broken installation may fail with anything
            return f"Triton cannot be imported ({type(error).__name__}: {error}): reinstall it"
    return None


@functools.cache
def missing() -> str | None:
    """What Triton lacks to start kernels, which it compiles a little C for; None if nothing."""
    if reason := _not_there():
        return reason
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: gcc, clang or $CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if os.path.exists(header):  # not Path's, which raises where a folder may not be read
        return None
    return f"Triton needs Python's headers, and {header} is not there"


@functools.cache
def _installed() -> bool:
    if reason := missing():
        text = f"fasttta runs without its Triton kernels, slower: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return reason is None


@functools.cache
def _kernels(module: str):
    return import_module(f"...kernels.{module}", __name__)


def _far(x: Tensor) -> bool:
    """Whether 32 bits cannot hold an offset within a sample."""
    within = zip(x.shape[1:], x.stride()[1:], strict=True)
    return sum((size - 1) * stride for size, stride in within) >= 2**31


def _dense(x: Tensor) -> bool:
    """Whether the last dimension is contiguous."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _not_for_scores(q: Tensor, k: Tensor, spans, scale, per_head, *anchors) -> str | None:
    if q.dtype != k.dtype:
        return f"it needs q and k of one dtype, found {q.dtype} and {k.dtype}"
    if scale == 0:
        return "it needs a scale other than 0"
    shape = (q.shape[1], len(spans)) if per_head else (len(spans),)
    for x in anchors:
        if x is not None and (x.shape != shape or x.dtype != torch.float32):
            return f"it needs anchors {list(shape)} in float32, found {list(x.shape)} in {x.dtype}"
    if per_head:
        return score_moments_per_head_plan.unsuitable(q.shape[3])
    return score_moments_plan.unsuitable(spans)


def _not_for_flat(*tensors: Tensor) -> str | None:
    if len({x.dtype for x in tensors if x.ndim == 4}) > 1:
        return f"it needs tensors of one dtype, found {[x.dtype for x in tensors]}"
    k = next(x for x in reversed(tensors) if x.ndim == 4)
    widest = flat_attention_plan.WIDEST_HEAD
    if k.shape[-1] > widest:
        return f"it needs heads of at most {widest} channels, found {k.shape[-1]}"
    if k.shape[0] * k.shape[1] > 65535:
        return f"it needs at most 65535 heads, found {k.shape[0]} samples of {k.shape[1]}"
    return None


def _not_for_prefix(q: Tensor, longest: int, heads: int, *tensors: Tensor) -> str | None:
    *others, starts, tiles = tensors
    types = [x.dtype for x in others[:7]]  # an eighth is the log-sum-exp
    if len(set(types)) > 1:
        return f"it needs tensors of one dtype, found {types}"
    if starts.dtype != torch.int32 or tiles.dtype != torch.int32:
        return f"it needs starts and tiles in int32, found {starts.dtype} and {tiles.dtype}"
    most = shared_prefix_attention_plan.TILE_TOKENS
    if longest > most:
        return f"it needs sequences of at most {most} tokens, found {longest}"
    half = q.dtype == torch.bfloat16
    d, widest = q.shape[2] // heads, shared_prefix_attention_plan.widest_head(half)
    if d > widest:
        return f"it needs heads of at most {widest} channels in {q.dtype}, found {d}"
    if len(q) * heads > 65535:
        return f"it needs at most 65535 heads, found {len(q)} samples of {heads}"
    return None


def unsuitable(name: str, *args) -> str | None:
    """What in its arguments an operation's kernels are not made for; None if nothing."""
    for x in args:
        if not isinstance(x, Tensor):
            continue
        if x.dtype not in _TYPES and not (name in _PREFIX and x.ndim == 1):  # the layout
            return f"it needs float16, bfloat16 or float32, found {x.dtype}"
        if x.ndim > 2 and x.shape[0] > 65535:
            return f"it needs at most 65535 samples, found {x.shape[0]}"
        if x.ndim > 1 and _far(x):
            return f"it needs samples within 2^31 elements, found strides {x.stride()}"
    if name in _FLAT:
        return _not_for_flat(*(x for x in args if isinstance(x, Tensor)))
    if name in _PREFIX:
        tensors = (x for x in args if isinstance(x, Tensor))
        return _not_for_prefix(args[_PREFIX[name]], *args[-3:-1], *tensors)
    if name not in _SCORES:
        return None
    at, spans, _ = _SCORES[name]
    return _not_for_scores(*args[at : at + 2], *args[spans : spans + 3], *args[spans + 4 :])


def _on_scores(name: str, *args):
    if not _installed() or unsuitable(name, *args):
        return getattr(composite, name)(*args)
    dense = _SCORES[name][2]
    given = [x.contiguous() if n in dense and x is not None else x for n, x in enumerate(args)]
    return getattr(_kernels(name.removesuffix("_backward")), name)(*given)


def _on_heads(name: str, *args):
    if not _installed() or unsuitable(name, *args):
        return getattr(composite, name)(*args)
    given = (x.contiguous() if isinstance(x, Tensor) else x for x in args)
    return getattr(_kernels("flat_attention"), name)(*given)


def _on_packed(name: str, *args):
    at = _PREFIX[name]
    empty = not (args[at].numel() and args[at + 1].numel())
    if empty or not _installed() or unsuitable(name, *args):
        return getattr(composite, name)(*args)
    given = [
        x.contiguous() if isinstance(x, Tensor) and not (at <= n < at + 5 and _dense(x)) else x
        for n, x in enumerate(args)
    ]
    return getattr(_kernels("shared_prefix_attention"), name)(*given)


def _on_rows(module: str, name: str, *args):
    """An operation on logits or maps: rows or maps are its tensors of the highest rank."""
    empty = any(isinstance(x, Tensor) and x.ndim > 1 and not x.numel() for x in args)
    suits = not empty and _installed() and not unsuitable(name, *args)
    return getattr(_kernels(module) if suits else composite, name)(*args)


KERNELS: dict[str, Callable] = {
    **{name: functools.partial(_on_scores, name) for name in _SCORES},
    **{name: functools.partial(_on_heads, name) for name in _FLAT},
    **{name: functools.partial(_on_packed, name) for name in _PREFIX},
    **{name: functools.partial(_on_rows, "adaptation_head", name) for name in _HEAD},
    **{name: functools.partial(_on_rows, "entropies", name) for name in _ENTROPIES},
    **{name: functools.partial(_on_rows, "total_variation", name) for name in _MAPS},
}


def _on_own_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be the tensors'."""

    def call(*args):
        x = next(x for x in args if isinstance(x, Tensor))
        if x.device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(x.device):
            return function(*args)

    return call


def register(library: torch.library.Library) -> None:
    """Registers every operation that has a kernel, for CUDA."""
    for name, function in KERNELS.items():
        library.impl(name, _on_own_device(function), "CUDA")


def refusal(name: str, args: Sequence) -> str | None:
    """Why an operation has no kernel for these arguments; None if it has."""
    if name not in KERNELS:
        return f"{name} has no Triton kernel"
    if reason := missing():
        return reason
    if not args and not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    for x in args:
        if isinstance(x, Tensor) and x.device.type != "cuda":
            return f"it needs tensors on a CUDA device, found {x.device}"
    return unsuitable(name, *args) if args else None

"""Whether Triton can start kernels here, and what kernels of every operation need.

Triton and the kernels are imported on the first call. Where they cannot run, or are not made for
the arguments, the operation's default implementation serves.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import first_use

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Programs along the second axis of a grid.
MOST_SAMPLES = 65535


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
    """Says what Triton lacks to start kernels, for which it compiles a little C; None: nothing."""
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
def installed() -> bool:
    """Whether Triton can start kernels; warns once if it cannot."""
    if reason := missing():
        text = f"fasttta runs without its Triton kernels, slower: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return reason is None


@functools.cache
def kernels(operation: str) -> Any:
    """The module of an operation's kernels."""
    launch: Any = import_module("...kernels.launch", __name__)
    if os.environ.get("TRITON_INTERPRET") != "1":  # which compiles nothing
        launch.compiling, launch.compiled = _compiling, _compiled
    return import_module(f"...kernels.{operation}", __name__)


def _compiling(kernel: str) -> AbstractContextManager[object]:
    during = f"compiles the kernel {kernel} for this GPU and these shapes"
    return first_use.telling("kernel", kernel, during, f"compiled the kernel {kernel}")


def _compiled(kernel: str, seconds: float) -> None:
    first_use.made("kernel", kernel, seconds, f"compiled the kernel {kernel}")


def dispatch(
    name: str,
    file: str,
    launch: Callable[..., Any] | None,
    no_triton: Callable[..., str | None],
    default: Callable[..., Any],
) -> Callable[..., Any]:
    """Makes what the dispatcher calls on CUDA for an operator; all its arguments are positional.

    Args:
        file: where its kernels are, in kernels/; launch: runs them; None: the function ``name``.
        no_triton: says why the kernels are not made for the arguments.
        default: runs where they are not, where Triton is not there, and on empty tensors.
    """

    def call(first: Tensor, *others):
        if not first.numel() or not installed() or no_triton(first, *others):
            return default(first, *others)
        run = launch or getattr(kernels(file), name)
        # Triton launches on the current device, which need not be the tensors'
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return run(first, *others)
        with torch.cuda.device(first.device):
            return run(first, *others)

    return call


def refusal(name: str, no_triton: Callable[..., str | None] | None, *args: Any) -> str | None:
    """Says why an operator's Triton kernels cannot run; None if they can.

    Args:
        no_triton: None: the operator has no Triton kernel.
        args: the operator's; without any, the question is whether kernels can run at all.
    """
    if no_triton is None:
        return f"{name} has no Triton kernel"
    if reason := missing():
        return reason
    if not args and not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    for x in args:
        if isinstance(x, Tensor) and x.device.type != "cuda":
            return f"it needs tensors on a CUDA device, found {x.device}"
    return no_triton(*args) if args else None


def is_far(x: Tensor) -> bool:
    """Whether 32 bits cannot hold an offset within a sample of x [n, ...]."""
    within = zip(x.shape[1:], x.stride()[1:], strict=True)
    return sum((size - 1) * stride for size, stride in within) >= 2**31


def unsuitable(*tensors: Tensor | None) -> str | None:
    """Says what no kernel is made for: types, more than 65535 samples, offsets above 32 bits.

    Args:
        tensors: [n, ...] each, n samples where there are three or more dimensions; None: not given.
    """
    for x in tensors:
        if x is None:
            continue
        if x.dtype not in _TYPES:
            return f"it needs float16, bfloat16 or float32, found {x.dtype}"
        if x.ndim > 2 and x.shape[0] > MOST_SAMPLES:
            return f"it needs at most {MOST_SAMPLES} samples, found {x.shape[0]}"
        if x.ndim > 1 and is_far(x):
            return f"it needs samples within 2^31 elements, found strides {x.stride()}"
    return None

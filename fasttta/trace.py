"""NVTX ranges for Nsight, and nothing at all when no profiler can listen.

``with trace.span("encode"): ...`` opens a range. Once it is known that no profiler can listen,
``span`` is ``contextlib.nullcontext`` itself; so call it as ``trace.span``, and do not import it by
name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch

_Range = Callable[[str], contextlib.AbstractContextManager]


def opener() -> _Range | None:
    """Finds what opens a range: the nvtx package, else torch's binding, else nothing: None."""
    try:
        import nvtx

        if type(nvtx.get_domain("fasttta")).__name__ == "DummyDomain":
            return None  # nvtx's own word that no tool is attached
        return functools.partial(nvtx.annotate, domain="fasttta")
    except Exception:  # not installed, or a broken installation: ranges are no reason to fail
        return torch.cuda.nvtx.range if torch.cuda.is_available() else None


def _first(name: str) -> contextlib.AbstractContextManager:
    """Decides what later calls are, and calls that."""
    global span
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if span is _first:
        ranges = opener()
        span = contextlib.nullcontext if ranges is None else functools.partial(_range, ranges)
    return span(name)


def _range(open_range: _Range, name: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if torch.compiler.is_compiling() else open_range(name)


span: _Range = _first

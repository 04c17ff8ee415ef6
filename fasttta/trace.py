"""NVTX ranges for Nsight, and nothing at all when no profiler can listen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch


@functools.cache
def _open() -> Callable[[str], contextlib.AbstractContextManager] | None:
    """What opens a range: the nvtx package, else torch's binding, else None."""
    try:
        import nvtx

        if type(nvtx.get_domain("fasttta")).__name__ == "DummyDomain":
            return None  # nvtx's own word that no tool is attached
        return functools.partial(nvtx.annotate, domain="fasttta")
    except Exception:  # not installed, or a broken installation: ranges are no reason to fail
        return torch.cuda.nvtx.range if torch.cuda.is_available() else None


def span(name: str) -> contextlib.AbstractContextManager:
    """A named range around a block: ``with span("encode"): ...``."""
    if torch.compiler.is_compiling():  # which warns of the cache of _open
        return contextlib.nullcontext()
    opener = _open()
    return contextlib.nullcontext() if opener is None else opener(name)

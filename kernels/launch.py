"""Starts kernels by their launch plans, and asks the device what plans depend on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .launch_plan import Plan, family

#: Surrounds a launch in which Triton is going to compile a kernel, which takes seconds; gets its
#: name. The package sets it, because kernels import nothing of it; None: nothing is said.
compiling: Callable[[str], AbstractContextManager[Any]] | None = None
#: Gets the name and the seconds of a launch that took as long as compiling, unannounced.
compiled: Callable[[str, float], Any] | None = None

_LONG = 0.1  # seconds; a launch takes 1e-5
_started: set[tuple[object, ...]] = set()  # kernels with their constants, launched before


@cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    return family(torch.cuda.get_device_capability(index)[0])


def architecture(x: Tensor) -> str:
    """Family of x's GPU that plans are made for; "sm_90" for tensors that are on no GPU."""
    return _architecture(x.device.index) if x.is_cuda else "sm_90"


def options(plan: Plan, nvidia: bool) -> dict[str, object]:
    """Keyword arguments of a launch: the plan's constants and Triton's own options."""
    arguments = {
        **plan.constants,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
        "enable_fp_fusion": True,  # explicit: the default changes between versions of Triton
    }
    if nvidia and plan.registers:
        arguments["maxnreg"] = plan.registers
    return arguments


def run(kernel, plan: Plan, *args) -> None:
    """Starts the kernel on args; the plan's constants follow them by name."""
    start, keywords = kernel[plan.grid], options(plan, not torch.version.hip)
    if compiling is None or compiled is None:
        start(*args, **keywords)
        return
    # Triton also compiles anew for other types, and for integers that are 1 or divisible by 16: to
    # look at every argument would double the time of a launch
    key = (kernel, *keywords.values())
    if key not in _started:
        with compiling(kernel.__name__):
            start(*args, **keywords)
        _started.add(key)
        return
    begin = time.perf_counter()
    start(*args, **keywords)
    if (seconds := time.perf_counter() - begin) > _LONG:
        compiled(kernel.__name__, seconds)

"""Where every kernel is started, and what is asked of the device first."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .plan import Plan


@cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def architecture(x: Tensor) -> str:
    """The family of x's device that plans are made for; sm_90 for tensors that are on none."""
    return _architecture(x.device.index) if x.is_cuda else "sm_90"


def options(plan: Plan, nvidia: bool) -> dict[str, object]:
    """What a kernel is compiled with, constants included."""
    found = {
        **plan.constants,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
        "enable_fp_fusion": True,  # explicit: the default changes between versions of Triton
    }
    if nvidia and plan.registers:
        found["maxnreg"] = plan.registers
    return found


def run(kernel, plan: Plan, *args) -> None:
    """Starts kernel on args; the plan's constants follow them by name."""
    kernel[plan.grid](*args, **options(plan, not torch.version.hip))

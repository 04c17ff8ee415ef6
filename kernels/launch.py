"""Starts kernels by their launch plans, and asks the device what plans depend on."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .launch_plan import Plan, family


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
    kernel[plan.grid](*args, **options(plan, not torch.version.hip))

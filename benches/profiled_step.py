"""One K50 step for a profiler: its largest kernels, and the step between two marks.

python benches/profiled_step.py names           the functions of the five kernels that take longest
ncu --profile-from-start off ... python benches/profiled_step.py run

The step is ABPEM's on a ViT-B CAV-MAE of random weights, batch 8, a full window of 4 batches, bf16,
without a graph, so that a profiler sees kernels one by one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence

import torch

COUNT = 5


def function_name(kernel: str) -> str:
    """The name of a kernel's function, as ncu has it: without result, namespaces, templates and
    arguments."""
    name, depth = [], 0
    for letter in kernel.removeprefix("void "):
        if letter == "(" and not depth:
            break
        depth += (letter == "<") - (letter == ">")
        if not depth and letter != ">":
            name.append(letter)
    return re.split(r"::", "".join(name).strip())[-1]


def largest(times: Iterable[tuple[str, float]], count: int = COUNT) -> list[str]:
    """Functions of most time, of (kernel, time) of every launch."""
    sums: dict[str, float] = {}
    for kernel, time in times:
        if not kernel.startswith(("Memcpy", "Memset")):
            name = function_name(kernel)
            sums[name] = sums.get(name, 0.0) + time
    return sorted(sums, key=lambda name: -sums[name])[:count]


def prepared():
    """A function that makes a step with a full window, warm."""
    import fasttta
    from fasttta.models import CAVMAE

    torch.manual_seed(0)
    adapted = fasttta.adapt(CAVMAE(50).eval().cuda(), "abpem", k=8, window=4, engine="eager")
    batch = [torch.randn(8, *shape).cuda() for shape in ((1024, 128), (3, 224, 224))]
    for _ in range(5):
        adapted.step(*batch)
    torch.cuda.synchronize()
    return lambda: adapted.step(*batch)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="one K50 step for a profiler")
    parser.add_argument("action", choices=("names", "run"))
    action = parser.parse_args(arguments).action
    if not torch.cuda.is_available():
        print("profiled_step.py: there is no GPU that torch can use", file=sys.stderr)
        return 1
    step = prepared()
    if action == "run":
        torch.cuda.cudart().cudaProfilerStart()
        step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.events() if event.device_type == cuda]
    print("\n".join(largest((event.name, event.self_device_time_total) for event in events)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What is measured: time on the host or the device, and the allocator's high-water mark."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]

_FLUSH_BYTES = 2**28  # several times the last-level cache of any GPU (H200: 60 MB)
_CYCLES_PER_SECOND = 2e9
_LONGEST_HOLD = 0.02  # s


class HostClock:
    """Wall time: what a call takes on the CPU."""

    __name__ = "perf_counter"

    def __call__(self) -> float:
        return time.perf_counter()

    def time(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class DeviceClock:
    """A clock that advances only by what CUDA events measured around ``time(run)``.

    pytest-benchmark takes it as its timer, so that its tables and files show device time.

    Args:
        queued: flush the cache, then keep the device busy while ``run`` is being launched, so that
            the events enclose kernels and no gaps between launches. The queue holds 1,024
            launches: what launches more is measured as it is, launch-bound. Without: from an idle
            device, what a caller waits for.
    """

    __name__ = "cuda_events"

    def __init__(self, device: torch.device, queued: bool) -> None:
        self._now = 0.0
        self._queued = queued
        self._flush = torch.empty(_FLUSH_BYTES if queued else 0, dtype=torch.uint8, device=device)
        self._holds: dict[Run, int] = {}

    def __call__(self) -> float:
        return self._now

    def _hold(self, run: Run) -> int:
        """Cycles that launching ``run`` takes on the host."""
        if run not in self._holds:
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            launch = min(1.5 * (time.perf_counter() - start), _LONGEST_HOLD)
            self._holds[run] = int(launch * _CYCLES_PER_SECOND)
        return self._holds[run]

    def time(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        hold = self._hold(run) if self._queued else 0
        torch.cuda.synchronize()
        if hold:
            self._flush.zero_()
            torch.cuda._sleep(hold)
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        self._now += seconds
        return seconds


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most memory PyTorch's allocator held during ``run``, beyond what it held before and what
    ``run`` returns. Scratch memory inside vendor libraries is not in it."""
    peak, outputs = (_peak_cuda if device.type == "cuda" else _peak_cpu)(run)
    returned = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in outputs}
    return max(0, peak - sum(returned.values()))


def _peak_cuda(run: Run) -> tuple[int, tuple[Tensor, ...]]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, outputs


def _peak_cpu(run: Run) -> tuple[int, tuple[Tensor, ...]]:
    """From the profiler's record of allocations: the resident size would also show what the C
    library keeps, and pages it got earlier."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        outputs = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, outputs


def launches(run: Run) -> int:
    """Kernels, copies and fills that ``run`` starts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profile.events())

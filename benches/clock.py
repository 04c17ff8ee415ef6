"""What is measured: time on the host or the device, and the allocator's high-water mark."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]

_FLUSH_BYTES = 2**28  # several times the last-level cache of any GPU (H200: 60 MB)
_CYCLES_PER_SECOND = 2e9
_LONGEST_HOLD = 0.02  # s
_SECONDS = 4.0  # of one bench, both sides together, where its rounds are not given
_SHORT = 0.5  # s, both sides together
_FIRST_CALLS = 5  # in which graphs are captured: torch.compile does in the third


class HostClock:
    """Wall time: what a call takes on the CPU."""

    __name__ = "perf_counter"

    def time(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class DeviceClock:
    """Device time: what CUDA events measure around a call.

    Args:
        queued: flush the cache, then keep the device busy while ``run`` is being launched, so that
            the events enclose kernels and no gaps between launches. The queue holds 1,024
            launches: what launches more is measured as it is, launch-bound. Without: from an idle
            device, what a caller waits for.
    """

    __name__ = "cuda_events"

    def __init__(self, device: torch.device, queued: bool) -> None:
        self._queued = queued
        self._flush = torch.empty(_FLUSH_BYTES if queued else 0, dtype=torch.uint8, device=device)
        self._holds: dict[Run, int] = {}

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
        return start.elapsed_time(end) / 1e3


def of(device: torch.device, queued: bool) -> HostClock | DeviceClock:
    """The clock of a device."""
    return DeviceClock(device, queued) if device.type == "cuda" else HostClock()


class Sides:
    """Ours and what it is compared with, timed call by call in turn.

    Args:
        run: ours.
        reference: what it is compared with, or None.
        parts: in place of a reference: (how often it does something, that).
        watch: what times a call.

    Attributes:
        seconds: of each call of ours.
        reference_seconds: of each call of the reference, or of its parts together; those of ours
            where there is neither.
    """

    def __init__(
        self,
        run: Run,
        reference: Run | None,
        parts: Sequence[tuple[float, Run]],
        watch: HostClock | DeviceClock,
    ) -> None:
        self.run, self.reference, self.parts, self.watch = run, reference, parts, watch
        self.others = [part for _, part in parts] or ([] if reference is None else [reference])
        self.seconds: list[float] = []
        self.reference_seconds = [] if self.others else self.seconds
        self.warm = False  # whether an untimed call of the same side goes before each timed one

    @property
    def best(self) -> float:
        """Seconds of the shortest call of ours."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Seconds of a usual call of ours."""
        return statistics.median(self.seconds)

    def plan(self, rounds: int | None, short_calls_warm: bool) -> int:
        """How many turns to take; without a wish as many as fit into some seconds, 5 to 200.

        Args:
            short_calls_warm: without a wish, an untimed call goes before each timed one where
                calls are short, so that what the other side leaves of caches and of the
                allocator's heap is not measured.
        """
        if rounds is not None:
            return rounds
        turn = sum(self.watch.time(side) for side in (self.run, *self.others))
        self.warm = short_calls_warm and turn < _SHORT
        return int(min(200, max(5, _SECONDS / turn)))

    def turn(self, keep: bool = True) -> None:
        """Times the reference once, then ours; ``keep``: and keeps both times."""
        if self.parts:
            other = sum(count * self.watch.time(part) for count, part in self.parts)
        elif self.reference is not None:
            if self.warm:
                self.reference()
            other = self.watch.time(self.reference)
        if self.warm:
            self.run()
        ours = self.watch.time(self.run)
        if keep:
            self.seconds.append(ours)
            if self.others:
                self.reference_seconds.append(other)


def graph_pools() -> dict[tuple[int, int], int]:
    """Bytes of PyTorch's private memory pools by their id, in which captured graphs keep all that
    they allocate."""
    pools: dict[tuple[int, int], int] = {}
    for segment in torch.cuda.memory_snapshot():
        pool = tuple(segment["segment_pool_id"])
        if pool != (0, 0):
            pools[pool] = pools.get(pool, 0) + segment["total_size"]
    return pools


class WithGraphs:
    """A side of a bench, which may capture graphs in its first calls: a replay allocates nothing,
    and its memory would not show in any later measurement.

    Attributes:
        pools: ids of the private pools that its first calls have made.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run, self._device = run, device
        self._watched = _FIRST_CALLS if device.type == "cuda" else 0
        self.pools: set[tuple[int, int]] = set()

    def __call__(self) -> tuple[Tensor, ...]:
        if not self._watched:
            return self._run()
        self._watched -= 1
        before = set(graph_pools())
        outputs = self._run()
        self.pools |= set(graph_pools()) - before
        return outputs

    def settle(self) -> None:
        """Ends the first calls, so that no timed one looks at the allocator."""
        while self._watched:
            self()

    def pool_bytes(self) -> int:
        """What its graphs hold, in segments as the allocator takes them from the device."""
        if self._device.type != "cuda":
            return 0
        return sum(size for pool, size in graph_pools().items() if pool in self.pools)


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most memory PyTorch's allocator held during ``run``, beyond what it held before and what
    ``run`` returns, and what the graphs hold that it replays. Scratch memory inside vendor
    libraries is not in it."""
    held = run.pool_bytes() if isinstance(run, WithGraphs) else 0
    return held + _beyond(run, device)


def _beyond(run: Run, device: torch.device) -> int:
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

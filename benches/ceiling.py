"""What the machine can do at best, measured in the same run: copies and matrix products."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

_COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # several times the last-level cache
_SIDE = {"cpu": 1536, "cuda": 8192}


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 40) -> float:
    """Shortest of several calls."""
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return min(seconds)


@functools.cache
def copy_bytes_per_s(device: torch.device, threads: int) -> float:
    """Bytes read and written in a second by a copy between two buffers, with that many threads."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


@functools.cache
def flops_per_s(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Rate of a square matrix product in a type, with that many threads."""
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b, device)


def bound_seconds(
    bytes_moved: int, flops: int, device: torch.device, dtype: torch.dtype, threads: int
) -> float:
    """Time below which no implementation gets that has to do this much from memory."""
    seconds = bytes_moved / copy_bytes_per_s(device, threads)
    return max(seconds, flops / flops_per_s(device, dtype, threads)) if flops else seconds

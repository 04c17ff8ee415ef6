"""What a stream does ahead of its steps: batches in groups, brought to the device and encoded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def groups(batches: Iterable[tuple], size: int) -> Iterator[list[tuple]]:
    """Consecutive batches (inputs, keys) of at least ``size`` samples together; where the loader
    fails, what came before it is given out first."""
    group: list[tuple] = []
    try:
        for batch in batches:
            group.append(batch)
            if sum(len(inputs[0]) for inputs, _ in group) >= size:
                yield group
                group = []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


def one_ahead(made: Iterator[T]) -> Iterator[T]:
    """Every item, given out once the one after it has been made as well, so that on a GPU the work
    of making it is queued before that of using this one. Where making one fails, the one before it
    is given out first."""
    held: list[T] = []
    try:
        for item in made:
            yield from held
            held = [item]
    except Exception:
        yield from held
        raise
    yield from held


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: there are 32 in all, taken in turn, and captured steps have theirs."""
    return torch.cuda.Stream(device)


class Lane:
    """A stream of a GPU beside the current one, for what runs ahead of the steps."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, _side_stream(device)

    def bring(self, x: Tensor) -> Tensor:
        """A tensor on the device: from host memory through pinned memory, without waiting."""
        if x.device.type == "cpu":
            return x.pin_memory().to(self._device, non_blocking=True)
        if x.device == self._device:
            x.record_stream(self._side)
        return x

    def run(self, make: Callable[[], T]) -> tuple[T, torch.cuda.Event]:
        """Calls ``make`` with its GPU work on the side stream, after what is queued by now."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            made, done = make(), torch.cuda.Event()
            done.record()
        return made, done

    def receive(self, done: torch.cuda.Event, *tensors: Any) -> None:
        """Lets the current stream wait for, and safely use, what ``run`` has made."""
        here = torch.cuda.current_stream(self._device)
        here.wait_event(done)
        for x in tensors:
            if isinstance(x, Tensor) and x.is_cuda:
                x.record_stream(here)

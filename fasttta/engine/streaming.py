"""What a stream does ahead of its steps: batches in groups, brought to the device and encoded.

Batches that were read ahead and not stepped on are not lost: see ``Reader``.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..ops.checks import dense

T = TypeVar("T")

# iterator's address -> the reader that has batches of it; closed ones hold what was not stepped on
_READERS: dict[int, Reader] = {}
_CLOSED = 8  # iterators whose unread batches are kept at most, the oldest are given up


class Stream(Generic[T]):
    """Results in order, one a batch; as many as the loader says it has batches.

    Raises:
        TypeError: the loader yields nothing.
    """

    def __init__(self, results: Generator[T], loader: Any) -> None:
        if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise TypeError(f"loader must yield batches, found {loader!r:.80}")
        self._results, self._loader = results, loader

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return next(self._results)

    def __len__(self) -> int:
        """Batches of the loader, where it knows; those already taken are counted too."""
        return len(self._loader)

    def close(self) -> None:
        """Ends the stream: the next one over the same iterator goes on where this one stopped."""
        self._results.close()


class Reader:
    """Batches of a loader, each remembered until it was stepped on.

    A loader that is its own iterator (a generator, ``iter(...)``) gives each batch once. What a
    stream has read of it, but not stepped on when it is left, comes first in the next stream over
    the same iterator, also where the stream before is still open: that one then ends.
    """

    def __init__(self, loader: Iterable) -> None:
        self._iterator = iter(loader)
        self._once = self._iterator is loader
        self._waiting: deque = deque()  # not read by this stream yet
        self._read: deque = deque()  # read, in order, and not stepped on
        self.ended = False
        if self._once:
            before = _READERS.pop(id(self._iterator), None)
            if before is not None:
                self._waiting.extend(before.give_up())
            _READERS[id(self._iterator)] = self

    def __iter__(self) -> Iterator[Any]:
        while not self.ended:
            if self._waiting:
                batch = self._waiting.popleft()
            else:
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    return
            self._read.append(batch)
            yield batch

    def keep(self, batch: Any) -> None:
        """Remembers this in place of the batch that was read last: a copy, where the loader may
        write to the batch again."""
        self._read[-1] = batch

    def refuse(self) -> None:
        """The batch that was read last cannot be used: it does not come again."""
        self._read.pop()

    def stepped(self) -> None:
        """The oldest batch that was read is done with."""
        self._read.popleft()

    def give_up(self) -> Iterator[Any]:
        """Ends this stream; what it has not stepped on."""
        self.ended = True
        unread, self._read, self._waiting = [*self._read, *self._waiting], deque(), deque()
        return iter(unread)

    def close(self) -> None:
        place = id(self._iterator)
        if not self._once or self.ended:
            return
        if not (self._read or self._waiting):
            _READERS.pop(place, None)
            return
        self.ended = True
        _READERS[place] = _READERS.pop(place)  # the newest
        closed = [key for key, reader in _READERS.items() if reader.ended]
        for key in closed[:-_CLOSED]:
            del _READERS[key]


def copied(x: Any) -> Any:
    """A tensor's values, whatever is written to it from now on; other things as they are."""
    if not isinstance(x, Tensor):
        return x
    try:
        x = dense("input", x)
    except TypeError:  # which the check of the whole batch says by its name
        return x
    with torch.inference_mode(False):
        return x.detach().clone()


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

"""A stream: batches of a loader, in groups brought to the device and encoded ahead of their steps.

Batches that were read ahead and not stepped on are not lost, see ``Reader``.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..ops.checks import dense

T = TypeVar("T")

# iterator's address -> the reader that has batches of it; closed ones hold what was not stepped on
_READERS: dict[int, Reader] = {}
_CLOSED = 8  # closed iterators whose unread batches are kept; older ones are dropped


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


def as_inputs(batch: object) -> tuple[Any, ...]:
    """What a loader yields -> the inputs of one call."""
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


class Reader:
    """Batches of a loader, each remembered until it was stepped on.

    A loader that is its own iterator (a generator, ``iter(...)``) gives each batch once. Batches
    that a stream has read but not stepped on come first in the next stream over the same iterator.
    If the earlier stream is still open, it ends then.
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
        """Drops the batch that was read last, which cannot be used."""
        self._read.pop()

    def stepped(self) -> None:
        """Drops the oldest batch that was read, after its step."""
        self._read.popleft()

    def give_up(self) -> Iterator[Any]:
        """Ends this stream; returns the batches that it has not stepped on."""
        self.ended = True
        unread, self._read, self._waiting = [*self._read, *self._waiting], deque(), deque()
        return iter(unread)

    def close(self) -> None:
        """Ends reading; what was read and not taken waits for the next reader of the iterator."""
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
    """A copy of a tensor; other objects are returned unchanged."""
    if not isinstance(x, Tensor):
        return x
    try:
        x = dense("input", x)
    except TypeError:  # the check of the batch names the input
        return x
    with torch.inference_mode(False):
        return x.detach().clone()


def groups(batches: Iterable[T], size: int, samples: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive batches of at least ``size`` samples together; if the loader fails, the
    batches before the failure are yielded first."""
    group: list[T] = []
    try:
        for batch in batches:
            group.append(batch)
            if size <= 1 or sum(map(samples, group)) >= size:
                yield group
                group = []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


def one_ahead(made: Iterator[T]) -> Iterator[T]:
    """Yields every item after the next one has been made, so that on a GPU the work of making
    the next is queued before the work of using this one. If making an item fails, the item
    before it is yielded first."""
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
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two for each device, of work and of copies: PyTorch has 32 in all, and captured steps use
    others."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Lane:
    """Streams of a GPU beside the current one, for what runs ahead of the steps: one for work, and
    one for copies from host memory, which wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side, self._copies = _streams(device)

    def bring(self, x: Tensor) -> Tensor:
        """A tensor on the device, in memory that the caller does not write to.

        From host memory it goes through pinned memory; the copy runs beside a step that is queued,
        and the current stream waits for it. The caller's own pinned memory may be written to again
        when this returns: the host waits for that copy, and for nothing else.
        """
        if x.device.type == "cpu":
            theirs, copied = x.is_pinned(), torch.cuda.Event()
            with torch.cuda.stream(self._copies):
                x = x.pin_memory().to(self._device, non_blocking=True)
                copied.record()
            here = torch.cuda.current_stream(self._device)
            here.wait_event(copied)
            x.record_stream(here)
            if theirs:
                copied.synchronize()
        elif x.device == self._device:
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


@dataclass
class Pipeline:
    """How a stream runs: it reads a group of batches, encodes it, and steps on each.

    Attributes:
        step: (batch as ``read`` returned it, its features or None) -> result.
        read: makes and checks the inputs of a batch; what is wrong with it is raised here.
        bring: the batch, on the device, in memory that the loader does not write to.
        encode: features of every batch of a group, None where nothing is encoded ahead.
        samples: of a batch as ``read`` returned it; size: of a group at least.
        lane: where groups are made beside the steps, on a GPU.
        end: is called when the stream ends.
    """

    step: Callable[[Any, Any], Any]
    read: Callable[[Any], Any] = lambda batch: batch
    bring: Callable[[Any], Any] = lambda batch: batch
    encode: Callable[[list[Any]], Sequence[Tensor | None]] = lambda group: [None] * len(group)
    samples: Callable[[Any], int] = len
    size: int = 1
    lane: Lane | None = None
    end: Callable[[], None] = lambda: None

    def results(self, loader: Iterable[Any]) -> Generator[Any]:
        """A result for every batch of a loader, in order."""
        reader, lane = Reader(loader), self.lane

        def batches() -> Iterator[Any]:
            for batch in reader:
                try:
                    brought = self.bring(batch)
                    reader.keep(brought)
                    ready = self.read(brought)
                except Exception:
                    reader.refuse()
                    raise
                yield ready

        waiting = groups(batches(), self.size, self.samples)

        def make() -> tuple[list[Any], Sequence[Tensor | None]] | None:
            group = next(waiting, None)
            if group is None:
                return None
            try:
                return group, self.encode(group)
            except Exception:
                return group, [None] * len(group)  # one of them fails, at its turn

        def made() -> Iterator[tuple[list[Any], Sequence[Tensor | None], Any]]:
            while True:
                group, done = (make(), None) if lane is None else lane.run(make)
                if group is None:
                    return
                yield *group, done

        # without a size a result does not wait for the next batch
        ahead = one_ahead if self.size > 1 and lane is not None else iter
        try:
            for group, features, done in ahead(made()):
                if lane is not None:
                    lane.receive(done, *features, *_tensors(group))
                for batch, encoded in zip(group, features, strict=True):
                    if reader.ended:  # another stream over the same iterator has taken the rest
                        return
                    try:
                        result = self.step(batch, encoded)
                    except Exception:
                        reader.stepped()
                        raise
                    reader.stepped()
                    yield result
        finally:
            reader.close()
            self.end()


def _tensors(batches: Any) -> Iterator[Tensor]:
    """Tensors in lists and tuples."""
    if isinstance(batches, Tensor):
        yield batches
    elif isinstance(batches, (list, tuple)):
        for part in batches:
            yield from _tensors(part)

"""Ahead of a stream: builds, compiles and captures all that batches of some shapes will need."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..methods.queue import WindowedMethod
from ..ops import first_use, native


class Warmed(Protocol):
    """What a warm-up needs of an adapted model (which imports this module)."""

    options: Any
    engine: str
    _warned_single: bool

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Adapts on a batch and predicts it."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts a batch."""

    def stream(self, loader: Any, encode_batch: int | None = None) -> Any:
        """Steps on every batch of a loader."""

    def _state_now(self) -> Any: ...
    def _first_state(self) -> Any: ...
    def _publish(self, state: Any) -> None: ...

    @property
    def device(self) -> torch.device:
        """Where the model runs."""


@dataclass(frozen=True)
class Warmup:
    """What ``Adapted.warmup`` made, and how long it took.

    Attributes:
        made: the C++ library if it was built, kernels as they were compiled (or read from Triton's
            cache), captured graphs: kind, name and seconds of each, in order. A capture's seconds
            include those of the kernels that it compiled.
        steps: how many steps and predictions ran.
        seconds: all in all.
    """

    made: tuple[first_use.Made, ...]
    steps: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "made": [asdict(each) for each in self.made]}

    def __str__(self) -> str:
        lines = [f"{x.kind:<8} {x.seconds:8.2f} s  {x.name}" for x in self.made]
        if not lines:
            lines = ["nothing was left to build, compile or capture"]
        return "\n".join([*lines, f"{self.steps} runs in {self.seconds:.2f} s"])


def warm_up(adapted: Warmed, run: Rehearsal) -> Warmup:
    """Runs a rehearsal and puts everything that it changed back, also where it fails."""
    start, state, warned = time.perf_counter(), adapted._state_now(), adapted._warned_single
    with first_use.recording() as made, _random_numbers_kept(adapted.device):
        try:
            if adapted.device.type == "cpu":
                native.load()
            adapted._warned_single = True  # a part of one sample is no reason to warn
            run(adapted)
            if adapted.device.type == "cuda":
                torch.cuda.synchronize(adapted.device)
        finally:
            adapted._warned_single = warned
            adapted._publish(state)
    return Warmup(tuple(made), run.steps, time.perf_counter() - start)


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def compiles_for_sizes(adapted: Warmed) -> bool:
    """Whether something may be compiled for the number of samples: kernels of a GPU."""
    return adapted.device.type == "cuda"


class Rehearsal(abc.ABC):
    """Steps on every shape that a stream of such batches will have. ``steps`` counts what ran."""

    def __init__(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.inputs, self.options, self.steps = inputs, options, 0

    @abc.abstractmethod
    def __call__(self, adapted: Warmed) -> None:
        """Runs it on the adapted model, whose state it changes."""

    def _do(self, call: Callable[..., Any], *inputs: Any, **options: Any) -> None:
        call(*inputs, **options)
        self.steps += 1

    def _parts(self, most: int, all_sizes: bool) -> Iterator[tuple[Any, ...]]:
        """Smaller batches, of all sizes or only the smallest."""
        for size in range(most if all_sizes else min(most, 1), 0, -1):
            yield tuple(
                x[:size] if isinstance(x, (Tensor, list, tuple)) else x for x in self.inputs
            )


class Batches(Rehearsal):
    """Of a stream: with every number of batches in the window, each followed by whole batches and
    by partial ones, from an empty window on; then predictions, and a stream that encodes ahead."""

    def __init__(
        self, inputs: tuple[Any, ...], options: dict[str, Any], encode_batch: int | None
    ) -> None:
        super().__init__(inputs, options)
        self._encode_batch = encode_batch

    def __call__(self, adapted: Warmed) -> None:
        """Runs it on the adapted model, whose state it changes."""
        method = adapted.options
        first = self.inputs[0] if self.inputs else None
        batch = len(first) if isinstance(first, Tensor) and first.ndim else 0
        compiles = compiles_for_sizes(adapted)
        # in a captured step a partial batch leaves rows empty
        steps = compiles and adapted.engine != "graph"
        adapted._publish(adapted._first_state())
        for _ in range(method.window if isinstance(method, WindowedMethod) else 1):
            before = adapted._state_now()
            self._do(adapted.step, *self.inputs, **self.options)
            after = adapted._state_now()
            for part in self._parts(batch - 1, steps):
                adapted._publish(before)
                self._do(adapted.step, *part, **self.options)
            adapted._publish(after)
        for part in (self.inputs, *self._parts(batch - 1, compiles)):
            self._do(adapted.predict, *part)
        if self._encode_batch is not None:
            groups = -(-self._encode_batch // max(batch, 1))
            for _ in adapted.stream([self.inputs] * groups, encode_batch=self._encode_batch):
                self.steps += 1


class Images(Rehearsal):
    """Of images that are episodes: calls with as many images as are computed together, and fewer.

    Args:
        together: how many of such images at most.
    """

    def __init__(self, inputs: tuple[Any, ...], options: dict[str, Any], together: int) -> None:
        super().__init__(inputs, options)
        self._together = together

    def __call__(self, adapted: Warmed) -> None:
        """Runs it on the adapted model."""
        images = self.inputs[0] if self.inputs else None
        lone = images is None or (isinstance(images, Tensor) and images.ndim == 3)
        count = len(images) if isinstance(images, (Tensor, list, tuple)) and not lone else 0
        self._do(adapted.step, *self.inputs, **self.options)
        # captured groups too: one of less than half of the places is captured anew
        all_sizes = compiles_for_sizes(adapted) or adapted.engine == "graph"
        for part in self._parts(min(count - 1, self._together), all_sizes):
            self._do(adapted.step, *part, **self.options)
        views = {name: x for name, x in self.options.items() if name == "views"}
        self._do(adapted.predict, *self.inputs, **views)

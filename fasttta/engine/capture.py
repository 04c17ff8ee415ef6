"""Work recorded as CUDA graphs: warm-up, capture, and what is done when either fails."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ..ops import first_use

T = TypeVar("T")

_WARM_UP = 3  # runs before the capture: kernels compile, the allocator settles
_ONE = threading.Lock()  # PyTorch captures one graph at a time in a process


class CaptureError(RuntimeError):
    """The work runs, but not under capture; its cause is the error that the capture raised."""


class Capture:
    """Records functions of one object as CUDA graphs.

    All of them use one side stream and one memory pool: blocks of the pool belong to the stream
    that they were allocated on, so a second graph re-uses what the first left free only if it is
    captured on the same stream. Results of a graph must be copied before another one is replayed.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
        # The allocator may still ask a graph whose capture failed.
        self._failed: list[torch.cuda.CUDAGraph] = []

    def record(self, body: Callable[[], T], name: str = "a step") -> tuple[torch.cuda.CUDAGraph, T]:
        """Runs a function a few times, then captures it, and says how long that took.

        When this returns or raises, the current stream waits for the side stream: the caller may
        put back what the runs have changed.

        Args:
            body: reads and writes tensors that stay where they are.
            name: of what it does, for the log.

        Returns:
            The graph, and what ``body`` returned under capture: tensors that each replay writes.

        Raises:
            CaptureError: ``body`` cannot be captured.
            Exception: whatever ``body`` raises in a run without capture; also
                ``torch.OutOfMemoryError``, wherever it is raised.
        """
        capturing = first_use.telling("graph", name, f"captures {name}", f"captured {name}")
        with capturing, torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(_WARM_UP):
                        body()
            finally:
                here.wait_stream(self.stream)
            return self._record(body)

    def _record(self, body: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        graph, failure, done = torch.cuda.CUDAGraph(), None, False
        try:
            with (
                _ONE,
                _no_garbage_collection(),
                _own_workspaces(),
                # a failed capture leaves its stream as the current one
                torch.cuda.stream(torch.cuda.current_stream()),
                # other threads, such as a loader's, may use the device during the capture
                torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    result = body()
                except BaseException as error:
                    failure = error  # ending the capture may raise another one in its place
                    raise
            done = True
            return graph, result
        except BaseException as error:
            reason = failure or error
            if isinstance(reason, RuntimeError) and not isinstance(reason, torch.OutOfMemoryError):
                raise CaptureError(
                    f'this step cannot be captured, use engine="eager": {reason}'
                ) from reason
            raise reason from reason.__cause__
        finally:
            if not done:
                self._failed.append(graph)
                # some versions of PyTorch leave its pool as the one to allocate from
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collects garbage first and none inside: a collected cycle may hold another graph, an event
    or a compiled kernel, whose release invalidates a capture."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS keeps one workspace for each stream. It is dropped before and after the capture, so
    that the graph's workspace comes from the graph's pool, which no other capture and no other
    work on this stream shares."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()

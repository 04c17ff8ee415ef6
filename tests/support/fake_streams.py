"""Fakes of a GPU's streams, events and graphs that write down what is asked of them."""

from __future__ import annotations

import contextlib

import torch


class FakeStreams:
    """Stands in for ``torch.cuda``'s streams, events and graphs.

    Attributes:
        log: what happened, in order: ``"main waits for s1"``, ``"begin on s1"``, ``"end"``,
            ``"workspaces dropped"``, ``"record e1 on s1"``, ``"main waits for e1"`` and so on.
        current: the name of the current stream.
        begin_error, end_error: raised when a capture begins or ends.
    """

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.made = {"s": 0, "e": 0, "pool": 0}
        self.now = self.main = _Stream(self, "main")
        self.capturing = False
        self.begin_error: Exception | None = None
        self.end_error: Exception | None = None
        cuda, native, write = torch.cuda, torch._C, self.log.append
        for where, name, value in (
            (cuda, "Stream", lambda *args, **kwargs: _Stream(self, self.name("s"))),
            (cuda, "Event", lambda *args, **kwargs: _Event(self, self.name("e"))),
            (cuda, "CUDAGraph", lambda: _Graph(self)),
            (cuda, "graph", self._graph),
            (cuda, "stream", self._stream),
            (cuda, "device", lambda device: contextlib.nullcontext()),
            (cuda, "current_stream", lambda device=None: self.now),
            (cuda, "current_device", lambda: 0),
            (cuda, "graph_pool_handle", lambda: self.name("pool")),
            (native, "_cuda_clearCublasWorkspaces", lambda: write("workspaces dropped")),
            (native, "_cuda_endAllocateToPool", lambda device, pool: write(f"left {pool}")),
        ):  # fmt: skip
            monkeypatch.setattr(where, name, value, raising=False)

    @property
    def current(self) -> str:
        return self.now.name

    def name(self, kind: str) -> str:
        self.made[kind] += 1
        return f"{kind}{self.made[kind]}"

    @contextlib.contextmanager
    def _stream(self, stream):
        before = self.now
        self.now = stream
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def _graph(self, graph, *, pool, stream, capture_error_mode):
        """Like ``torch.cuda.graph``, whose stream stays the current one after a failure."""
        graph.pool, graph.stream = pool, stream
        before, self.now = self.now, stream
        self.log.append(f"begin on {stream.name}")
        if self.begin_error is not None:
            raise self.begin_error
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            self.log.append("end")
            if self.end_error is not None:
                raise self.end_error
            self.now = before


class _Stream:
    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name

    def wait_stream(self, other):
        self.gpu.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.gpu.log.append(f"{self.name} waits for {event.name}")


class _Event:
    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name

    def record(self, stream=None):
        self.gpu.log.append(f"record {self.name} on {(stream or self.gpu.now).name}")

    def synchronize(self):
        self.gpu.log.append(f"the host waits for {self.name}")


class _Graph:
    def __init__(self, gpu):
        self.gpu = gpu

    def replay(self):
        self.gpu.log.append("replay")


class FakeTensor(torch.Tensor):
    """A tensor that seems to lie on a device, and writes down its copies and what uses it."""

    @staticmethod
    def make(gpu, name, device="cpu", pinned=False):
        x = torch.zeros(2, 3).as_subclass(FakeTensor)
        x.gpu, x.named, x.place, x.pinned = gpu, name, torch.device(device), pinned
        return x

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: self.place.type == "cuda")

    def is_pinned(self):
        return self.pinned

    def pin_memory(self):
        return self if self.pinned else self._moved("cpu", True)

    def to(self, device, non_blocking=False):
        assert self.pinned, "this copy would block"
        assert non_blocking
        self.gpu.log.append(f"copy {self.named} on {self.gpu.now.name}")
        return self._moved(device, False)

    def record_stream(self, stream):
        self.gpu.log.append(f"{self.named} is used on {stream.name}")

    def _moved(self, device, pinned):
        return FakeTensor.make(self.gpu, self.named, device, pinned)

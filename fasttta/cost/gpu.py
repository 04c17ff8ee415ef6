"""A GPU that is not there: what a step asks of ``torch.cuda``, answered for fake tensors.

Streams and events do nothing, since nothing runs. A captured graph keeps the operations that were
logged during its capture, and logs them again at each replay: so ``engine="graph"`` runs its own
code, and is counted as a GPU would run it.

This replaces functions of PyTorch in the whole process, for good: ``fasttta.cost`` is a process of
its own.
"""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..files.weights import STAND_INS
from .log import Finding, Log
from .operation import Operation

DEVICE = torch.device("cuda", 0)

_MEMORY = 141 * 10**9  # bytes of an H200
_PROPERTIES = SimpleNamespace(
    name="a GPU that is not there",
    total_memory=_MEMORY,
    major=9,
    minor=0,
    multi_processor_count=132,
)

_log: Log | None = None  # the one that is open


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream, self.device = id(self), DEVICE

    def wait_stream(self, other: Any) -> None:
        """Nothing runs."""

    def wait_event(self, event: Any) -> None:
        """Nothing runs."""

    def record_event(self, event: Any = None) -> Any:
        """An event that has happened."""
        return event or _Event()

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def synchronize(self) -> None:
        """A host that waits: a finding."""
        _host_waits("Stream.synchronize")


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Nothing runs."""

    def wait(self, stream: Any = None) -> None:
        """Nothing runs."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def synchronize(self) -> None:
        """A host that waits: a finding."""
        _host_waits("Event.synchronize")


class _Graph:
    """A captured graph: the operations between its capture's begin and end."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operations: list[Operation] = []
        self.findings: list[Finding] = []
        self.peak = 0

    def replay(self) -> None:
        """Logs its operations, and what was found in them, as run once more."""
        if _log is not None:
            _log.operations += self.operations
            _log.findings += self.findings
            _log.peak = max(_log.peak, _log.live + self.peak)

    def reset(self) -> None:
        """Frees it."""
        self.operations = []

    def pool(self) -> tuple[int, int]:
        """Handle of its memory."""
        return (0, 1)


@contextlib.contextmanager
def _capture(graph: _Graph, pool: Any = None, stream: Any = None, **_: Any):
    assert _log is not None, "a graph is captured outside of counting()"
    first, found = len(_log.operations), len(_log.findings)
    live, peak = _log.live, _log.peak
    _log.capturing, _log.peak = True, _log.live
    try:
        yield
    finally:
        _log.capturing = False
        graph.operations = _log.operations[first:]
        graph.peak, _log.peak = _log.peak - live, peak
        graph.findings = _log.findings[found:]
        del _log.operations[first:], _log.findings[found:]


def _host_waits(what: str) -> None:
    if _log is not None:
        _log.find("host read", what)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What PyTorch chooses on a GPU: flash attention in half types, else the efficient kernel, or,
    with a mask that broadcasts, its own products."""
    if not query.is_cuda or attn_mask is not None or enable_gqa:
        return _pytorch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if query.dtype in (torch.float16, torch.bfloat16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    inputs = (query, key, value)
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(*inputs, None, graph, dropout_p, is_causal, scale=scale)[0]


_pytorch_attention = F.scaled_dot_product_attention


def _pin(x: Tensor, *_: Any) -> Tensor:
    pinned = x.clone()
    if _log is not None:
        _log.pin(pinned)
    return pinned


def _address(x: Tensor) -> int:
    """Tensors over one storage have one; those that lie apart have others."""
    return id(x.untyped_storage()) + int(x.storage_offset()) * x.element_size()


def pretend() -> None:
    """Makes this process believe in a GPU of compute capability 9.0."""
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = _Stream, _Event, _Graph, _capture
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = cuda.device = lambda *_: contextlib.nullcontext()
    cuda.current_device, cuda.device_count = lambda: 0, lambda: 1
    cuda.is_current_stream_capturing = lambda: _log is not None and _log.capturing
    cuda.graph_pool_handle = lambda: (0, 1)
    cuda.synchronize = lambda *_: _host_waits("torch.cuda.synchronize")
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: _PROPERTIES
    cuda.mem_get_info = lambda *_: (_MEMORY, _MEMORY)
    core: Any = torch._C
    core._cuda_clearCublasWorkspaces = lambda *_: None
    core._cuda_endAllocateToPool = lambda *_: None
    F.scaled_dot_product_attention = _attention
    kind: Any = Tensor
    storage: Any = torch.UntypedStorage
    kind.pin_memory, kind.record_stream, kind.data_ptr = _pin, lambda *_: None, _address
    storage.data_ptr = lambda x: id(x)
    STAND_INS.add(FakeTensor)


@contextlib.contextmanager
def counting(half: bool = False):
    """Inside, models and inputs on "cuda" are fake, and what runs on them is logged: a ``Log``."""
    global _log
    with FakeTensorMode(allow_non_fake_inputs=True), Log(half) as _log:
        try:
            yield _log
        finally:
            _log = None


def on_gpu(model: nn.Module) -> nn.Module:
    """A copy of a module with its weights and buffers as fake tensors on the GPU."""
    memo: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
        is_parameter = isinstance(x, nn.Parameter)
        memo[id(x)] = nn.Parameter(fake, x.requires_grad) if is_parameter else fake
    return copy.deepcopy(model, memo)

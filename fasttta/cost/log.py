"""Logs what a step dispatches on fake tensors, and notices what a GPU's step must not do.

Kernels of a captured graph are taken out of the log when the capture ends; each replay puts them
back. Tensors on the host are real; of the device there are no values: what the host reads
is true, 1, or a small number, which passes for a difference of equals.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.registry import OPERATORS
from .operation import ATTENTION, FREE, PRODUCTS, Operation, is_on_gpu, measured, tensors

_ANSWERS = ("is_nonzero", "equal", "allclose")
_READS = ("_local_scalar_dense", "item", *_ANSWERS)
_SMALL = 1e-9  # a difference of equals to any check, and a scale or deviation above 0
_FEW = 64  # numbers that may be float64 on a GPU: no time is lost
_TRANSFERS = ("_to_copy", "copy_", "_copy_from")
# folders and files that are only passed through on the way to what is of interest
_BETWEEN = ("/fasttta/cost/", "/fasttta/trace.py")


@dataclass(frozen=True)
class Finding:
    """Something that a step on a GPU must not do.

    Attributes:
        kind: "host read", "blocking copy", "devices mixed", "fp64", "fp32 product".
        what: operation and shapes. where: source line.
    """

    kind: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} at {self.where}"


class Log(TorchDispatchMode):
    """Operations on the fake GPU since ``begin``, inside a ``FakeTensorMode``.

    Attributes:
        operations, findings: in the order of dispatch.
        peak: most bytes alive at once of those allocated since ``begin``.
        half: products of float32 are findings, from ``least`` FLOP on.
    """

    def __init__(self, half: bool = False, least: int = 10**8) -> None:
        super().__init__()
        self.half, self.least = half, least
        self.capturing = False
        self._lines: dict[int, str] = {}  # by autograd's number of the forward operation
        self._alive: dict[int, weakref.ref] = {}
        self._pinned: weakref.WeakSet = weakref.WeakSet()
        self.begin()

    def begin(self) -> None:
        """Forgets what was logged; tensors that are alive now do not count."""
        self.operations: list[Operation] = []
        self.findings: list[Finding] = []
        self.live = self.peak = 0
        self._alive.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "prim" or name in ("device", "dtype", "layout"):
            return func(*args, **kwargs)
        inputs = list(tensors((args, kwargs)))
        on_gpu = any(map(is_on_gpu, inputs))
        real = not any(isinstance(x, FakeTensor) for x in inputs)
        if real and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return self._on_host(func, args, kwargs)
        if name in _READS:
            return self._read(func, args, kwargs, on_gpu)
        if on_gpu and (every := _all_chosen(name, args)) is not None:
            self.find("host read", f"{func._schema.name}, whose result's size depends on values")
            return every
        if func.namespace == "fasttta" and on_gpu and self._unsuitable(name, args):
            with self:
                return OPERATORS[name].default(*args)
        results = func(*args, **kwargs)
        made = list(tensors(results))
        if not on_gpu and not any(map(is_on_gpu, made)):
            return results
        self._track(inputs, made)
        where = self._where()
        self._inspect(name, args, kwargs, inputs, made, where)
        if name not in FREE and not getattr(func, "is_view", False):
            operation = measured(func, args, kwargs, made, where)
            self.operations.append(operation)
            self._inspect_product(operation, made)
        return results

    def _on_host(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Computes with tensors on the host, which have values, such as ids of classes."""
        pinned = kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            results = func(*args, **kwargs)
        for x in tensors(results) if pinned else ():
            self.pin(x)
        return results

    def _read(self, func: Any, args: tuple, kwargs: dict, on_gpu: bool) -> Any:
        if on_gpu:  # else a copy of what was on the GPU: whoever made it has waited
            self.find("host read", func._schema.name)
        kind, name = args[0].dtype, func._schema.name.partition("::")[2]
        if name in _ANSWERS or kind == torch.bool:
            return True
        return _SMALL if kind.is_floating_point else 1

    def _unsuitable(self, name: str, args: tuple) -> bool:
        """Whether an operator's default implementation runs in place of its Triton kernels."""
        operator = OPERATORS[name]
        if operator.default is None:
            raise TypeError(f"fasttta::{name} has no kernel for a GPU, and was called on one")
        return operator.no_triton is None or operator.no_triton(*args) is not None

    def pin(self, x: Tensor) -> None:
        """Notes that a tensor on the host lies in pinned memory."""
        self._pinned.add(x.untyped_storage())

    def _inspect(
        self, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], made: list[Tensor],
        where: str,
    ) -> None:  # fmt: skip
        on_host = [x for x in (*inputs, *made) if not is_on_gpu(x)]
        if name in _TRANSFERS:
            flags = kwargs.get("non_blocking"), name == "copy_" and args[2:] == (True,)
            pinned = all(x.untyped_storage() in self._pinned for x in on_host)
            if on_host and not (any(flags) and pinned):
                self.find("blocking copy", _described(name, inputs, made), where)
        elif any(x.ndim for x in on_host) and name not in FREE:
            self.find("devices mixed", _described(name, inputs, made), where)
        if any(x.dtype == torch.float64 and x.numel() > _FEW for x in made):
            self.find("fp64", _described(name, inputs, made), where)

    def _inspect_product(self, operation: Operation, made: list[Tensor]) -> None:
        if (
            self.half
            and operation.kind in (PRODUCTS, ATTENTION)
            and operation.rate in ("fp32", "tf32")
            and operation.flops >= self.least
        ):
            shapes = operation.product or list(made[0].shape)
            self.find("fp32 product", f"{operation.name} {shapes}", operation.where)

    def find(self, kind: str, what: str, where: str = "") -> None:
        """Notes a finding; where: of the line that runs now."""
        where = where or self._where()
        self.findings.append(Finding(kind, what, f"{where} (captured)" * self.capturing or where))

    def _track(self, inputs: list[Tensor], made: list[Tensor]) -> None:
        """Counts the memory that results take, unless it is that of an input."""
        theirs = {id(x.untyped_storage()) for x in inputs}
        for x in made:
            storage = x.untyped_storage()
            if is_on_gpu(x) and id(storage) not in theirs and id(storage) not in self._alive:
                self._count(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(reference: weakref.ref) -> None:
            if self._alive.get(key) is reference:
                del self._alive[key]
                self.live -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _where(self) -> str:
        """The innermost source line outside of PyTorch; of a gradient that of its forward."""
        node = torch._C._current_autograd_node()
        if node is not None:
            line = self._lines.get(node._sequence_nr(), "")
            if line:
                return f"gradient of {line}"
        line = next(_lines(), "?")
        if node is None and torch.is_grad_enabled():
            # the operation's node has taken the number before the next
            self._lines[torch.autograd._get_sequence_nr() - 1] = line
        return line


def _all_chosen(name: str, args: tuple) -> Tensor | None:
    """The result of an operation that chooses by a mask, as if nothing were masked; of
    ``nonzero`` an empty one; None: it chooses nothing."""
    if name == "nonzero":
        return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
    if name == "masked_select":
        return args[0].flatten().clone()
    if name == "index" and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
        return args[0].flatten(0, args[1][0].ndim - 1).clone()
    return None


def _described(name: str, inputs: list[Tensor], made: list[Tensor]) -> str:
    shapes = [f"{x.device.type} {list(x.shape)}" for x in (*inputs, *made)]
    return f"{name} of {', '.join(shapes)}"


def _lines() -> Iterator[str]:
    """Source lines on the stack that are neither PyTorch's nor this room's, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "<" not in file and not any(x in file for x in _BETWEEN):
            short = "/".join(file.rsplit("/", 2)[-2:])
            yield f"{short}:{frame.f_lineno}"
        frame = frame.f_back

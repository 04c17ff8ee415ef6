"""Copies from the host to a device, counted without one: the meta device stands for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_MAKERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)  # of numbers of the host


class HostCopies(TorchFunctionMode):
    """Within it, ``to_device`` lists the shapes of copies from the CPU to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device: list[list[int]] = []
        self._moves = _Moves(self.to_device)

    def __enter__(self) -> HostCopies:
        self._moves.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._moves.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _MAKERS and out.is_meta:
            self.to_device.append(list(out.shape))
        return out


class _Moves(TorchDispatchMode):
    def __init__(self, to_device: list[list[int]]) -> None:
        super().__init__()
        self._to_device = to_device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        moves = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if moves and out.is_meta:
            sources = [x for x in _tensors(args) if x.device.type == "cpu"]
            self._to_device += [list(x.shape) for x in sources]
        return out


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)

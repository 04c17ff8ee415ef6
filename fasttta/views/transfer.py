"""Tensors of the host on a GPU, in one copy that waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

_ALIGNED = 16  # bytes: kernels read vectors of this size


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on the host -> the same on a device, contiguous, as parts of one buffer.

    They are packed into pinned memory and copied in one piece behind the work that the device has
    to do; the host goes on at once. A copy from memory that is not pinned waits for all that work.
    """
    starts, end = [], 0
    for x in tensors:
        starts.append(end)
        end += -(-x.numel() * x.element_size() // _ALIGNED) * _ALIGNED
    pinned = device.type == "cuda"
    packed = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for start, x in zip(starts, tensors, strict=True):
        _part(packed, start, x).copy_(x)
    buffer = packed.to(device, non_blocking=True)
    return [_part(buffer, start, x) for start, x in zip(starts, tensors, strict=True)]


def _part(buffer: Tensor, start: int, x: Tensor) -> Tensor:
    """The bytes from ``start`` on as a tensor of the type and shape of x."""
    size = x.numel() * x.element_size()
    return buffer[start : start + size].view(x.dtype).view(x.shape)


def moved(values: T, device: torch.device) -> T:
    """Nested lists, tuples and named tuples with their tensors on a device, in one copy; what is
    no tensor stays."""
    return cast(T, _rebuilt(values, iter(to_device([*_tensors(values)], device))))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _rebuilt(values: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(values, Tensor):
        return next(tensors)
    if not isinstance(values, (list, tuple)):
        return values
    parts = [_rebuilt(value, tensors) for value in values]
    if hasattr(values, "_fields"):
        return type(values)(*parts)
    return type(values)(parts)

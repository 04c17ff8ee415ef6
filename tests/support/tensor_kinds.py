"""Tensors of other kinds than a plain one: subclasses, wrappers, fakes."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map


class Named(torch.Tensor):
    """Changes no operation, and stays of its class through all of them."""


class Other(torch.Tensor):
    """A subclass of Tensor that changes nothing."""


class Counting(torch.Tensor):
    """Operations of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(torch.Tensor):
    """Holds its values elsewhere, as quantised and distributed tensors do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, args)
        return func(*args, **(kwargs or {}))


class DTensor(Wrapper):
    """A wrapper that bears the name of PyTorch's distributed tensor."""


def fake_tensor(x):
    """The tensor without values, as tracing makes it."""
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)

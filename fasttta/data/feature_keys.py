"""What encoder outputs depend on, as digests: a model up to its fusion, and one sample."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from numbers import Integral
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..ops.byte_sums import byte_sums

FORMAT = 2
_PROBE = 64  # values of an input that are looked at where the sample has an id
_MODULE = frozenset(vars(nn.Module()))
_KNOWN = frozenset(("fasttta", "torch", "numpy")) | sys.stdlib_module_names
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_VALUES = (Tensor, np.ndarray, nn.Module)
_WRAPPERS = (partial, cached_property, staticmethod, classmethod, property)


def model_key(model: nn.Module, precision: str, dtype: str) -> str:
    """32 hex digits of everything that a model's ``encode`` depends on.

    Every byte of every weight and buffer (but the fusion's q, k, v or RAda's head, behind the
    encoders, so that all methods with frozen encoders agree), settings such as head counts, the
    code of classes that are neither PyTorch's nor ours, the spec and the cut found by it. All is
    read at every call, as no counter tells of writes through ``.data``, numpy or another process.

    Args:
        model: as the steps run it, in its precision, after its first batch.
        precision: its name.
        dtype: what features are stored in.

    Raises:
        TypeError: the values of a weight cannot be read.
    """
    behind = set()
    group = "head" if hasattr(model, "head") else "fusion_qkv"
    for slot in model.tunable(group).values():
        path, _, leaf = slot.parameter.rpartition(".")
        behind.add((id(model.get_submodule(path)), leaf))
    contents = _Contents(behind)
    for value in (FORMAT, __version__, precision, dtype, model):
        contents.add(value)
    return contents.hexdigest()


def named_key(name: str, precision: str, dtype: str) -> str:
    """32 hex digits of a model that the user names, in a precision and a type of features."""
    contents = _Contents(set())
    for value in (FORMAT, __version__, precision, dtype, "named", name):
        contents.add(value)
    return contents.hexdigest()


class _Contents:
    """A hash over objects, their parts and the code they run; addresses never enter it."""

    def __init__(self, behind: set[tuple[int, str]]) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._behind = behind
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an address in _seen stays taken
        self._tensors: list[Tensor] = []

    def hexdigest(self) -> str:
        """Of all that was added; the values of tensors are read here, together."""
        total = self._hash.copy()
        total.update(byte_sums(self._tensors))
        return total.hexdigest()

    def _text(self, *parts: str) -> None:
        for part in parts:
            data = part.encode()
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self._text(type(value).__name__, repr(value))
        elif isinstance(value, Tensor):
            self._text("tensor", str(value.dtype), str(list(value.shape)))
            self._tensors.append(value)
        elif isinstance(value, tuple):
            self._items(value)
        elif isinstance(value, (set, frozenset)):
            self._text("set", *sorted(map(repr, value)))
        elif id(value) in self._seen:
            self._text("again", str(self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            self._object(value)

    def _items(self, values: Sequence) -> None:
        self._text(type(values).__name__, str(len(values)))
        for value in values:
            self.add(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, list):
            self._items(value)
        elif isinstance(value, Mapping):
            self._text(type(value).__name__)
            self._items(tuple(value.items()))
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, CodeType):
            self._text(value.co_name, value.co_code.hex())
            for part in (value.co_names, value.co_varnames, value.co_consts):
                self.add(part)
        elif isinstance(value, MethodType):
            self.add((value.__func__, value.__self__))
        elif isinstance(value, _WRAPPERS) or hasattr(value, "__wrapped__"):
            names = ("func", "args", "keywords", "__func__", "fget", "__wrapped__")
            self.add({n: getattr(value, n) for n in names if hasattr(value, n)})
        elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            digest = hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
            self._text("array", str(value.dtype), str(value.shape), digest)
        else:
            self.add(type(value))
            # others hold caches, locks, loggers: state that changes without changing features
            if dataclasses.is_dataclass(value):
                names = [f.name for f in dataclasses.fields(value)]
                self.add({name: getattr(value, name, None) for name in names})
            elif (
                isinstance(value, (SimpleNamespace, argparse.Namespace))
                or type(value).__name__.endswith("Config")
                or type(value).__module__.startswith("fasttta.")
            ):
                self.add(vars(value))
            elif not _known(type(value).__module__):  # tables of a helper of the model
                parts = getattr(value, "__dict__", {})
                self.add({n: x for n, x in parts.items() if isinstance(x, _VALUES)})

    def _module(self, module: nn.Module) -> None:
        self.add(type(module))
        for name, value in vars(module).items():
            if name not in _MODULE:
                self._text(name)
                self.add(value)
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if (id(module), name) not in self._behind:
                self._text(name)
                self.add(value)
        for name, child in module._modules.items():
            self._text(name)
            self.add(child)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            self._text(base.__module__, base.__qualname__)
            if not _known(base.__module__):
                for name, value in vars(base).items():
                    if not name.startswith("__") or callable(value):
                        self._text(name)
                        self.add(value)

    def _function(self, function: FunctionType) -> None:
        self._text(function.__module__ or "", function.__qualname__)
        if _known(function.__module__ or ""):
            return
        code = function.__code__
        self.add((code, function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # not filled yet
                self._text("empty")
        for name in code.co_names:
            value = function.__globals__.get(name)
            if value is not None and isinstance(value, (FunctionType, *_PLAIN, *_VALUES)):
                self._text(name)
                self.add(value)


def _known(module: str) -> bool:
    """Code that the versions of fasttta and PyTorch stand for."""
    return module.split(".")[0] in _KNOWN


def sample_keys(inputs: tuple[Tensor, ...], ids: object = None) -> list[str]:
    """One key a sample: of all its values, or of its id and a few of them.

    Args:
        inputs: one batch [n, ...] each, as the model takes it.
        ids: n strings or integers (a tensor [n] of them will do), or None.

    Raises:
        TypeError, ValueError: ids are of another kind, or not n.
    """
    n = len(inputs[0])
    named = [""] * n if ids is None else _checked(ids, n)
    layout = str([(str(x.dtype), list(x.shape[1:])) for x in inputs])
    rows = []
    for x in inputs:
        x = x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None]  # [n, values]
        x = x if ids is None else x[:, :: max(1, x.shape[1] // _PROBE)]
        rows.append(x.cpu().contiguous().view(torch.uint8).numpy())
    keys = []
    for i, name in enumerate(named):
        digest = hashlib.blake2b(f"{len(name)} {name} {layout}".encode(), digest_size=16)
        for row in rows:
            digest.update(row[i].data)
        keys.append(digest.hexdigest())
    return keys


def _checked(ids: object, n: int) -> list[str]:
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"ids must be a list of strings or integers, found {ids!r}")
    if len(ids) != n:
        raise ValueError(f"ids has {len(ids)} entries for {n} samples; needed one a sample")
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, (str, Integral)):
            raise TypeError(f"ids must be strings or integers, found {value!r}")
    return [f"str {v}" if isinstance(v, str) else f"int {int(v)}" for v in ids]

"""What encoder outputs depend on, as digests: a model up to its fusion, and one sample."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..models import ModelWithHead
from ..ops.byte_sums import byte_sums
from ..protocols import FusionModel

FORMAT = 3
_PROBE = 64  # values of an input that are looked at where the sample has an id
_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_VALUES = (Tensor, np.ndarray, nn.Module)


def model_key(model: FusionModel, precision: str, dtype: str) -> str:
    """32 hex digits that stand for a model up to its fusion.

    They depend on every byte of every weight and buffer (but the fusion's q, k, v or RAda's head,
    behind the encoders, so that all methods with frozen encoders agree), on settings such as head
    counts, on the spec and the cut that it leads to, on names of classes and functions and the
    versions of their packages. They do not depend on code: a forward that was edited has the same
    key. All is read at every call, as no counter tells of writes through ``.data``, numpy or
    another process.

    Args:
        model: as the steps run it, in its precision, after its first batch.
        precision: its name.
        dtype: the type that features are stored in.

    Raises:
        TypeError: the values of a weight cannot be read.
    """
    behind = set()
    group = "head" if isinstance(model, ModelWithHead) else "fusion_qkv"
    for slot in model.tunable(group).values():
        path, _, leaf = slot.parameter.rpartition(".")
        behind.add((id(cast(nn.Module, model).get_submodule(path)), leaf))
    contents = _Contents(behind)
    for value in (FORMAT, __version__, torch.__version__, precision, dtype, model):
        contents.add(value)
    return contents.hexdigest()


def named_key(name: str, precision: str, dtype: str) -> str:
    """32 hex digits of a model that the user names, in a precision and a type of features."""
    contents = _Contents(set())
    for value in (FORMAT, __version__, precision, dtype, "named", name):
        contents.add(value)
    return contents.hexdigest()


class _Contents:
    """A hash over objects and their parts: values and names, never addresses or code.

    Args:
        behind: (identity of a module, name) of parameters that are left out.
    """

    def __init__(self, behind: set[tuple[int, str]]) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._behind = behind
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an address in _seen stays taken
        self._tensors: list[Tensor] = []

    def hexdigest(self) -> str:
        """The digest of all that was added; the values of tensors are read here, together."""
        total = self._hash.copy()
        total.update(byte_sums(self._tensors))
        return total.hexdigest()

    def _text(self, *parts: str) -> None:
        for part in parts:
            data = part.encode()
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def add(self, value: Any) -> None:
        """Adds a value, or an object with its parts; an object that was added before by number."""
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

    def _name(self, value: type | FunctionType) -> None:
        """Where a class or function is defined, and the version of its package."""
        module = value.__module__ or ""
        package = sys.modules.get(module.partition(".")[0])
        self._text(module, value.__qualname__, str(getattr(package, "__version__", "")))

    def _object(self, value: Any) -> None:
        if isinstance(value, list):
            self._items(value)
        elif isinstance(value, Mapping):
            self._text(type(value).__name__)
            self._items(tuple(value.items()))
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, type):
            self._name(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.add((value.__func__, value.__self__))
        elif isinstance(value, partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            digest = hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
            self._text("array", str(value.dtype), str(value.shape), digest)
        else:
            self._name(type(value))
            # other objects hold caches, locks, loggers, which change without changing features
            if dataclasses.is_dataclass(value):
                names = [f.name for f in dataclasses.fields(value)]
                self.add({name: getattr(value, name, None) for name in names})
            elif (
                isinstance(value, (SimpleNamespace, argparse.Namespace))
                or type(value).__name__.endswith("Config")
                or type(value).__module__.startswith("fasttta.")
            ):
                self.add(vars(value))
            else:  # tables of a helper of the model
                parts = getattr(value, "__dict__", {})
                self.add({n: x for n, x in parts.items() if isinstance(x, _VALUES)})

    def _module(self, module: nn.Module) -> None:
        self._name(type(module))
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

    def _function(self, function: FunctionType) -> None:
        """By name, with its default arguments and the values that it closes over."""
        self._name(function)
        if function.__name__ == "<lambda>":  # its line tells it from others beside it
            self.add(function.__code__.co_firstlineno)
        self.add((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # not filled yet
                self._text("empty")


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

"""What encoder outputs depend on, as digests: a model up to its fusion, and one sample."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import hashlib
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from numbers import Integral
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import __version__

FORMAT = 1
_PIECE = 65536
_PROBE = 64  # values of an input that are looked at where the sample has an id
_MODULE = frozenset(vars(nn.Module()))
_KNOWN = frozenset(("fasttta", "torch", "numpy")) | sys.stdlib_module_names
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_WRAPPERS = (partial, cached_property, staticmethod, classmethod, property)


def model_key(model: nn.Module, precision: str, dtype: str) -> str:
    """32 hex digits of everything that a model's ``encode`` depends on.

    Every weight and buffer in full (but the fusion's q, k, v or RAda's head, behind the encoders,
    so that all methods with frozen encoders agree), settings such as head counts, the code of
    classes that are neither PyTorch's nor ours, the spec and the cut found by it.

    Args:
        model: as the steps run it, in its precision, after its first batch.
        precision: its name.
        dtype: what features are stored in.
    """
    _remember([p for p in model.parameters() if not p.requires_grad])
    behind = set()
    group = "head" if hasattr(model, "head") else "fusion_qkv"
    for slot in model.tunable(group).values():
        path, _, leaf = slot.parameter.rpartition(".")
        behind.add((id(model.get_submodule(path)), leaf))
    contents = _Contents(behind)
    for value in (FORMAT, __version__, precision, dtype, model):
        contents.add(value)
    return contents.hash.hexdigest()


class _Contents:
    """A hash over objects, their parts and the code they run; addresses never enter it."""

    def __init__(self, behind: set[tuple[int, str]]) -> None:
        self.hash = hashlib.blake2b(digest_size=16)
        self._behind = behind
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an address in _seen stays taken

    def _text(self, *parts: str) -> None:
        for part in parts:
            data = part.encode()
            self.hash.update(len(data).to_bytes(8, "little") + data)

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self._text(type(value).__name__, repr(value))
        elif isinstance(value, Tensor):
            self._text("tensor", _digest(value))
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
            self._text("array", str(value.dtype), str(value.shape), _hex(value.tobytes()))
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
            if value is not None and isinstance(value, (FunctionType, *_PLAIN)):
                self._text(name)
                self.add(value)


def _known(module: str) -> bool:
    """Code that the versions of fasttta and PyTorch stand for."""
    return module.split(".")[0] in _KNOWN


# ---------------------------------------------------------------------- tensors

# place of a tensor -> (its storage, what it looked like, digest): the 660 MB of a ViT-B CAV-MAE
# take 0.5 s on one core of a 2.5 GHz Xeon, once for all methods on a model
_DIGESTS: dict[tuple, tuple[StorageWeakRef, tuple, str]] = {}


def _remember(tensors: Sequence[Tensor]) -> None:
    """Digests of many tensors at a time, on several cores (hashing releases the lock)."""
    for place in [place for place, (storage, *_) in _DIGESTS.items() if storage.expired()]:
        del _DIGESTS[place]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(_digest, tensors))


def _digest(x: Tensor) -> str:
    """Of type, shape and all values. Taken again only if the tensor may have changed: its version
    counter, or (for writes through ``.data``, which do not count) some of its values."""
    x = x.detach()
    storage = StorageWeakRef(x.untyped_storage())  # holds no memory, only the address
    place = (storage.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x.device)
    look = (None if x.is_inference() else x._version, _bytes(x.reshape(-1)[:: _step(x.numel())]))
    if place in _DIGESTS and _DIGESTS[place][1] == look:
        return _DIGESTS[place][2]
    digest = f"{x.dtype} {list(x.shape)} {_hex(_folded(_bytes(x.reshape(-1))))}"
    if not x.is_inference():
        _DIGESTS[place] = storage, look, digest
    return digest


def _step(values: int) -> int:
    return max(1, values // _PROBE)


def _bytes(x: Tensor) -> Any:
    """The values of a tensor [n] or [n, values], to be hashed without a copy; small ones as
    ``bytes``, which compare by value."""
    data = x.cpu().contiguous().view(torch.uint8).numpy()
    return data.tobytes() if data.nbytes <= 4096 else data


def _folded(data: Any) -> bytes:
    """CRC-32 of every 64 KB: 1.5 GB/s a core where blake2b reads 0.35 (2.5 GHz Xeon). One changed
    value is always noticed; several changes in one piece with all but a 2^-32 chance."""
    pieces = range(0, len(data), _PIECE)
    return b"".join(zlib.crc32(data[i : i + _PIECE]).to_bytes(4, "little") for i in pieces)


def _hex(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ---------------------------------------------------------------------- samples


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
        x = x if ids is None else x[:, :: _step(x.shape[1])]
        rows.append(x.cpu().contiguous().view(torch.uint8).numpy())
    keys = []
    for i, name in enumerate(named):
        digest = hashlib.blake2b(f"{len(name)} {name} {layout}".encode(), digest_size=16)
        for x in rows:
            digest.update(x[i])
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

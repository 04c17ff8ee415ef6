"""Zip archives of ``torch.save`` and ``torch.jit.save``, read for their tensors and never run."""

from __future__ import annotations

import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import inert_pickle
from .inert_pickle import Record, Refused, Storage, Unreadable

_MIB = 2**20
_MOST_MEMBERS = 200_000
_MOST_PICKLE = 256 * _MIB  # of data.pkl, which holds names and shapes
_MOST_CODE = 8 * _MIB  # of a file of TorchScript code, in which names of parameters are looked up
_MOST_RATIO = 200  # of a compressed member; weights are stored as they are
_MOST_NAMES = 100_000  # of a module's tensors: one module under many names has them many times
_PORTION = 16 * _MIB

# which attributes of a TorchScript class are parameters and buffers
_LISTED = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]$", re.M
)
_QUOTED = re.compile(r'"([^"]*)"')


class _Archive:
    """An open archive whose directory has been checked."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self.file, self.members = file, _checked_members(file, size)
        roots = [n[: -len("data.pkl")] for n in self.members if re.fullmatch(r"[^/]+/data\.pkl", n)]
        if len(roots) != 1:
            raise Refused(
                "a zip archive of NumPy arrays"
                if roots == [] and any(n.endswith(".npy") for n in self.members)
                else "a zip archive without a data.pkl, no checkpoint of torch.save"
                if not roots
                else "a zip archive with several data.pkl"
            )
        self.root = roots[0]
        self.swapped = self._other_byte_order()
        self.raw: dict[str, Tensor] = {}
        self.typed: dict[tuple[str, torch.dtype], Tensor] = {}
        self.listed: dict[str, dict[str, set[str]]] = {}

    def _other_byte_order(self) -> bool:
        name = self.root + "byteorder"
        if name not in self.members:
            return sys.byteorder != "little"
        order = self.text(name, 64)
        if order not in ("little", "big"):
            raise Refused(f"its byte order is {order[:20]!r}, needed 'little' or 'big'")
        return order != sys.byteorder

    def bytes_of(self, name: str, most: int) -> bytes:
        """The content of a member.

        Args:
            name: of the member.
            most: bytes that may be read.

        Raises:
            Refused: it is missing, or larger than ``most``, or far larger than what is stored.
        """
        if name not in self.members:
            raise Refused(f"{name.removeprefix(self.root)} is missing in the archive")
        size = self._size(name)
        if size > most:
            raise Refused(f"{name} is too large: {size:,} bytes, at most {most:,} are read")
        with self.file.open(name) as member:
            data = member.read(size + 1)
        if len(data) != size:
            raise Refused(f"{name} holds {len(data):,} bytes, the archive says {size:,}")
        return data

    def text(self, name: str, most: int) -> str:
        """The content of a member as text. Arguments and errors as of ``bytes_of``."""
        return self.bytes_of(name, most).decode("utf-8", errors="replace")

    def _size(self, name: str) -> int:
        member = self.members[name]
        if member.file_size > _MIB and member.file_size > _MOST_RATIO * member.compress_size:
            raise Refused(
                f"{name}: {member.compress_size:,} bytes would unpack to {member.file_size:,}"
            )
        return member.file_size

    def storage(self, identifier: Any) -> Storage | Unreadable:
        """The storage of a persistent identifier in data.pkl."""
        if not (isinstance(identifier, tuple) and len(identifier) >= 5):
            raise Refused("a storage has no name")
        _, kind, key, _, count = identifier[:5]
        if type(count) is not int or count < 0 or not isinstance(key, str):
            raise Refused("a storage has no name or no size")
        dtype = inert_pickle.storage_type(kind)
        if dtype is None:
            quantised = isinstance(kind, inert_pickle.Name) and kind.name.startswith("Q")
            return Unreadable("quantised" if quantised else "of an unknown type")
        memory = self._typed(key, dtype)
        if len(memory) < count:
            raise Refused(f"storage {key} holds {len(memory):,} values, needed {count:,}")
        return Storage(memory[:count])

    def _typed(self, key: str, dtype: torch.dtype) -> Tensor:
        if (key, dtype) not in self.typed:
            if key not in self.raw:
                self.raw[key] = self._read(f"{self.root}data/{key}")
            raw = self.raw[key]
            width = torch.empty((), dtype=dtype).element_size()
            raw = raw[: len(raw) // width * width]
            if self.swapped and width > 1:
                part = width // 2 if dtype.is_complex else width
                raw = raw.view(-1, part).flip(1).flatten()
            self.typed[key, dtype] = raw.view(dtype)
        return self.typed[key, dtype]

    def _read(self, name: str) -> Tensor:
        if name not in self.members:
            raise Refused(f"storage {name.removeprefix(self.root)} is missing")
        size = self._size(name)
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        view, position = memory.numpy().data, 0
        with self.file.open(name) as member:
            while portion := member.read(_PORTION):
                if position + len(portion) > size:
                    raise Refused(f"{name} is longer than the archive says")
                view[position : position + len(portion)] = portion
                position += len(portion)
        if position != size:
            raise Refused(f"{name} holds {position:,} bytes, the archive says {size:,}")
        return memory

    def tensors_of(self, record: Record) -> set[str] | None:
        """Attributes of a TorchScript class that are parameters or buffers; None: not listed."""
        path = f"{self.root}code/{record.name.module.replace('.', '/')}.py"
        if path not in self.listed:
            try:
                text = self.text(path, _MOST_CODE)
            except Refused:
                text = ""
            self.listed[path] = {
                name: {*_QUOTED.findall(parameters), *_QUOTED.findall(buffers)}
                for name, parameters, buffers in _LISTED.findall(text)
            }
        return self.listed[path].get(record.name.name)


def _checked_members(file: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    infos = file.infolist()
    if len(infos) > _MOST_MEMBERS:
        raise Refused(f"its zip archive has too many members ({len(infos):,})")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        if name != info.orig_filename or name.startswith("/") or "\\" in name or ":" in name:
            raise Refused(f"its zip archive has a member at {name[:80]!r}, outside the archive")
        if ".." in name.split("/"):
            raise Refused(f"its zip archive has a member at {name[:80]!r}, outside the archive")
        if name in members:
            raise Refused(f"its zip archive has {name[:80]!r} twice")
        if info.flag_bits & 1:
            raise Refused("its zip archive is encrypted")
        if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
            raise Refused(f"{name[:80]!r} has two sizes in its zip archive")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refused(f"{name[:80]!r} is compressed in an unusual way")
        members[name] = info
    if sum(info.compress_size for info in infos) > size:
        raise Refused("the members of its zip archive overlap")
    return members


def read_archive(path: str | os.PathLike) -> Any:
    """Reads a zip archive of ``torch.save`` or ``torch.jit.save``, without running code in it.

    Returns:
        The object that was saved, as ``inert_pickle.load`` has it; of a TorchScript module its
        state dict: parameters and buffers by their path. Tensors that shared memory do so still.

    Raises:
        Refused: the archive is damaged, needs code to be run, or announces more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as file:
            archive = _Archive(file, os.path.getsize(path))
            data = archive.bytes_of(archive.root + "data.pkl", _MOST_PICKLE)
            content = inert_pickle.load(data, archive.storage)
            if isinstance(content, Record) and inert_pickle.is_script(content.name):
                return _state_dict(content, archive)
            return content
    except Refused:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise Refused(f"its zip archive is damaged or truncated ({error})") from error
    except (ValueError, LookupError, RuntimeError, MemoryError, OverflowError,
            struct.error) as error:  # fmt: skip
        raise Refused(f"its archive is damaged ({type(error).__name__})") from error


def _state_dict(module: Record, archive: _Archive) -> dict[str, Any]:
    state: dict[str, Any] = {}
    opaque: list[str] = []
    for path, record in _modules(module):
        if not isinstance(record.state, dict):
            opaque.append(f"{path or 'the module itself'} ({record.name.name})")
            continue
        listed = archive.tensors_of(record)
        for name, value in record.state.items():
            is_tensor = isinstance(value, (Tensor, Unreadable)) and isinstance(name, str)
            if is_tensor and (listed is None or name in listed):
                state[f"{path}.{name}" if path else name] = value
                if len(state) > _MOST_NAMES:
                    raise Refused(f"a module holds more than {_MOST_NAMES:,} tensors")
    if not state:
        why = ""
        if opaque:
            why = f": {', '.join(opaque[:3])} is stored in a form that only its own code reads"
        raise Refused(f"no parameter was found in this TorchScript archive{why}")
    return state


def _modules(module: Record) -> Iterator[tuple[str, Record]]:
    """A module and those in it, by path; a module inside itself is an error."""
    waiting: list[tuple[str, Record, tuple[int, ...]]] = [("", module, ())]
    count = 0
    while waiting:
        path, record, above = waiting.pop()
        count += 1
        if id(record) in above or len(above) > 200 or count > _MOST_NAMES:
            raise Refused("a module holds itself")
        yield path, record
        if not isinstance(record.state, dict):
            continue
        inner = [
            (f"{path}.{name}" if path else str(name), value, (*above, id(record)))
            for name, value in record.state.items()
            if isinstance(value, Record) and inert_pickle.is_script(value.name)
        ]
        waiting += reversed(inner)

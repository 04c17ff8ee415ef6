"""Files that hold rows of one kind by name, with checksums; a file is never half written.

A shard is a safetensors file with one tensor for each row; its metadata hold each row's CRC-32 and
the type that it was computed in. The file's name consists of the kind and a digest of the file's
header: the name protects names, layout and checksums, and the checksums protect the values. There
is no index that could be lost or damaged: the folder is the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.result import warn

PART = ".part"
NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})\.safetensors")
_ROWS = 256  # at most, in one file
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Row(NamedTuple):
    """Where a row lies in a file."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    crc: int
    computed: torch.dtype  # before it was stored


class Damaged(Exception):
    """A file is not what its name says."""


class Shards:
    """Rows of one kind in a folder; the newest ones may still be in memory only.

    Args:
        folder: a folder that exists.
        kind: 32 hex digits; rows of other kinds are left alone.
        full: bytes of new rows at which a file is written.
    """

    def __init__(self, folder: Path, kind: str, full: float) -> None:
        self.folder, self.kind, self.full = folder, kind, full
        self._rows: dict[str, Row] = {}
        self._files: set[str] = set()
        self._new: dict[str, tuple[Tensor, torch.dtype]] = {}
        self._size = 0

    def read(self, names: list[str]) -> tuple[Tensor | None, list[int], torch.dtype | None]:
        """Rows [n, ...] in the type that they are stored in, the positions that are missing, whose
        values are undefined, and the type that they were computed in. Checksums are compared at
        every reading: 1.5 GB/s (2.5 GHz Xeon)."""
        if any(name not in self._rows and name not in self._new for name in names):
            self.scan()
        either = {i: self._new.get(name) or self._rows.get(name) for i, name in enumerate(names)}
        stored = {i: row for i, row in either.items() if row is not None}
        kinds = {
            (r.dtype, r.shape, r.computed) if isinstance(r, Row) else (r[0].dtype, r[0].shape, r[1])
            for r in stored.values()
        }
        if len(kinds) != 1:  # none, or rows that were never part of one batch
            return None, list(range(len(names))), None
        dtype, shape, computed = kinds.pop()
        rows = torch.empty((len(names), *shape), dtype=dtype, device="cpu")
        bytes_ = rows.view(len(names), -1).view(torch.uint8).numpy()  # [n, bytes], shared
        in_files: dict[str, dict[int, Row]] = {}
        for i, row in stored.items():
            if isinstance(row, Row):
                in_files.setdefault(row.file, {})[i] = row
            else:
                rows[i] = row[0]
        for file, positions in in_files.items():
            if not self._read_file(file, positions, bytes_):
                stored = {i: row for i, row in stored.items() if i not in positions}
        return rows, [i for i in range(len(names)) if i not in stored], computed

    def _read_file(self, file: str, rows: dict[int, Row], into) -> bool:
        try:
            with open(self.folder / file, "rb") as stream:
                for i, row in rows.items():
                    stream.seek(row.offset)
                    if stream.readinto(into[i]) != into[i].nbytes:
                        raise Damaged("it ends too early")
                    if zlib.crc32(into[i]) != row.crc:
                        raise Damaged("the checksum of a row is not the recorded one")
        except FileNotFoundError:  # removed by another process, or by the user
            self._forget(file)
            return False
        except (Damaged, OSError) as error:
            self._remove(file, error)
            return False
        return True

    def scan(self) -> None:
        """Adds the files that other processes have written since."""
        for file in sorted(os.listdir(self.folder)):
            match = NAME.fullmatch(file)
            if match and match[1] == self.kind and file not in self._files:
                try:
                    self._take(file)
                except FileNotFoundError:
                    continue
                except (Damaged, OSError) as error:
                    self._remove(file, error)

    def _take(self, file: str) -> None:
        """Adds a file's rows, but those that another file has."""
        with open(self.folder / file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = stream.read(8)
            start = 8 + int.from_bytes(length, "little")
            text = stream.read(start - 8) if start <= size else b""
        name = NAME.fullmatch(file)
        if name is None or name[2] != _digest(length + text):
            raise Damaged("its header does not belong to its name")
        header = json.loads(text)
        about = json.loads(header.pop("__metadata__")["fasttta"])
        if about["kind"] != self.kind:
            raise Damaged(f"it holds features of kind {about['kind']}")
        if start + max(entry["data_offsets"][1] for entry in header.values()) != size:
            raise Damaged(f"it is {size} bytes long, which is not what its header says")
        for name, entry in header.items():
            crc, computed = about["rows"][name]
            row = Row(
                file, start + entry["data_offsets"][0], _DTYPES[entry["dtype"]],
                tuple(entry["shape"]), crc, getattr(torch, computed),
            )  # fmt: skip
            self._rows.setdefault(name, row)
        self._files.add(file)

    def _forget(self, file: str) -> None:
        self._rows = {name: row for name, row in self._rows.items() if row.file != file}
        self._files.discard(file)

    def _remove(self, file: str, error: Exception) -> None:
        """Removes a file that cannot be used, with a warning; its rows are missing from now on."""
        self._forget(file)
        path = self.folder / file
        warn(
            f"the feature shard {os.fspath(path)!r} is damaged ({error}); it is removed and its "
            "samples are encoded again",
            RuntimeWarning,
        )
        try:
            path.unlink(missing_ok=True)
        except OSError:
            self._files.add(file)  # not to be looked at again

    def add(self, names: list[str], rows: Tensor, computed: torch.dtype) -> None:
        """Keeps rows [n, ...] on the CPU, without those that hold a value that is not finite."""
        finite = torch.isfinite(rows).view(len(rows), -1).all(dim=1).tolist()
        for name, row, usable in zip(names, rows, finite, strict=True):
            if usable:
                self._new[name] = row.clone(), computed
                self._size += row.nbytes
            if self._size >= self.full or len(self._new) >= _ROWS:
                self.flush()

    def flush(self) -> None:
        """Writes rows that are in memory only. Where that fails they are dropped with a warning:
        a prediction does not need them."""
        new, self._new, self._size = self._new, {}, 0
        if not new:
            return
        from safetensors.torch import save

        checks = {
            name: (_crc(row), str(computed).removeprefix("torch."))
            for name, (row, computed) in new.items()
        }
        about = {"fasttta": json.dumps({"kind": self.kind, "rows": checks})}
        data = save({name: row for name, (row, _) in new.items()}, about)
        file = f"{self.kind}-{_digest(data[: 8 + int.from_bytes(data[:8], 'little')])}.safetensors"
        part = self.folder / f"{uuid.uuid4().hex}{PART}"
        try:
            try:
                with open(part, "xb") as out:
                    out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(part, self.folder / file)
                _sync(self.folder)
            finally:
                part.unlink(missing_ok=True)
            self._take(file)
        except (OSError, Damaged) as error:
            warn(
                f"the features of {len(new)} samples were not kept in "
                f"{os.fspath(self.folder)!r}: {error}",
                RuntimeWarning,
            )


def _crc(row: Tensor) -> int:
    return zlib.crc32(row.view(-1).view(torch.uint8).numpy().data)


def _digest(header: bytes) -> str:
    return hashlib.blake2b(header, digest_size=16).hexdigest()


def _sync(folder: Path) -> None:
    """Makes sure that a rename survives a power cut."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_parts(folder: Path, seconds: float) -> None:
    """Removes half-written files of killed processes: those that nobody has written to for long."""
    for path in folder.glob(f"*{PART}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > seconds:
                path.unlink()

"""A folder with a saved state: a record and a tensor file, replaced together or not at all.

Several processes may save into a folder and load from it at the same time. Every file is written
under a unique name, then moved; the record, moved last, names the tensor file. Writers take
turns by a lock on the folder where the filesystem has one, and clear away the files of killed ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from . import record as records
from .interrupts import surely

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RECORD = "fasttta.json"
# what saves write, this version's and those of format 1
_TENSORS = re.compile(r"state-[0-9a-f]{12}(-[0-9a-f]{12})?\.safetensors")
_PARTS = re.compile(
    r"state-[0-9a-f]{12}(-[0-9a-f]{12})?\.safetensors\.part|fasttta\.json(-[0-9a-f]{12})?\.part"
)
_PATIENCE = 60.0  # seconds that a save waits for others before it goes on without the lock
_OLD = 3600.0  # seconds; without a lock a younger file may be another writer's
_ATTEMPTS = 50  # of a load to find a record and its tensors together


class MissingTensorsError(FileNotFoundError, ValueError):
    """A record without the file that it names."""


def write(
    folder: str | os.PathLike[str], record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a record and its tensors; an earlier save stays complete until both are there.

    Raises:
        ValueError: the record cannot be written as JSON.
        OSError: the folder cannot be written to.
    """
    from safetensors.torch import save

    folder, mark = Path(folder), uuid.uuid4().hex[:12]
    digest = records.tensors_digest(tensors)
    name = f"state-{digest[:12]}-{mark}.safetensors"
    text = records.written({**record, "state": name, "sha256": digest})
    data = save(dict(tensors))
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder / f"{name}.part", folder / f"{RECORD}-{mark}.part"
    with _turn(folder) as alone, surely(functools.partial(_remove, parts)):
        _write(parts[0], data)
        os.replace(parts[0], folder / name)
        _flush(folder)
        _write(parts[1], text.encode())
        os.replace(parts[1], folder / RECORD)
        _flush(folder)
        _clear(folder, name, alone)


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Flushes the folder, so that moves in it survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        _Place(folder).flush()


def _remove(paths: tuple[Path, ...]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _clear(folder: Path, current: str, alone: bool) -> None:
    """Removes what earlier and killed saves left, by the names that only saves give.

    Args:
        alone: no other writer is at work; else only old files are removed.
    """
    with contextlib.suppress(OSError):
        now = (folder / RECORD).stat().st_mtime
        for path in folder.iterdir():
            if path.name == current or not (
                _PARTS.fullmatch(path.name) or _TENSORS.fullmatch(path.name)
            ):
                continue
            with contextlib.suppress(OSError):
                if alone or now - path.stat().st_mtime > _OLD:
                    path.unlink()


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[bool]:
    """Waits for other writers; whether there is a lock. It goes with the process that holds it."""
    place = None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            place = _Place(folder)
    if place is None:
        yield False
        return
    with surely(place.close):
        yield place.lock()


class _Place:
    """An open folder, closed at the latest when nobody holds it."""

    def __init__(self, folder: Path) -> None:
        self._number: int | None = os.open(folder, os.O_RDONLY)

    def _open(self) -> int:
        assert self._number is not None  # close() has not run
        return self._number

    def lock(self) -> bool:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(self._open(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    return False
                time.sleep(0.005)
            except OSError:  # a filesystem without locks
                return False
            else:
                return True

    def flush(self) -> None:
        os.fsync(self._open())

    def close(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            os.close(number)

    __del__ = close


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of a saved state. Nothing is written, and no lock is taken.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: a file is damaged, missing or of another format; names the file.
    """
    folder = Path(folder)
    for _ in range(_ATTEMPTS):
        record, name = _record(folder)
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            # a later save may have come between: then the record names another file by now
            if _record(folder)[1] == name:
                raise MissingTensorsError(f"{folder}: {name} is missing") from None
            continue
        return record, _tensors(folder / name, record, data)
    raise FileNotFoundError(
        f"{os.fspath(folder)!r}: other saves replaced the files {_ATTEMPTS} times while they were "
        "read; load again"
    )


def _record(folder: Path) -> tuple[dict[str, Any], str]:
    """The record, and the name of its tensor file."""
    path = folder / RECORD
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no saved state in {os.fspath(folder)!r}: no {RECORD}") from None
    with naming(path):
        record = records.read(text)
        name = record.get("state")
        if name is None or not _TENSORS.fullmatch(name):
            raise ValueError(f"state: needed the name of a tensor file, found {name!r:.80}")
    return record, name


def _tensors(path: Path, record: Mapping[str, Any], data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    with naming(path):
        if record["format"] == 1 and sha256(data).hexdigest() != record["sha256"]:
            raise ValueError("is damaged: its checksum is not the recorded one")
        try:
            tensors = load(data)
        except Exception as error:  # safetensors raises exceptions of several kinds
            raise ValueError(f"is damaged: {error}") from error
        if record["format"] != 1 and records.tensors_digest(tensors) != record["sha256"]:
            raise ValueError("is damaged: its checksum is not the recorded one")
    return tensors


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Errors of the block about values are ValueErrors that begin with the name of a file."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{what}: {error}") from error

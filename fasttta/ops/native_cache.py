"""Keeps the built C++ library: in a folder that only the user can write, with a checksum."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# behind the library's own bytes, where loaders do not look: one file is replaced in one move
_MARK = b"\nfasttta sha256 "
_TRAILER = len(_MARK) + 64
_PATIENCE = 300.0  # seconds that another process may take to build (17 s on two cores)
#: what a folder of others, or a read-only one, says
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def wanted_folder() -> Path | None:
    """Names ``$FASTTTA_CACHE/native``, else ``fasttta/native`` in ``$XDG_CACHE_HOME`` or
    ``~/.cache``; None: the user has no home (a container without a passwd entry)."""
    if named := os.environ.get("FASTTTA_CACHE"):
        return Path(named).absolute() / "native"
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "fasttta" / "native"
    try:
        return Path.home().absolute() / ".cache" / "fasttta" / "native"
    except (RuntimeError, KeyError, OSError):
        return None


def distrust(path: Path) -> str | None:
    """Says why others may have written a folder or file; None: only this user can.

    Symbolic links are followed. Folders above it may not be writable by all, unless they are
    sticky as /tmp is.

    Raises:
        OSError: it is not there.
    """
    if not hasattr(os, "geteuid"):
        return None
    path = path.resolve(strict=True)
    status = path.stat()
    if status.st_uid != os.geteuid():
        return f"{path} belongs to uid {status.st_uid}, this process runs as {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path} (mode {stat.S_IMODE(status.st_mode):o}); chmod go-w it"
    for above in path.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"others may write to {above} (mode {stat.S_IMODE(mode):o})"
    return None


def _make(folder: Path) -> None:
    """Makes a folder, and those above it, that only this user can use."""
    for part in reversed((folder, *folder.parents)):
        if not part.exists():
            with contextlib.suppress(FileExistsError):
                part.mkdir(mode=0o700)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the cache is no folder", str(folder))


@functools.cache
def private_folder() -> Path:
    """A folder for temporary files that is the user's alone: the same one in every process, or,
    where that name is taken by others, a new one."""
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"fasttta-{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_symlink() and distrust(folder) is None and os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="fasttta-"))


def folder_and_reason(make: bool = True) -> tuple[Path, str | None]:
    """The folder that is used, and the reason why it is not the wanted one; None: it is.

    Args:
        make: makes the folder if it is not there.

    Raises:
        OSError: the wanted one cannot be a folder, or there is no place for temporary files.
    """
    wanted = wanted_folder()
    if wanted is None:
        return private_folder(), "this user has no home folder"
    try:
        if not make and not wanted.exists():
            return wanted, None
        _make(wanted)
        reason = distrust(wanted)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        reason = f"{wanted} cannot be written: {error.strerror}"
    return (wanted, None) if reason is None else (private_folder(), reason)


def is_intact(path: Path) -> bool:
    """Whether a library is there, only this user can write it, and its checksum is right."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_file() or distrust(path) is not None:
            return False
        data = path.read_bytes()
        body, trailer = data[:-_TRAILER], data[-_TRAILER:]
        return bool(body) and trailer == _MARK + hashlib.sha256(body).hexdigest().encode()
    return False


def store(built: Path, target: Path) -> None:
    """Moves a built library to its place, with its checksum, in one step.

    After a power failure either the old file or the complete new one is there.
    """
    body = built.read_bytes()
    with built.open("ab") as file:
        file.write(_MARK + hashlib.sha256(body).hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
    built.chmod(0o700)
    os.replace(built, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time into the block.

    The system releases the lock of a process that dies. For one that hangs others wait five
    minutes, then go on: two builds at once do no harm.
    """
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(file)

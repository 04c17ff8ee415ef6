"""Reads files of tensors from outside: their first bytes say the kind, no code in them is run."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
from typing import Any

import torch
from torch import Tensor

from . import inert_pickle
from .archive import read_archive
from .inert_pickle import Refused, Storage

_MOST_PICKLE = 2**31  # bytes of a plain pickle, tensors included; statistics have a few MB
# the first pickle of a file of torch.save before version 1.6
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer (the file itself was not downloaded)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"BZh", "a bzip2 file; unpack it first"),
    (b"\xfd7zXZ", "an xz file; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"RIFF", "a RIFF file (audio, video or image)"),
    (b"\x7fELF", "a program or library"),
    (b"MZ", "a program or library"),
)
_ADVICE = (
    "Where it was made, save the weights alone: torch.save(model.state_dict(), path), or "
    "safetensors"
)


def describe(path: str | os.PathLike) -> str:
    """The kind of a file that is no checkpoint, by its first bytes; for messages."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    for start, kind in _KINDS:
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "a damaged or truncated pickle"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        if text[:1] in (b"{", b"["):
            return "a JSON file"
        if text[:1] == b"<":
            return "an HTML or XML page (a download that asked to be confirmed?)"
        return "a text file"
    return "of no known kind, damaged or truncated"


def regular_file(path: Any, what: str) -> str:
    """The name of a regular file.

    Args:
        path: of the file.
        what: the content that it should have, for messages.

    Raises:
        TypeError: it is not a path.
        FileNotFoundError: nothing is there.
        ValueError: it is a folder, or no regular file.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        kind = type(path).__name__
        hint = ""
        if hasattr(path, "read"):
            hint = "; of an open file give its path, or torch.load(file, weights_only=True)"
        raise TypeError(f"needed a path or a state dict, found {kind}{hint}")
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"no {what} at {name!r}")
    mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        raise ValueError(f"{name!r} is a folder; needed a {what} file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name!r} is no regular file; needed a {what} file")
    return name


def _looks_like_safetensors(head: bytes) -> bool:
    """safetensors begins with the length of a JSON header; torch files with PK or a pickle."""
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**40


def read_file(path: str | os.PathLike, what: str = "checkpoint") -> Any:
    """Reads a checkpoint on the CPU, without running code that it holds.

    Formats: safetensors; ``torch.save``, new and old; ``torch.jit.save``; a plain pickle of
    tensors.

    Args:
        path: of the file.
        what: the content that it should have, for messages.

    Returns:
        The object in the file; of ``torch.jit.save`` its state dict.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
        TypeError: it is no path.
    """
    name = regular_file(path, what)
    with open(name, "rb") as file:
        head = file.read(64)
    try:
        with torch.inference_mode(False):
            if _looks_like_safetensors(head):
                return _safetensors(name)
            if head[:2] == b"PK":
                return read_archive(name)
            if head[:1] == b"\x80" and _LEGACY in head:
                return _legacy(name)
            if head[:1] == b"\x80" and head[1:2] <= b"\x05":
                return _plain_pickle(name)
    except Refused as error:
        raise ValueError(
            f"{name!r} is damaged, truncated or not a plain checkpoint of tensors, and was not "
            f"run: {_reason(str(error))}. {_ADVICE}"
        ) from None
    raise ValueError(
        f"{name!r} is {describe(name)}; needed a {what} file: safetensors, or what torch.save "
        "made (it may be damaged or truncated)"
    )


def _reason(refused: str) -> str:
    """Why a pickle was refused."""
    named = re.fullmatch(r"it names (\S+)\.(\w+)", refused)
    if named and named[2][:1].isupper():
        return f"it holds an object of the class {named[1]}.{named[2]}"
    if named:
        return f"it would call {named[1]}.{named[2]}"
    return refused


def _safetensors(name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(name)
    except (SafetensorError, KeyError, ValueError, RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name!r} is a damaged safetensors file: {reason}") from error


def _legacy(source: str | io.BytesIO) -> Any:
    """Reads a file of ``torch.save`` before version 1.6, with PyTorch's restricted reader."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may fail anywhere in torch's readers
        unsupported = re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error))
        if unsupported:
            raise Refused(f"it names {unsupported[1] or unsupported[2]}") from error
        line = str(error).split("\n")[0]
        told = line and "weights_only" not in line
        raise Refused(line if told else "PyTorch's reader of tensors alone refuses it") from error


def _plain_pickle(name: str) -> Any:
    """Reads a dict of tensors that ``pickle.dump`` wrote: each storage is a file inside it."""
    if os.path.getsize(name) > _MOST_PICKLE:
        raise Refused("a plain pickle of more than 2 GiB is not read")
    with open(name, "rb") as file:
        data = file.read()

    def nested(stored: bytes) -> Storage:
        if _LEGACY not in stored[:64]:
            raise Refused("a tensor's values were not written by torch.save")
        storage = _legacy(io.BytesIO(stored))
        if not isinstance(storage, torch.storage.TypedStorage):
            raise Refused("a tensor is stored as something other than a storage")
        memory = torch.empty(0, dtype=storage.dtype, device="cpu")
        return Storage(memory.set_(storage._untyped_storage, 0, (storage._size(),), (1,)))

    return inert_pickle.load(data, nested=nested)

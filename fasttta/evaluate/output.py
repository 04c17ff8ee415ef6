"""Writes a file completely or not at all; checks before the work that it can be written."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any


def check_output(path: str | os.PathLike, name: str = "path") -> Path:
    """The path of a file to be written later, once it is clear that it can be.

    Raises:
        ValueError: it is a folder.
        FileNotFoundError, PermissionError: its folder does not exist or cannot be written to.
    """
    target = Path(path)
    if target.is_dir() or not target.name:
        raise ValueError(f"{name}={os.fspath(path)!r} is a folder; needed the name of a file in it")
    _check_folder(target.parent, f"{name}={os.fspath(path)!r}")
    return target


def check_folder(path: str | os.PathLike, name: str = "folder") -> Path:
    """The path of a folder to be filled later; it need not exist, but its parent must.

    Raises:
        ValueError: there is something that is not a folder.
        FileNotFoundError, PermissionError: it cannot be made or written to.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name}={os.fspath(path)!r} is a file; needed a folder, or a free name")
    _check_folder(target if target.exists() else target.parent, f"{name}={os.fspath(path)!r}")
    return target


def _check_folder(folder: Path, what: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{what}: there is no folder {os.fspath(folder)!r}; make it first: "
            f"mkdir -p {os.fspath(folder)}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{what}: no permission to write into {os.fspath(folder)!r}")


def check_extra() -> None:
    """Raises ModuleNotFoundError, a subclass of ImportError, where reports cannot be made."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"reports and their charts need {' and '.join(missing)}; type: "
            "pip install 'fasttta[report]' (tables and JSON need nothing)"
        )


def as_json(data: Any) -> str:
    """Indented JSON with lists of numbers on one line each. NaN and infinities, which JSON does
    not have, become null."""
    plain = json.loads(json.dumps(data), parse_constant=lambda name: None)  # tuples, keys
    return _text(plain, "\n")


def _text(value: Any, margin: str) -> str:
    """A value of JSON as text; ``margin`` begins the lines that follow its first one."""
    if isinstance(value, dict) and value:
        inner = f"{margin} "
        parts = (f"{json.dumps(key)}: {_text(each, inner)}" for key, each in value.items())
        return "{" + inner + f",{inner}".join(parts) + margin + "}"
    if isinstance(value, list) and any(isinstance(each, (str, list, dict)) for each in value):
        inner = f"{margin} "
        return "[" + inner + f",{inner}".join(_text(each, inner) for each in value) + margin + "]"
    return json.dumps(value)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file such that a reader sees all of it or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

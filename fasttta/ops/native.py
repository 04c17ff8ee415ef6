"""The C++ kernels: built once on the first use on a CPU, cached, loaded into the dispatcher.

The library is built against PyTorch's stable ABI for this very processor and kept in
``$FASTTTA_CACHE`` (else ``$XDG_CACHE_HOME/fasttta``, ``~/.cache/fasttta``) under a key of
everything that goes into it: sources, flags, compiler, PyTorch, processor (``native_build``). The
folder must be the user's alone, or a private one is used; a library that has changed since it was
written is built again (``native_cache``). A wheel may carry one, which is used where it fits
(``native_prebuilt``). A build says how long it takes (``first_use``). ``FASTTTA_NATIVE`` says what
happens:

``auto``     build if need be; where that fails, warn once, PyTorch calls serve (the default)
``off``      never build nor load
``require``  failing to build is an error
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import first_use, native_cache, native_prebuilt
from .native_build import BuildError, build, compiler, library_name, ninja

#: Operators that the library has kernels of; ``registry.define`` adds to it.
NAMES: list[str] = []
#: Whether the library is loaded: ``native.loaded or native.load()`` calls nothing once it is.
loaded = False

_MODES = ("auto", "off", "require")
_BUILDS = "builds its C++ kernels for this processor, once a version (half a minute if idle)"
_log = logging.getLogger("fasttta")
_threads = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """The result of loading: the library's path, or the reason why there is none."""

    path: Path | None
    reason: str = ""


_outcome: Outcome | None = None


def mode() -> str:
    """The value of ``FASTTTA_NATIVE``: auto, off or require.

    Raises:
        ValueError: it is something else.
    """
    setting = os.environ.get("FASTTTA_NATIVE", "auto")
    if setting not in _MODES:
        raise ValueError(f"FASTTTA_NATIVE={setting!r} is unknown; known: {', '.join(_MODES)}")
    return setting


def cache_folder() -> Path:
    """The folder of built libraries, which need not exist."""
    return native_cache.folder_and_reason(make=False)[0]


def cache_note() -> str | None:
    """Says why ``cache_folder`` is not the one that was asked for; None: it is."""
    return native_cache.folder_and_reason(make=False)[1]


def _library(rebuild: bool = False) -> Path:
    """The library's path: the wheel's if it fits, else one that is built if it is not there and
    intact, or (``rebuild``) in any case."""
    prebuilt, misfit = native_prebuilt.find()
    if prebuilt is not None and not rebuild:
        return prebuilt
    if misfit is not None:
        _log.info("the C++ library of the wheel is not used: %s", misfit)
    also = "" if misfit is None else f" (the library of the wheel is not used: {misfit})"
    chosen, ninja_path = compiler(), ninja()
    if chosen is None:
        wanted = os.environ.get("CXX", "c++, g++ or clang++")
        raise BuildError(f"no C++ compiler: {wanted} is not on PATH{also}")
    if ninja_path is None:
        raise BuildError(f"no ninja: type pip install ninja{also}")
    name = library_name(chosen)
    folder, reason = native_cache.folder_and_reason()
    path = folder / name
    try:
        _build_if_needed(chosen, ninja_path, path, rebuild)
    except OSError as error:
        if reason is not None or error.errno not in native_cache.UNWRITABLE:
            raise
        reason = f"{folder} cannot be written: {error.strerror}"
        path = native_cache.private_folder() / name
        _build_if_needed(chosen, ninja_path, path, rebuild)
    if reason is not None:
        _tell_folder(str(path.parent), reason)
    return path


def _build_if_needed(compiler: str, ninja_path: str, path: Path, rebuild: bool) -> None:
    if not rebuild and native_cache.is_intact(path):
        return
    with (
        # also while another process builds it
        first_use.telling("library", str(path), _BUILDS, "built the C++ kernels") as library,
        native_cache.locked(path.with_suffix(".lock")),
    ):
        if not rebuild and native_cache.is_intact(path):  # another process has built it
            library.made = False
        else:
            build(compiler, ninja_path, path)


def _open(path: Path) -> None:
    """Loads a library into the dispatcher.

    Raises:
        BuildError: it does not load, or registers nothing.
    """
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in sorted(NAMES) if not has_kernel(f"fasttta::{name}", "CPU")]
    if missing:
        _close(path)
        raise BuildError(f"{path} has no kernel of {', '.join(missing[:3])}")


def _close(path: Path) -> None:
    """Unloads a library, or the loader would take a new one of that name for the same."""
    import _ctypes

    library = ctypes.CDLL(str(path))
    for _ in range(2):  # this opening, and PyTorch's
        _ctypes.dlclose(library._handle)


def attempt() -> Outcome:
    """Loads the library, in the first call only, and returns the result.

    A library that does not load, or registers nothing, is built again once.
    """
    global _outcome, loaded
    wanted = mode()
    # without the lock, which a call that is interrupted here would keep for ever
    if (outcome := _outcome) is not None:
        return outcome
    with _threads:
        if _outcome is None:
            try:
                if wanted == "off":
                    raise BuildError("FASTTTA_NATIVE=off")
                path = _library()
                try:
                    _open(path)
                except BuildError as error:
                    _log.warning("%s; it is built again", error)
                    _open(_library(rebuild=True))
                _outcome, loaded = Outcome(path), True
            except Exception as problem:  # whatever it is, PyTorch's own operations serve
                reason = str(problem) or type(problem).__name__
                _outcome = Outcome(None, reason)
        return _outcome


@functools.cache
def _tell_folder(folder: str, reason: str) -> None:
    if mode() == "auto":
        warnings.warn(
            f"fasttta keeps its C++ kernels in {folder}: {reason}\n"
            "FASTTTA_CACHE=folder names another place.",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.cache
def _tell(reason: str) -> None:
    if mode() == "auto":
        warnings.warn(
            f"fasttta runs without its C++ kernels, slower: {reason}\n"
            "FASTTTA_NATIVE=off silences this.",
            RuntimeWarning,
            stacklevel=2,
        )


def load() -> bool:
    """Whether the C++ kernels are loaded; loads them if that was not tried.

    Raises:
        RuntimeError: there are none and FASTTTA_NATIVE=require.
        ValueError: FASTTTA_NATIVE is none of auto, off, require.
    """
    outcome = attempt()
    if outcome.path is None:
        if mode() == "require":
            raise RuntimeError(f"FASTTTA_NATIVE=require: {outcome.reason}")
        _tell(outcome.reason)
    return outcome.path is not None

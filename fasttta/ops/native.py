"""The C++ kernels: built once on the first use on a CPU, cached, loaded into the dispatcher.

The library is built against PyTorch's stable ABI for this very processor and kept in
``$FASTTTA_CACHE`` (else ``$XDG_CACHE_HOME/fasttta``, ``~/.cache/fasttta``) under a key of
everything that goes into it: sources, flags, compiler, PyTorch, processor. The folder must be
the user's alone, or a private one is used; a library that has changed since it was written is
built again (``native_cache``). ``FASTTTA_NATIVE`` says what happens:

``auto``     build if need be; where that fails, warn once, PyTorch calls serve (the default)
``off``      never build nor load
``require``  failing to build is an error
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from . import native_cache

#: Operators that the library has kernels of; ``registry.define`` adds to it.
NAMES: list[str] = []
#: Whether the library is loaded: ``native.loaded or native.load()`` calls nothing once it is.
loaded = False

_MODES = ("auto", "off", "require")
_TORCH = Path(torch.__file__).parent
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden",
    # vectorised loops with reassociated sums where a pragma allows it; not -ffast-math, which at
    # link time would flush denormals in the whole process, and would hide nan
    "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # what torch 2.10 has
)  # fmt: skip
_NINJA = """\
rule compile
  command = {compiler} {flags} -isystem {include} -c $in -o $out
rule link
  command = {compiler} -shared $in -o $out {link}
"""

_log = logging.getLogger("fasttta")
_threads = threading.Lock()


class BuildError(RuntimeError):
    """Says why there are no C++ kernels."""


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


def _words(command: str) -> list[str]:
    """A compiler's path, which may have spaces, or a command with arguments."""
    if shutil.which(command):
        return [command]
    try:
        return shlex.split(command)
    except ValueError:  # a quote that does not end
        return [command]


def compiler() -> str | None:
    """The C++ compiler's path, or its command where it has arguments: ``$CXX``, else the first of
    c++, g++, clang++."""
    named = os.environ.get("CXX")
    for command in [named] if named and named.strip() else ["c++", "g++", "clang++"]:
        program, *arguments = _words(command)
        if path := shutil.which(program):
            return shlex.join([path, *arguments]) if arguments else path
    return None


def ninja() -> str | None:
    """Path of ninja: the Python package's, else the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        lines = set(Path("/proc/cpuinfo").read_text().splitlines())
        return "\n".join(sorted(x for x in lines if x.startswith(("flags", "model name", "Feat"))))
    return platform.processor()


def _flags() -> tuple[str, ...]:
    capability = torch.backends.cpu.get_cpu_capability()
    # compilers prefer 256 bits; these loops are 1.3x faster with 512 (Xeon 2.5 GHz, g++ 12)
    return (*_FLAGS, "-mprefer-vector-width=512") if "AVX512" in capability else _FLAGS


def _sources() -> list[Path]:
    folder = Path(str(resources.files("fasttta.csrc")))
    return sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".h"))


def version(compiler: str) -> str:
    """A compiler's answer to ``--version``."""
    command = [*_words(compiler), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def library_name(compiler: str) -> str:
    """File name of the library that a compiler makes here, a hash of everything it depends on."""
    parts = [version(compiler), torch.__version__, platform.machine(), _processor(), *_flags()]
    parts += _words(compiler)[1:]
    parts += [x for source in _sources() for x in (source.name, source.read_text())]
    return f"fasttta-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"


def _quoted(*words: object) -> str:
    """Words of a shell command in a ninja file."""
    return shlex.join(map(str, words)).replace("$", "$$")


def _build(compiler: str, ninja_path: str, target: Path) -> None:
    """Builds in a temporary folder, then moves the library to its place in one step."""
    for leftover in target.parent.glob(f"{target.stem}-*"):  # of an interrupted build
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}-", dir=target.parent))
    for source in _sources():
        shutil.copy(source, folder)
    units = sorted(p.stem for p in folder.glob("*.cpp"))
    if sys.platform == "darwin":
        link = "-undefined", "dynamic_lookup"
    else:
        link = f"-L{_TORCH / 'lib'}", "-ltorch_cpu"
    rules = _NINJA.format(
        compiler=_quoted(*_words(compiler)),
        flags=" ".join(_flags()),
        include=_quoted(_TORCH / "include"),
        link=_quoted(*link),
    )
    rules += "".join(f"build {unit}.o: compile {unit}.cpp\n" for unit in units)
    rules += f"build library.so: link {' '.join(f'{unit}.o' for unit in units)}\n"
    (folder / "build.ninja").write_text(rules)
    command = [ninja_path, "-C", str(folder)]
    build = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if build.returncode == 0:
        native_cache.store(folder / "library.so", target)
    shutil.rmtree(folder, ignore_errors=True)
    if build.returncode:
        log, text = target.with_suffix(".log"), build.stdout + build.stderr
        log.write_text(text)
        lines = [x for x in text.splitlines() if "error" in x]
        raise BuildError(f"{compiler} failed: {(lines or ['no error message'])[0]} (see {log})")


def _library(rebuild: bool = False) -> Path:
    """The library's path; builds it if it is not there and intact, or (``rebuild``) in any case."""
    chosen, ninja_path = compiler(), ninja()
    if chosen is None:
        wanted = os.environ.get("CXX", "c++, g++ or clang++")
        raise BuildError(f"no C++ compiler: {wanted} is not on PATH")
    if ninja_path is None:
        raise BuildError("no ninja: type pip install ninja")
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
    with native_cache.locked(path.with_suffix(".lock")):
        if rebuild or not native_cache.is_intact(path):  # another process may have built it
            start = time.perf_counter()
            _build(compiler, ninja_path, path)
            _log.info("built the C++ kernels in %.1f s: %s", time.perf_counter() - start, path)


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

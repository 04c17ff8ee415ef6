"""Builds and loads the C++ that lets fake tensors lie on a GPU where there is none.

``build`` runs in any process. ``load`` registers a device guard for a whole process, before that
imports torch, and cannot be taken back: it is for a process that does nothing but count. Nothing
here imports torch before it is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared")
_BUILDS = "builds the C++ library that stands in for a GPU, once a version of PyTorch (15 s)"
_NEEDED = "counting a GPU's step without a GPU needs a small C++ library"


def build() -> Path | None:
    """The shim's path, in the cache of built libraries; builds it there, 15 s, the first time.

    Returns:
        None where there is a GPU: fake tensors need no shim.

    Raises:
        OSError: there is no C++ compiler, or it fails; the message says what to do.
    """
    import torch

    from ..ops import native_build, native_cache

    if torch.cuda.is_available():
        return None
    compiler = native_build.compiler()
    if compiler is None:
        raise OSError(
            f"{_NEEDED}, and there is no compiler: c++, g++ and clang++ are not on PATH; install "
            "one (Debian: apt install g++), or name it in $CXX"
        )
    source = (resources.files(__package__) / "fake_gpu.cpp").read_text()
    parts = [native_build.version(compiler), compiler, torch.__version__, *_FLAGS, source]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder, reason = native_cache.folder_and_reason()
    name = f"fake-gpu-{digest}.so"
    try:
        return _built(compiler, source, folder / name)
    except OSError as error:  # a folder that is the user's, on a file system without writing
        if reason is not None or error.errno not in native_cache.UNWRITABLE:
            raise
    return _built(compiler, source, native_cache.private_folder() / name)


def _built(compiler: str, source: str, path: Path) -> Path:
    """The path, after a build if the library is not there."""
    from ..ops import first_use, native_cache

    if native_cache.is_intact(path):
        return path
    with (
        first_use.telling("library", str(path), _BUILDS, "built it") as library,
        native_cache.locked(path.with_suffix(".lock")),
    ):
        library.made = not native_cache.is_intact(path)  # another process may have built it
        if library.made:
            _compile(compiler, source, path)
    return path


def _compile(compiler: str, source: str, target: Path) -> None:
    from ..ops import native_build, native_cache

    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}-", dir=target.parent))
    with contextlib.ExitStack() as clean:
        clean.callback(shutil.rmtree, folder, ignore_errors=True)
        unit, library = folder / "fake_gpu.cpp", folder / "library.so"
        unit.write_text(source)
        command = [
            *native_build.words(compiler), *_FLAGS, "-isystem", str(_torch() / "include"),
            str(unit), "-o", str(library), f"-L{_torch() / 'lib'}", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            lines = [x for x in run.stderr.splitlines() if "error" in x] or ["no error message"]
            raise OSError(f"{_NEEDED}, and {compiler} fails to build it: {lines[0]}")
        native_cache.store(library, target)


def load(path: Path) -> None:
    """Loads the shim; the process must not have imported torch.

    A CUDA build's own guard is registered when its library loads, and the last guard counts: so
    that library loads here, before the shim.
    """
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
        if (library := _torch() / "lib" / name).exists():
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("PyTorch is not installed")
    return Path(spec.origin).parent

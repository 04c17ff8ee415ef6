"""Builds the C++ library: compiler, flags, the name under which it is kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch

from . import native_cache

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


class BuildError(RuntimeError):
    """Says why there are no C++ kernels."""


def words(command: str) -> list[str]:
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
        program, *arguments = words(command)
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


def processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        lines = set(Path("/proc/cpuinfo").read_text().splitlines())
        return "\n".join(sorted(x for x in lines if x.startswith(("flags", "model name", "Feat"))))
    return platform.processor()


def flags() -> tuple[str, ...]:
    """The compiler's flags for this processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    # compilers prefer 256 bits; these loops are 1.3x faster with 512 (Xeon 2.5 GHz, g++ 12)
    return (*_FLAGS, "-mprefer-vector-width=512") if "AVX512" in capability else _FLAGS


def folder() -> Path:
    """Where the sources lie, and the library of a wheel."""
    return Path(import_module("...csrc", __name__).__path__[0])


def sources() -> list[Path]:
    """The files of csrc/ that go into the library."""
    return sorted(p for p in folder().iterdir() if p.suffix in (".cpp", ".h"))


def version(compiler: str) -> str:
    """A compiler's answer to ``--version``."""
    command = [*words(compiler), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def library_name(compiler: str) -> str:
    """File name of the library that a compiler makes here, a hash of everything it depends on."""
    parts = [version(compiler), torch.__version__, platform.machine(), processor(), *flags()]
    parts += words(compiler)[1:]
    parts += [x for source in sources() for x in (source.name, source.read_text())]
    return f"fasttta-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"


def _quoted(*words: object) -> str:
    """Words of a shell command in a ninja file."""
    return shlex.join(map(str, words)).replace("$", "$$")


def build(compiler: str, ninja_path: str, target: Path) -> None:
    """Builds in a temporary folder, then moves the library to its place in one step."""
    for leftover in target.parent.glob(f"{target.stem}-*"):  # of an interrupted build
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.stem}-", dir=target.parent))
    for source in sources():
        shutil.copy(source, work)
    units = sorted(p.stem for p in work.glob("*.cpp"))
    if sys.platform == "darwin":
        link = "-undefined", "dynamic_lookup"
    else:
        link = f"-L{_TORCH / 'lib'}", "-ltorch_cpu"
    rules = _NINJA.format(
        compiler=_quoted(*words(compiler)),
        flags=" ".join(flags()),
        include=_quoted(_TORCH / "include"),
        link=_quoted(*link),
    )
    rules += "".join(f"build {unit}.o: compile {unit}.cpp\n" for unit in units)
    rules += f"build library.so: link {' '.join(f'{unit}.o' for unit in units)}\n"
    (work / "build.ninja").write_text(rules)
    command = [ninja_path, "-C", str(work)]
    build = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if build.returncode == 0:
        native_cache.store(work / "library.so", target)
    shutil.rmtree(work, ignore_errors=True)
    if build.returncode:
        log, text = target.with_suffix(".log"), build.stdout + build.stderr
        log.write_text(text)
        lines = [x for x in text.splitlines() if "error" in x]
        raise BuildError(f"{compiler} failed: {(lines or ['no error message'])[0]} (see {log})")

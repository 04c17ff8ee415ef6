"""A copy of the checkout that Python imports, and a C++ compiler that keeps its objects."""

from __future__ import annotations

import compileall
import contextlib
import os
import py_compile
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = (".git", "__pycache__", ".pytest_cache", "build", "dist", "*.egg-info", ".venv*")


class Copy:
    """A copy of the checkout, and a package folder that makes Python import it.

    The package is usually installed editable, with ``fasttta.kernels`` and ``fasttta.csrc`` mapped
    to the top of the checkout. ``lib/fasttta`` is the same package as links into the copy; a folder
    on the path goes before an editable install.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.tree, self.lib = folder / "tree", folder / "lib"
        self.objects = folder.parent / "objects"  # of the C++ compiler
        shutil.copytree(root, self.tree, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
        package = self.lib / "fasttta"
        package.mkdir(parents=True)
        parts = [*(self.tree / "fasttta").iterdir(), self.tree / "kernels", self.tree / "csrc"]
        for part in parts:
            (package / part.name).symlink_to(part)
        for name in ("fasttta", "kernels", "csrc"):
            compileall.compile_dir(self.tree / name, quiet=2)

    @contextlib.contextmanager
    def with_text(self, file: str, changed: str) -> Iterator[None]:
        """The tree with another text in one file; afterwards as before."""
        path = self.tree / file
        text, times = path.read_text(), path.stat()
        for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            cached.unlink()  # its time stamp would do for a patch of the same second and length
        path.write_text(changed)
        try:
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if path.suffix == ".py":
                py_compile.compile(str(path), quiet=2)


def compiler() -> list[str] | None:
    """The C++ compiler that the library is built with, and arguments that ``$CXX`` gives it."""
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(words[0]):
            return [path, *words[1:]]
    return None


_CACHING_COMPILER = '''#!{python} -S
"""The C++ compiler, which keeps the object of a source that it has compiled before."""
import hashlib, os, re, shutil, subprocess, sys
from pathlib import Path

words, objects = sys.argv[1:], Path({objects!r})

def texts(path):
    text = path.read_text()
    yield text
    for name in re.findall('#include "(.+?)"', text):
        yield from texts(path.parent / name)

if "-c" not in words:
    sys.exit(subprocess.run([*{compiler!r}, *words]).returncode)
source, target = (Path(words[words.index(flag) + 1]) for flag in ("-c", "-o"))
key = hashlib.sha256("\\n".join([*texts(source), *words]).encode()).hexdigest()
kept = objects / key
if not kept.exists():
    done = subprocess.run([*{compiler!r}, *words])
    if done.returncode:
        sys.exit(done.returncode)
    shutil.copy(target, objects / f"{{key}}.{{os.getpid()}}")
    os.replace(objects / f"{{key}}.{{os.getpid()}}", kept)
shutil.copy(kept, target)
'''


def caching_compiler(objects: Path) -> Path:
    """A compiler for libraries that differ in one source: eight of nine objects are there."""
    objects.mkdir(exist_ok=True)
    script = objects / "c++"
    if not script.exists():
        part = objects / f"c++.{os.getpid()}"
        part.write_text(
            _CACHING_COMPILER.format(
                python=sys.executable, objects=str(objects), compiler=compiler()
            )
        )
        part.chmod(0o755)
        os.replace(part, script)
    return script

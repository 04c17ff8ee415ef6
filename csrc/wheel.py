"""Puts the built C++ library into a wheel, where the wheel is built with PyTorch at hand.

`pip wheel --no-build-isolation .` on a machine with PyTorch, a compiler and ninja makes a wheel for
that kind of machine (`py3-none-linux_x86_64`), whose library is used where it fits
(fasttta/ops/native_prebuilt.py). A build in isolation has no PyTorch, and makes the wheel of pure
Python that builds on the first use; so does FASTTTA_NATIVE=off. With FASTTTA_NATIVE=require a wheel
without the library is an error. Editable installs have none. pyproject.toml names both classes.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

_STORE = """
import sys
from pathlib import Path
from fasttta.ops import native_build, native_prebuilt
try:
    reason = native_prebuilt.store(Path(sys.argv[1]))
except native_build.BuildError as error:
    reason = str(error)
sys.exit(reason)
"""
_MODE = os.environ.get("FASTTTA_NATIVE", "auto")


def _has_torch() -> bool:
    return _MODE != "off" and importlib.util.find_spec("torch") is not None


class BuildWithLibrary(build_py):
    """Builds the C++ library from the copy of the package that goes into the wheel."""

    def run(self) -> None:
        """Copies the modules, then builds beside them; says what became of the library."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib).resolve()
        for left in ("library.so", "library.json"):  # of an earlier build in this folder
            (folder / "fasttta" / "csrc" / left).unlink(missing_ok=True)
        reason = "it needs PyTorch, which a build in isolation has not (--no-build-isolation)"
        if _has_torch():
            self.announce("building the C++ library, about half a minute", level=2)
            ran = subprocess.run(
                [sys.executable, "-P", "-c", _STORE, str(folder / "fasttta" / "csrc")],
                env=os.environ | {"PYTHONPATH": str(folder)},
                stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            reason = ran.stderr.strip() if ran.returncode else ""
        if reason and _MODE == "require":
            raise RuntimeError(f"FASTTTA_NATIVE=require: no C++ library in the wheel: {reason}")
        self.announce(f"C++ library: {reason or 'in the wheel'}", level=2)


class WheelOfMachine(bdist_wheel):
    """Names the machine if the wheel may hold a library; it serves every version of Python 3."""

    def finalize_options(self) -> None:
        """Decides whether it is a wheel of pure Python."""
        super().finalize_options()
        if _has_torch() and "editable_wheel" not in self.distribution.commands:
            self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and machine in the wheel's name."""
        python, abi, machine = super().get_tag()
        return (python, abi, machine) if self.root_is_pure else ("py3", "none", machine)

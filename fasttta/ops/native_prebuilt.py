"""The C++ library that a wheel carries: made where the wheel is built, used where it fits.

A wheel that is built where there are PyTorch, a compiler and ninja (``pip wheel
--no-build-isolation .``) holds ``library.so`` beside the sources, for the family of processors of
that machine, and ``library.json``, which says what it needs. It is used if

* it is the one that was stored (sha256), made of the sources that lie beside it;
* PyTorch has the same major and minor version: the library uses the stable ABI alone, and nothing
  of Python, so one wheel serves all versions of Python;
* system, machine and PyTorch's vector capability are the same, and the processor has every
  instruction set that the builder's had.

Otherwise the library is built on the first use, as without one.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import native_build

LIBRARY, FACTS = "library.so", "library.json"

# Linux's names of what a compiler may use of a processor of x86; other flags say how a system runs
_INSTRUCTION_SETS = re.compile(
    r"pni|ssse3|sse\w*|avx\w*|amx_\w+|fma4?|f16c|bmi\d|abm|movbe|popcnt|aes|vaes|pclmulqdq|"
    r"vpclmulqdq|gfni|sha\w*|adx|cx16|lahf_lm|xop|tbm|rdrand|rdseed|fsgsbase|clwb|clflushopt|"
    r"movdir\w+|serialize|cldemote|waitpkg|prefetchw\w*|3dnow\w*|xsave\w*|pku|wbnoinvd|clzero"
)


def instruction_sets() -> list[str]:
    """The processor's instruction sets by Linux's names; empty where there is no /proc/cpuinfo."""
    found: set[str] = set()
    for line in native_build.processor().splitlines():
        name, _, flags = line.partition(":")
        if name.startswith("Feat"):  # ARM: all of them are
            found.update(flags.split())
        elif name.startswith("flags"):
            found.update(filter(_INSTRUCTION_SETS.fullmatch, flags.split()))
    return sorted(found)


def _of_sources() -> str:
    parts = [x for path in native_build.sources() for x in (path.name, path.read_text())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _facts() -> dict[str, Any]:
    """What a library made here needs."""
    return {
        "sources": _of_sources(),
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "system": sys.platform,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": instruction_sets(),
    }


def store(folder: Path) -> str | None:
    """Builds the library into a folder, which also gets what it needs; a wheel's build calls it.

    Returns:
        Why there is none; None: there is one.

    Raises:
        BuildError: the compiler fails.
    """
    for name in (LIBRARY, FACTS):
        (folder / name).unlink(missing_ok=True)
    chosen, ninja_path, facts = native_build.compiler(), native_build.ninja(), _facts()
    if chosen is None or ninja_path is None:
        return "there is no C++ compiler" if chosen is None else "there is no ninja"
    if not facts["instruction_sets"]:
        return "this system does not say what its processor can do"
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary, LIBRARY)
        native_build.build(chosen, ninja_path, built)
        shutil.copyfile(built, folder / LIBRARY)
    (folder / LIBRARY).chmod(0o755)
    facts["library"] = hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest()
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return None


def find() -> tuple[Path | None, str | None]:
    """The library that was installed with this package, if it fits, or the reason why it does not;
    two None: there is none."""
    folder = native_build.folder()
    path = folder / LIBRARY
    if not path.exists():
        return None, None
    try:
        stored = json.loads((folder / FACTS).read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        return None, f"{FACTS} cannot be read: {error}"
    reason = _misfit(stored, digest)
    return (path, None) if reason is None else (None, reason)


def _misfit(stored: Any, digest: str) -> str | None:
    """Why a library of these facts and this sha256 cannot serve here; None: it can."""
    facts = _facts()
    if not isinstance(stored, dict) or not facts.keys() <= stored.keys():
        return f"{FACTS} does not say what the library needs"
    if stored.get("library") != digest:
        return f"{LIBRARY} is not the one that was stored: its sha256 differs"
    if stored["sources"] != facts["sources"]:
        return "it was made of other sources"
    for name in ("torch", "system", "machine", "capability"):
        if stored[name] != facts[name]:
            return f"it was made for {name} {stored[name]}, found {facts[name]}"
    lacking = sorted(set(stored["instruction_sets"]) - set(facts["instruction_sets"]))
    if lacking:
        return f"this processor lacks {', '.join(lacking[:4])}"
    return None

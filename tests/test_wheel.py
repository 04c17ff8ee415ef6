"""A wheel that is built where PyTorch and a compiler are: its library serves without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from places import ROOT

from fasttta.ops import native, native_prebuilt

REPORT = """
import json, warnings
import torch
import fasttta
from fasttta import functional as F
from fasttta.ops import native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    value = F.entropy(torch.arange(6.0).view(2, 3)).tolist()
outcome = native.attempt()
print(json.dumps({"path": outcome.path and str(outcome.path), "reason": outcome.reason,
    "value": value, "package": fasttta.__file__, "warnings": [str(w.message) for w in caught]}))
"""

pytestmark = [
    pytest.mark.slow,  # 30 s of a core's time, for the C++ library
    pytest.mark.skipif(
        native.mode() == "off" or native.compiler() is None or native.ninja() is None,
        reason="there is no C++ compiler, no ninja, or FASTTTA_NATIVE=off",
    ),
    pytest.mark.skipif(
        not native_prebuilt.instruction_sets(), reason="/proc/cpuinfo names no instruction sets"
    ),
]


def _without_checkout() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and "FASTTTA" not in k}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout's files, built with the packages of this process."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository: git lists its files")
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "-w", out, source]
    ran = subprocess.run(
        [*command, "--no-build-isolation"],
        env=_without_checkout() | {"FASTTTA_NATIVE": "require"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; all other packages are those of this process."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "base.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, env=_without_checkout(), capture_output=True, text=True, check=True)
    return packages


def _use(installed: Path, folder: Path) -> tuple[dict, bool]:
    """What a first use does in the environment, and whether it called the compiler."""
    compiler, calls = folder / "compiler", folder / "calls"
    compiler.write_text(f'#!/bin/sh\necho "$@" >>{calls}\necho "error: out of luck"; exit 1\n')
    compiler.chmod(0o755)
    cache = {"FASTTTA_CACHE": str(folder / "cache"), "CXX": str(compiler)}
    ran = subprocess.run(
        [installed.parents[2] / "bin" / "python", "-P", "-c", REPORT], cwd=folder,
        env=_without_checkout() | cache, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert Path(report["package"]).is_relative_to(installed)
    assert report["value"] == [pytest.approx(0.8323, abs=1e-3)] * 2
    return report, calls.exists()


def test_it_names_the_machine_and_no_version_of_python(wheel):
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert not wheel.stem.endswith("any")


def test_no_compiler_is_called(installed, tmp_path):
    report, called = _use(installed, tmp_path)
    assert report["path"] == str(installed / "fasttta" / "csrc" / "library.so")
    assert report["warnings"] == []
    assert not called
    assert not (tmp_path / "cache").exists()


def test_a_changed_library_is_not_used(installed, tmp_path):
    library = installed / "fasttta" / "csrc" / "library.so"
    data = library.read_bytes()
    library.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    try:
        report, called = _use(installed, tmp_path)
    finally:
        library.write_bytes(data)
    assert report["path"] is None
    assert called
    assert "out of luck" in report["reason"] or "--version" in report["reason"]

"""The tables of faults are well-formed; `python tests/mutations.py` runs them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter

import pytest
from places import TESTS


def _script(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutations = _script(TESTS / "mutations.py")
FAULTS = mutations.read_tables()
# Every one of these has faults in the tables: folders of the library, and files at its top
ROOMS = (
    "fasttta/adapted", "fasttta/engine/", "fasttta/methods/", "fasttta/models/", "fasttta/ops/",
    "fasttta/views/", "fasttta/data/", "fasttta/evaluate/", "fasttta/commands/", "fasttta/demo/",
    "kernels/", "csrc/",
)  # fmt: skip


def test_there_are_faults_in_every_room():
    assert len(FAULTS) >= 40
    for room in ROOMS:
        assert any(fault.file.startswith(room) for fault in FAULTS), room


def test_names_are_unique():
    counts = Counter(fault.name for fault in FAULTS)
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_put_in(fault):
    """Its old text is in the file exactly once, the new one differs, and Python can read it."""
    text = fault.patched(mutations.ROOT)
    assert text != (mutations.ROOT / fault.file).read_text()
    if fault.file.endswith(".py"):
        compile(text, fault.file, "exec")
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        source = (mutations.ROOT / "tests" / file).read_text()
        function = name.partition("[")[0].rpartition("::")[2]  # of a class
        assert not name or f"def {function}(" in source, test


@pytest.mark.slow
def test_survivors_are_told(tmp_path):
    """A fault that is caught, one that is not, and one whose text is not there."""
    table = tmp_path / "table.py"
    rows = (
        ("caught", "self.z > self.threshold", "self.z < self.threshold"),
        ("survives", "Detects that the distribution", "Detects whether the distribution"),
        ("gone", "this text is nowhere", ""),
        ("breaks", "class ShiftDetector:", "class ShiftDetector"),
    )
    file, test = (
        "fasttta/engine/shift_detector.py",
        "engine/test_shift_detector.py::test_official_sequence",
    )
    table.write_text(f"FAULTS = {[(n, file, old, new, test) for n, old, new in rows]!r}")
    before = (mutations.ROOT / file).read_text()
    command = [sys.executable, str(mutations.__file__), "--table", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "caught: caught" in done.stdout
    assert "1 of 4 faults caught" in done.stdout
    for problem in ("survives: SURVIVED", "gone: the old text is 0 times", "breaks: is broken"):
        assert f"PROBLEM  {problem}" in done.stdout
    assert (mutations.ROOT / file).read_text() == before
    only = subprocess.run([*command, "-k", "caught"], capture_output=True, text=True, check=False)
    assert only.returncode == 0, only.stdout + only.stderr

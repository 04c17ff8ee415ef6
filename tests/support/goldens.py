"""Where golden vectors lie, and which tests are skipped without them.

Numbers of the official implementations come in files that belong together: the weights, inputs and
expected values of one run. They are looked for in $FASTTTA_GOLDEN, .golden/, ../shared/golden and
tests/golden, and all files of a run are taken from the first place that holds all of them, so that
the weights of one run never meet the values of another.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from places import ROOT


def places() -> list[Path]:
    """Folders that may hold golden vectors, the preferred one first."""
    folders = [ROOT / ".golden", ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden"]
    if named := os.environ.get("FASTTTA_GOLDEN"):
        if not Path(named).is_dir():
            raise FileNotFoundError(f"FASTTTA_GOLDEN={named!r} is not a folder")
        folders.insert(0, Path(named))
    return folders


def find(*names: str) -> Path | None:
    """The first place that holds all of these files, such as "atpt/golden.json"; None: there is
    none."""
    return next((p for p in places() if all((p / name).is_file() for name in names)), None)


def require(*names: str) -> Path:
    """The first place that holds all of these files; where there is none the test is skipped, and
    pytest's summary names the files."""
    place = find(*names)
    if place is None:
        present = {name for p in places() for name in names if (p / name).is_file()}
        missing = sorted(set(names) - present) or sorted(names)
        pytest.skip(f"needs golden vectors in one folder: {', '.join(missing)}")
    return place


def require_data(name: str) -> Path:
    """A file of the folder ``data`` beside a place of golden vectors, or a skipped test."""
    path = next(
        (p.parent / "data" / name for p in places() if (p.parent / "data" / name).is_file()), None
    )
    if path is None:
        pytest.skip(f"needs data: {name}")
    return path

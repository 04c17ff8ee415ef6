"""Style that a linter does not know: no banner comments, no files whose names say nothing."""

from __future__ import annotations

import re

from places import ROOT

ROOMS = ("fasttta", "kernels", "csrc", "benches", "tests", ".ci")
CODE = {".py", ".cpp", ".h", ""}  # no suffix: scripts
BANNER = re.compile(r"^\s*(#|//)\s*([-=*#~─])\2{3,}")
# what a file holds is said by a noun of the field, not by one of these
RIDDLES = {
    "again", "ahead", "common", "helpers", "manager", "misc", "passing", "products", "staged",
    "trees", "utils", "words", "workers",
}  # fmt: skip


def files():
    """Every file of code in the rooms."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*")) if path.is_file()]
    code = [p for p in paths if p.suffix in CODE and "__pycache__" not in p.parts]
    assert len(code) > 200
    return code


def test_no_banner_comments():
    banners = []
    for path in files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if BANNER.match(line):
                banners.append(f"{path.relative_to(ROOT)}:{number}")
    assert not banners, f"{len(banners)} banner comments: {banners}"


def test_no_file_is_named_like_a_riddle():
    named = [
        path.relative_to(ROOT)
        for path in files()
        if {re.sub("^(test|bench)_", "", part) for part in (path.stem, path.parent.name)} & RIDDLES
    ]
    assert not named, list(map(str, named))


def test_which_lines_are_banners():
    for line in ("# ------", "    # ==== the loop", "// -----------------", "# ─────"):
        assert BANNER.match(line), line
    for line in ("# - a list", "x = 1  # ----", "# -1 --- 2", "#!/usr/bin/env bash"):
        assert not BANNER.match(line), line

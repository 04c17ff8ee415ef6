"""What every step may cost: ``budgets.txt``, which a change updates on purpose.

``python tests/cost/budgets.py --update`` counts all steps again and writes the file; without
``--update`` it shows what has changed.
"""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import count

FILE = Path(__file__).with_name("budgets.txt")
UPDATE = "python tests/cost/budgets.py --update"
#: What counts depend on besides the code: PyTorch may take other kernels in another version.
TORCH = "2.13"

_HEAD = f"""\
Cost of a step on a GPU, counted without one; written by {UPDATE} (torch {TORCH}).
A change that makes a step cheaper or dearer updates this file, and its diff says by how much.
GB: read and written. GiB: at the peak, beyond weights, state and queue. ms: estimate for an H200,
of an eager step on a fast host. Views of images are given.

{"case":<12}{"":<5}{"engine":<7}{"launches":>9}{"GB":>9}{"TFLOP":>8}{"GiB":>7}{"ms":>8}
"""


def text(steps: Iterable[dict[str, Any]]) -> str:
    """The file's text: GB, GiB and ms to 0.01, TFLOP to 0.001."""
    rows = [
        f"{x['case']:<12}{x['precision']:<5}{x['engine']:<7}{x['launches']:>9,}"
        f"{x['bytes'] / 1e9:>9.2f}{x['flops'] / 1e12:>8.3f}{x['peak'] / 2**30:>7.2f}"
        f"{x['predicted'] * 1e3:>8.2f}"
        for x in steps
    ]
    return _HEAD + "\n".join(rows) + "\n"


def changes(now: str) -> str:
    """The difference to the file, empty where there is none."""
    before = FILE.read_text() if FILE.exists() else ""
    return "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "now", n=0))


def counted(which: str) -> subprocess.Popen:
    """Starts to count ``budgets`` or ``others`` in a process of its own, which prints JSON."""
    script = Path(__file__).with_name("count.py")
    return count.start(script, "--json", which, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> list[dict[str, Any]]:
    """What a process has counted."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"counting failed with exit status {process.returncode}")
    return json.loads(output)


def main() -> int:
    now = text(result(counted("budgets")))
    print(changes(now) or "nothing has changed")
    if "--update" in sys.argv:
        FILE.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main())

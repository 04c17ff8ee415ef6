"""Draws ``demo.svg``, the picture beside the table of README.md in this folder.

python -m fasttta.demo.picture    brings it up to date with the table
"""

from __future__ import annotations

import re
from pathlib import Path

from ..evaluate.charts import Dots, Mark, Row

FOLDER = Path(__file__).resolve().parent
README, PICTURE = FOLDER / "README.md", FOLDER / "demo.svg"


def chart(text: str) -> tuple[Dots, list[tuple[str, int]]]:
    """The table of a README as a dot plot, and its legend.

    Args:
        text: the README, with the demo's table between ``<!-- demo-table -->`` and
            ``<!-- /demo-table -->``.

    Returns:
        A row for each stream and one for the mean, with the accuracy of the prediction that each
        method is scored with; (method, style) of each colour.
    """
    table = text.split("<!-- demo-table -->")[1].split("<!-- /demo-table -->")[0]
    scored = dict(re.findall(r"(\S+) lr \S+ scored (before|after)", " ".join(table.split())))
    lines = table.splitlines()
    head = next(line for line in lines if line.startswith("accuracy"))
    methods = head.removeprefix("accuracy, %").split()
    rows = []
    for line in lines:
        numbers = re.findall(r"([\d.]+)(?: → ([\d.]+))?(?: ±[\d.]+)?", line)
        if "→" not in line or len(numbers) != len(methods):
            continue
        marks = [
            Mark(method, style, float(after if scored.get(method) == "after" else before))
            for style, (method, (before, after)) in enumerate(zip(methods, numbers, strict=True))
        ]
        label = line.split()[0]
        rows.append(Row(label, marks, strong=label == "mean"))
    legend = [(method, style) for style, method in enumerate(methods)]
    return Dots("accuracy on corrupted streams", "accuracy, %", rows), legend


def main() -> None:
    """Writes the picture; needs the extra ``report``."""
    from ..evaluate.drawing import svg_file

    PICTURE.write_bytes(svg_file(*chart(README.read_text())))


if __name__ == "__main__":
    main()

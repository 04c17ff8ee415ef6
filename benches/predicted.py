"""Measured steps beside what was predicted for them without a GPU.

python tests/cost/count.py --json budgets > predictions.json
python benches/predicted.py benches/results/nvidia-h200.json predictions.json

A prediction is a roofline (fasttta/cost): seconds, launches, bytes and FLOP of a case. A row shows
both, their ratio, and the share of what the machine reached in the same run with a copy and a
matrix product. Rows above ``--limit`` times their prediction are marked: they want an explanation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# settings of bench_step -> cases of the counted steps
_STEPS = {
    "k50": "K50", "vgg": "VGG", "no queue": "batch 64", "latency": "batch 1", "read": "READ",
    "tent": "TENT",
}  # fmt: skip
_HEAD = ("case", "predicted", "measured", "ratio", "launches", "of the ceiling", "")


def case_of(entry: dict[str, Any]) -> tuple[str, str, str] | None:
    """(case, precision, engine) of a bench's entry; None: it has no prediction."""
    params = entry["params"]
    precision = params.get("precision", "fp32")
    engine = params.get("engine", entry.get("engine", "eager"))
    if entry["name"] == "bench_step" and params["setting"] in _STEPS:
        return _STEPS[params["setting"]], precision, engine
    if entry["name"] == "bench_brimpr":
        return "BriMPR", precision, engine
    if entry["name"] == "bench_clip_episode":
        method, classes = params["method"].upper(), params["classes"]
        return method if method == "TPT" else f"{method} {classes}", precision, engine
    return None


def rows(
    entries: Iterable[dict[str, Any]], predictions: Iterable[dict[str, Any]], limit: float
) -> list[tuple[str, ...]]:
    """A row for every entry with a prediction, those that are furthest above it first."""
    wanted = {(x["case"], x["precision"], x["engine"]): x for x in predictions}
    found = []
    for entry in entries:
        case = case_of(entry)
        if case not in wanted:
            continue
        predicted = wanted[case]
        measured, hoped = entry["min_us"] / 1e3, 1e3 * predicted["predicted"]
        launches = entry.get("launches")
        found.append(
            (
                measured / hoped,
                (
                    ", ".join(case),
                    f"{hoped:.2f} ms",
                    f"{measured:.2f} ms",
                    f"{measured / hoped:.2f}",
                    f"{predicted['launches']} / {'?' if launches is None else launches}",
                    f"{entry['percent_of_bound']:.0f} %" if "percent_of_bound" in entry else "",
                    "explain" if measured > limit * hoped else "",
                ),
            )
        )
    return [row for _, row in sorted(found, key=lambda x: -x[0])]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measured steps beside their predictions")
    parser.add_argument("results", type=Path, help="benches/results/<device>.json")
    parser.add_argument("predictions", type=Path, help="of tests/cost/count.py --json budgets")
    parser.add_argument("--limit", type=float, default=1.25, help="times the prediction: explain")
    options = parser.parse_args(arguments)
    try:
        results = json.loads(options.results.read_text())
        predictions = json.loads(options.predictions.read_text())
        table = rows(results["benches"], predictions, options.limit)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"predicted.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if not table:
        print("predicted.py: no bench of the results has a prediction", file=sys.stderr)
        return 1
    named = {x.get("gpu") for x in predictions}
    print(f"{results['device']}, predicted for {', '.join(sorted(map(str, named)))}\n")
    for row in (_HEAD, ["---"] * len(_HEAD), *table):
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

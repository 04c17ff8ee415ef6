"""Counts steps without a GPU: ``python tests/cost/count.py K50`` prints where a step goes.

Options: ``--precision fp32``, ``--engine eager``, ``--gpu b200``, ``--lines 40``. Without a case it
prints the names of all. ``--json`` prints numbers of all cases, or of those of one precision.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from fasttta.cost import shim


def start(script: str | Path, *arguments: str, **options) -> subprocess.Popen:
    """Starts a script that counts, in a process of its own, with the shim as its first argument."""
    built = shim.build()
    command = [sys.executable, str(script), "" if built is None else str(built), *arguments]
    return subprocess.Popen(command, **options)


def load_shim() -> list[str]:
    """Loads the shim that ``start`` named; returns the other arguments."""
    if sys.argv[1]:
        shim.load(Path(sys.argv[1]))
    return sys.argv[2:]


def main() -> int:
    if len(sys.argv) < 2 or not (sys.argv[1] == "" or sys.argv[1].endswith(".so")):
        return start(__file__, *sys.argv[1:]).wait()
    arguments = load_shim()

    from counted_steps import CASES, ENGINES, PRECISIONS

    from fasttta.cost import gpu
    from fasttta.cost.roofline import GPUS

    parser = argparse.ArgumentParser(prog="count.py", description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE")
    parser.add_argument("--precision", choices=(*PRECISIONS, "fp8"))
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--lines", type=int, default=25)
    parser.add_argument("--json", choices=("budgets", "others"))
    options = parser.parse_args(arguments)
    gpu.pretend()
    if options.json:
        print(json.dumps(numbers_of_all(options.json == "budgets")))
    elif odd := [name for name in options.case if name not in CASES]:
        parser.error(f"unknown case {odd[0]!r}; known: {', '.join(CASES)}")
    elif not options.case:
        print("\n".join(CASES))
    for name in options.case:
        describe(name, options)
    return 0


def describe(name: str, options: argparse.Namespace) -> None:
    """Prints where a step goes."""
    from counted_steps import CASES, count

    from fasttta.cost import report
    from fasttta.cost.roofline import GPUS

    case = CASES[name]
    precision = options.precision or case.precision
    engine = options.engine or ("graph" if case.graph else "eager")
    log = count(name, precision, engine)
    print(f"{name}, {precision}, {engine}")
    print(report.text(log, GPUS[options.gpu], engine == "graph", options.lines))


def numbers_of_all(budgeted: bool) -> list[dict[str, object]]:
    """Numbers of the budgeted steps, at full depth, or of all others."""
    from counted_steps import CASES, combinations, count

    from fasttta.cost import report
    from fasttta.cost.roofline import GPUS

    results: list[dict[str, object]] = []
    for name, precision, engine in combinations():
        case = CASES[name]
        if budgeted == (precision == case.precision):
            log = count(name, precision, engine)
            results.append({
                "case": name, "precision": precision, "engine": engine, "method": case.method,
                "captured": case.graph, "budgeted": budgeted,
                **report.numbers(log, GPUS["h200"], engine == "graph"),
            })  # fmt: skip
    return results


if __name__ == "__main__":
    sys.exit(main())

"""Counts one step without a GPU: ``python tests/cost/count.py K50`` prints where it goes.

Options: ``--precision fp32``, ``--engine eager``, ``--gpu b200``, ``--lines 40``. Without a case it
prints the names of all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from fasttta.cost import shim


def in_process_of_its_own(script: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """Runs a script of this folder again, with the shim as its first argument."""
    built = shim.build()
    command = [sys.executable, script, "" if built is None else str(built), *arguments]
    return subprocess.run(command, check=False)


def main() -> int:
    if len(sys.argv) < 2 or not (sys.argv[1] == "" or sys.argv[1].endswith(".so")):
        return in_process_of_its_own(__file__, sys.argv[1:]).returncode
    if sys.argv[1]:
        shim.load(Path(sys.argv[1]))

    from cases import CASES, ENGINES, PRECISIONS, count

    from fasttta.cost import gpu, report
    from fasttta.cost.roofline import GPUS

    parser = argparse.ArgumentParser(prog="count.py")
    parser.add_argument("case", nargs="*", choices=[[], *CASES], metavar="CASE")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--lines", type=int, default=25)
    options = parser.parse_args(sys.argv[2:])
    if not options.case:
        print("\n".join(CASES))
        return 0
    gpu.pretend()
    for name in options.case:
        engine = options.engine or ("graph" if CASES[name].graph else "eager")
        log = count(name, options.precision, engine)
        print(f"{name}, {options.precision}, {engine}")
        print(report.text(log, GPUS[options.gpu], engine == "graph", options.lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

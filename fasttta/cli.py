"""The command line: ``fasttta <command>``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__
from .commands import console
from .commands.command_line import add_doctor, add_inspect, add_warmup
from .demo.command_line import add_demo, add_study


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fasttta", description="Test-time adaptation of multi-modal models."
    )
    parser.add_argument("--version", action="version", version=f"fasttta {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for add in (add_demo, add_study, add_inspect, add_warmup, add_doctor):
        add(commands)
    for each in (parser, *commands.choices.values()):
        each.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS,
            help="on an error also print where it was raised (FASTTTA_TRACEBACK=1 does)",
        )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status, as ``console.run`` does."""
    # before torch loads OpenMP: threads that spin while they wait make small models 5 to 10 times
    # slower as soon as anything else runs on the machine (2 cores, GNU OpenMP)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("FASTTTA_MESSAGES", "on")  # what takes long says so, see ops/first_use.py
    try:
        options = _parser().parse_args(arguments)
    except SystemExit:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            console.drop_output()
        raise
    asked = os.environ.get("FASTTTA_TRACEBACK", "") not in ("", "0")
    return console.run(lambda: options.command(options), getattr(options, "traceback", asked))


if __name__ == "__main__":
    sys.exit(main())

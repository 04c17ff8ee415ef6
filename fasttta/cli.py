"""The command line: ``fasttta <command>``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from . import __version__


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _demo_parser(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="adapt a small trained audio-visual model on corrupted streams, offline",
        description="Adapts a small trained audio-visual transformer, label-free, on corrupted "
        "streams of handwritten and spoken digits, and prints accuracy next to the source model.",
    )
    demo.add_argument("--quick", action="store_true", help="three streams of 448 samples")
    demo.add_argument("--json", action="store_true", help="print the report as JSON")
    demo.add_argument("--streams", type=_words, metavar="A,B", help="corruptions to run")
    demo.add_argument("--methods", type=_words, metavar="A,B", help="methods to run")
    demo.add_argument("--severity", type=float, default=5, help="1 to 8 (default 5)")
    demo.add_argument("--samples", type=int, help="samples in a stream (default 960)")
    demo.add_argument("--batch", type=int, default=64, help="samples in a batch (default 64)")
    demo.add_argument("--seeds", type=_numbers, default=[0], metavar="0,1", help="(default 0)")
    demo.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    from .demo import run as demo

    given = {name: getattr(options, name) for name in ("streams", "methods", "samples")}
    chosen = {name: value for name, value in given.items() if value is not None}
    report = demo.run(
        **{**(demo.QUICK if options.quick else {}), **chosen},
        severity=options.severity,
        batch=options.batch,
        seeds=options.seeds,
        progress=demo.ProgressBar(),
    )
    print(json.dumps(report, indent=1) if options.json else demo.table(report))
    if not options.json:
        machine = report["machine"]
        print(
            f"{report['seconds']:.1f} s on {machine['processor']}, {machine['threads']} threads, "
            f"torch {machine['torch']}"
        )
    return 0


def _doctor_parser(commands: argparse._SubParsersAction) -> None:
    doctor = commands.add_parser(
        "doctor", help="versions, device, which backends of which operation are live and why not"
    )
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from . import environment

    found = environment.diagnose()
    print(json.dumps(found, indent=1) if options.json else environment.table(found))
    return 0


def _inspect_parser(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser(
        "inspect", help="what a checkpoint is recognised as, and what each method would tune"
    )
    inspect.add_argument("model", metavar="MODEL", help="a CAV-MAE checkpoint file")
    inspect.add_argument("--num-heads", type=int, help="attention heads (default 12)")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from . import inspection
    from .models import CAVMAE

    model = CAVMAE.from_checkpoint(options.model, num_heads=options.num_heads or 12)
    found = inspection.describe(model)
    found["heads_assumed"] = options.num_heads is None  # a checkpoint does not say
    print(json.dumps(found, indent=1) if options.json else inspection.table(found))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    # before torch loads OpenMP: threads that spin while they wait make small models 5 to 10 times
    # slower as soon as anything else runs on the machine (2 cores, GNU OpenMP)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        prog="fasttta", description="Test-time adaptation of multi-modal models."
    )
    parser.add_argument("--version", action="version", version=f"fasttta {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    _demo_parser(commands)
    _inspect_parser(commands)
    _doctor_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError) as error:
        print(f"fasttta: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

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
    demo.add_argument("--samples", type=int, help="samples in a stream (default 768)")
    demo.add_argument("--batch", type=int, default=64, help="samples in a batch (default 64)")
    demo.add_argument("--seeds", type=_numbers, default=[0], metavar="0,1", help="(default 0)")
    _report_arguments(demo)
    demo.set_defaults(command=_demo)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report", metavar="OUT.html", help="also write table and charts as one HTML file"
    )
    parser.add_argument(
        "--png",
        action="store_true",
        help="also write the charts as PNG files into OUT-charts/ beside the HTML file; needs "
        "matplotlib: pip install 'fasttta[report]'",
    )


def _check_report(options: argparse.Namespace) -> None:
    """Refuses what could not be written, before anything is computed."""
    from .evaluate.output import check_folder, check_matplotlib, check_output

    if options.png and options.report is None:
        raise ValueError("--png writes beside the HTML file; name that too: --report out.html")
    if options.report is not None:
        check_output(options.report, "--report")
    if options.png:
        try:
            check_matplotlib()
        except ModuleNotFoundError as error:
            raise ValueError(error) from error
        check_folder(_charts_folder(options.report), "--png: the folder of the charts")


def _charts_folder(report: str) -> str:
    return os.path.splitext(report)[0] + "-charts"


def _write_report(options: argparse.Namespace, report) -> None:
    """Writes what was asked for; says where on standard error, which JSON does not go to."""
    if options.report is None:
        return
    print(f"report: {report.to_html(options.report)}", file=sys.stderr)
    if options.png:
        paths = report.to_png(_charts_folder(options.report))
        print(f"charts: {len(paths)} files in {paths[0].parent}", file=sys.stderr)


def _demo(options: argparse.Namespace) -> int:
    from .demo import run as demo
    from .evaluate import Report

    _check_report(options)
    given = {name: getattr(options, name) for name in ("streams", "methods", "samples")}
    chosen = {name: value for name, value in given.items() if value is not None}
    report = Report(
        demo.run(
            **{**(demo.QUICK if options.quick else {}), **chosen},
            severity=options.severity,
            batch=options.batch,
            seeds=options.seeds,
            progress=demo.ProgressBar(),
        )
    )
    _print(report.data, report.table(), options.json)
    _write_report(options, report)
    return 0


def _print(found: dict, text: str, json_wanted: bool) -> None:
    from .evaluate.output import as_json

    if json_wanted:
        print(as_json(found))
        return
    machine = found["machine"]
    print(text)
    print(
        f"{found['seconds']:.1f} s on {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['torch']}"
    )


def _study_parser(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser(
        "study",
        help="measure on the demo's model why ABPEM works: attention gap, ablations, gradients",
        description="gap: attention gap and accuracy against the severity of corruptions. ablate: "
        "loss terms and options of ABPEM, one at a time. gradients: how gradients of label-free "
        "losses agree with the cross-entropy's. Without a name all three.",
    )
    study.add_argument(
        "names", nargs="*", metavar="gap|ablate|gradients", help="which (default: all three)"
    )
    study.add_argument("--quick", action="store_true", help="fewer samples and settings")
    study.add_argument("--json", action="store_true", help="print the results as JSON")
    study.add_argument(
        "--seeds", type=_numbers, default=[0, 1, 2], metavar="0,1,2", help="(default 0,1,2)"
    )
    _report_arguments(study)
    study.set_defaults(command=_study)


def _study(options: argparse.Namespace) -> int:
    from .demo import study
    from .evaluate import ProgressBar

    _check_report(options)
    found = study.run(
        options.names or tuple(study.STUDIES),
        seeds=options.seeds,
        quick=options.quick,
        progress=ProgressBar(),
    )
    _print(found, study.table(found), options.json)
    _write_report(options, study.document(found))
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
        "inspect", help="what a model is recognised as, and what each method would tune"
    )
    inspect.add_argument(
        "model",
        metavar="MODEL",
        help="a CAV-MAE checkpoint file, or package.module:name of a module or of a function "
        "that builds one",
    )
    inspect.add_argument("--num-heads", type=int, help="attention heads (default 12)")
    inspect.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of an input, batch first (4x1024x128; 4x20:int64 for token ids), one for each: "
        "how the parts of a fusion transformer that is no CAV-MAE are found",
    )
    inspect.add_argument("--logits", help="where the logits are in what the model returns")
    inspect.add_argument("--emit-spec", action="store_true", help="print a ModelSpec as Python")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from . import inspection

    model = inspection.open_model(options.model, options.num_heads)
    spec = None
    if options.input:
        spec = inspection.detect(model, options.input, options.logits, options.num_heads)
    if options.emit_spec:
        text = (spec or inspection.spec_of(model)).source()
        print(json.dumps({"spec": text}) if options.json else text)
        return 0
    try:
        found = inspection.describe(model, spec)
    except TypeError as error:  # a model that fasttta does not know
        raise ValueError(str(error)) from error
    found["heads_assumed"] = options.num_heads is None and "blocks" in found
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
    _study_parser(commands)
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

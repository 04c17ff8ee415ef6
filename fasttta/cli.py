"""The command line: ``fasttta <command>``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from . import __version__
from .commands import console

if TYPE_CHECKING:
    from pathlib import Path

    from .models.specified.spec import ModelSpec

    class _Report(Protocol):
        def to_html(self, path: str) -> Path: ...
        def to_png(self, folder: str) -> list[Path]: ...


_Commands = argparse._SubParsersAction  # argparse has no public name for it


def _seeds(text: str) -> list[int]:
    """Comma-separated seeds, each once."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: needed integers with commas between them, such as 0,1,2"
        ) from None
    outside = [seed for seed in seeds if not 0 <= seed < 2**63]
    if outside:
        raise argparse.ArgumentTypeError(f"{outside[0]} is out of range, needed 0 to 2**63 - 1")
    twice = [seed for i, seed in enumerate(seeds) if seed in seeds[:i]]
    if twice:
        raise argparse.ArgumentTypeError(f"{twice[0]} is given twice; needed different seeds")
    return seeds


def _names(text: str) -> list[str]:
    """Comma-separated names, each once."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r}: needed names with commas between them")
    return list(dict.fromkeys(names))


def _at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: needed an integer") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: needed at least 1")
    return number


def _demo_parser(commands: _Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="adapt a small trained model offline: audio-visual streams, or (demo clip) a CLIP",
        description="Adapts a small trained audio-visual transformer, label-free, on corrupted "
        "streams of handwritten and spoken digits, and prints accuracy next to the source model. "
        "fasttta demo clip: a small CLIP on images of digits, clean and attacked.",
    )
    demo.add_argument(
        "what", nargs="?", choices=["clip"], metavar="clip", help="the CLIP in place of streams"
    )
    demo.add_argument("--quick", action="store_true", help="fewer streams or methods, and samples")
    demo.add_argument("--json", action="store_true", help="print the report as JSON")
    demo.add_argument("--methods", type=_names, metavar="A,B", help="methods to run")
    demo.add_argument("--samples", type=int, help="samples in a stream (default 768; clip: 48)")
    demo.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1", help="(default 0)")
    streams = demo.add_argument_group("streams")
    streams.add_argument("--streams", type=_names, metavar="A,B", help="corruptions to run")
    streams.add_argument("--severity", type=float, help="1 to 8 (default 5)")
    streams.add_argument("--batch", type=int, help="samples in a batch (default 64)")
    clip = demo.add_argument_group("demo clip")
    clip.add_argument("--eps", type=float, help="radius of the attack, of 255 (default 4)")
    clip.add_argument("--steps", type=int, help="gradient steps of the attack (default 10)")
    clip.add_argument(
        "--labels", choices=["true", "pseudo"],
        help="what the attack moves away from: the true label (default) or the prediction",
    )  # fmt: skip
    _report_arguments(demo)
    demo.set_defaults(command=_demo)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        metavar="OUT.html",
        help="also write table and charts as one HTML file; needs the extra report: "
        "pip install 'fasttta[report]'",
    )
    parser.add_argument(
        "--png",
        action="store_true",
        help="also write the charts as PNG files into OUT-charts/ beside the HTML file",
    )


def _check_report(options: argparse.Namespace) -> None:
    """Refuses what could not be written, before anything is computed."""
    from .evaluate.output import check_extra, check_folder, check_output

    if options.png and options.report is None:
        raise ValueError("--png writes beside the HTML file; name that too: --report out.html")
    if options.report is not None:
        check_output(options.report, "--report")
        check_extra()
    if options.png:
        check_folder(_charts_folder(options.report), "--png: the folder of the charts")


def _charts_folder(report: str) -> str:
    return os.path.splitext(report)[0] + "-charts"


def _write_report(options: argparse.Namespace, report: _Report) -> None:
    """Writes what was asked for; says where on standard error, which JSON does not go to."""
    if options.report is None:
        return
    print(f"report: {report.to_html(options.report)}", file=sys.stderr)
    if options.png:
        paths = report.to_png(_charts_folder(options.report))
        print(f"charts: {len(paths)} files in {paths[0].parent}", file=sys.stderr)


_OF_STREAMS, _OF_CLIP = ("streams", "severity", "batch"), ("eps", "steps", "labels")


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those options that were given."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _demo(options: argparse.Namespace) -> int:
    clip = options.what == "clip"
    others = _given(options, _OF_STREAMS if clip else _OF_CLIP)
    if others:
        which = "demo clip takes no" if clip else "needs demo clip:"
        raise ValueError(f"{which} {', '.join(f'--{name}' for name in others)}")
    _check_report(options)
    chosen = _given(options, ("methods", "samples", *(_OF_CLIP if clip else _OF_STREAMS)))
    return (_demo_clip if clip else _demo_streams)(options, chosen)


def _demo_streams(options: argparse.Namespace, chosen: dict[str, Any]) -> int:
    from .demo import run as demo
    from .evaluate import Report

    settings = {**(demo.QUICK if options.quick else {}), **chosen}
    report = Report(demo.run(**settings, seeds=options.seeds, progress=demo.ProgressBar()))
    _print(report.data, report.table(), options.json)
    _write_report(options, report)
    return 0


def _demo_clip(options: argparse.Namespace, chosen: dict[str, Any]) -> int:
    from .demo.clip import report, run
    from .evaluate import ProgressBar

    settings = {**(run.QUICK if options.quick else {}), **chosen}
    found = run.run(
        **settings, seeds=options.seeds, examples=3 if options.report else 0,
        progress=ProgressBar(),
    )  # fmt: skip
    _print(found, report.table(found), options.json)
    _write_report(options, report.document(found))
    return 0


def _print(found: Mapping[str, Any], text: str, json_wanted: bool) -> None:
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


def _study_parser(commands: _Commands) -> None:
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
        "--seeds", type=_seeds, default=[0, 1, 2], metavar="0,1,2", help="(default 0,1,2)"
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


def _doctor_parser(commands: _Commands) -> None:
    doctor = commands.add_parser(
        "doctor", help="versions, device, which backends of which operation are live and why not"
    )
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from . import environment
    from .evaluate.output import as_json

    state = environment.diagnose()
    print(as_json(state) if options.json else environment.table(state))
    return 0


def _inspect_parser(commands: _Commands) -> None:
    inspect = commands.add_parser(
        "inspect", help="what a model is recognised as, and what each method would tune"
    )
    inspect.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint file (CAV-MAE, OpenAI's CLIP), or package.module:name of a module or of "
        "a function that builds one",
    )
    inspect.add_argument(
        "--num-heads", type=_at_least_one, help="attention heads of a CAV-MAE (default 12)"
    )
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
    from .commands import inspect as inspection
    from .evaluate.output import as_json

    model = inspection.open_model(options.model, options.num_heads)
    spec: ModelSpec | None = None
    if options.input:
        spec = inspection.detect(model, options.input, options.logits, options.num_heads)
    if options.emit_spec:
        text = (spec or inspection.spec_of(model)).source()
        print(as_json({"spec": text}) if options.json else text)
        return 0
    about = inspection.describe(model, spec)
    from_file = ":" not in options.model or os.path.exists(options.model)
    assumed = "blocks" in about or ("image" in about and from_file)
    about["heads_assumed"] = options.num_heads is None and assumed
    print(as_json(about) if options.json else inspection.table(about))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fasttta", description="Test-time adaptation of multi-modal models."
    )
    parser.add_argument("--version", action="version", version=f"fasttta {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for add in (_demo_parser, _study_parser, _inspect_parser, _doctor_parser):
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

"""``fasttta demo`` and ``fasttta study``: their arguments, and what runs them.

A module of the demo is imported when its command runs, so that ``fasttta --help`` does not import
torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    class _Report(Protocol):
        def to_html(self, path: str) -> Path: ...
        def to_png(self, folder: str) -> list[Path]: ...


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


def add_demo(commands: argparse._SubParsersAction) -> None:
    """Adds ``fasttta demo`` and ``fasttta demo clip`` to the subcommands of a parser."""
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
    """Refuses a report that could not be written, before anything is computed."""
    from ..evaluate.output import check_extra, check_folder, check_output

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
    """Writes the files of the report, and their paths to standard error: JSON goes to standard
    output."""
    if options.report is None:
        return
    print(f"report: {report.to_html(options.report)}", file=sys.stderr)
    if options.png:
        paths = report.to_png(_charts_folder(options.report))
        print(f"charts: {len(paths)} files in {paths[0].parent}", file=sys.stderr)


_OF_STREAMS, _OF_CLIP = ("streams", "severity", "batch"), ("eps", "steps", "labels")


def _chosen(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options with these names that stand on the command line."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _demo(options: argparse.Namespace) -> int:
    clip = options.what == "clip"
    unfit = _chosen(options, _OF_STREAMS if clip else _OF_CLIP)
    if unfit:
        which = "demo clip takes no" if clip else "needs demo clip:"
        raise ValueError(f"{which} {', '.join(f'--{name}' for name in unfit)}")
    _check_report(options)
    settings = _chosen(options, ("methods", "samples", *(_OF_CLIP if clip else _OF_STREAMS)))
    return (_demo_clip if clip else _demo_streams)(options, settings)


def _demo_streams(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    from ..evaluate import Report
    from . import run as demo

    settings = {**(demo.QUICK if options.quick else {}), **settings}
    report = Report(demo.run(**settings, seeds=options.seeds, progress=demo.ProgressBar()))
    _print(report.data, report.table(), options.json)
    _write_report(options, report)
    return 0


def _demo_clip(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    from ..evaluate import ProgressBar
    from .clip import report, run

    settings = {**(run.QUICK if options.quick else {}), **settings}
    data = run.run(
        **settings, seeds=options.seeds, examples=3 if options.report else 0,
        progress=ProgressBar(),
    )  # fmt: skip
    _print(data, report.table(data), options.json)
    _write_report(options, report.document(data))
    return 0


def _print(data: Mapping[str, Any], text: str, json_wanted: bool) -> None:
    """Prints results as JSON, or as text with the time and the machine below."""
    from ..evaluate.output import as_json

    if json_wanted:
        print(as_json(data))
        return
    machine = data["machine"]
    print(text)
    print(
        f"{data['seconds']:.1f} s on {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['torch']}"
    )


def add_study(commands: argparse._SubParsersAction) -> None:
    """Adds ``fasttta study`` to the subcommands of a parser."""
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
    from ..evaluate import ProgressBar
    from . import study

    _check_report(options)
    data = study.run(
        options.names or tuple(study.STUDIES),
        seeds=options.seeds,
        quick=options.quick,
        progress=ProgressBar(),
    )
    _print(data, study.table(data), options.json)
    _write_report(options, study.document(data))
    return 0

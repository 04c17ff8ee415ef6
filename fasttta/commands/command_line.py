"""``fasttta inspect``, ``warmup`` and ``doctor``: their arguments, and what runs them.

Modules that import torch are imported when a command runs, not for ``fasttta --help``.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from .cost import GPUS, count_elsewhere

if TYPE_CHECKING:
    from ..models.specified.spec import ModelSpec


def _at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: needed an integer") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: needed at least 1")
    return number


def _add_model(command: argparse.ArgumentParser) -> None:
    """Adds what says which model a command is about."""
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint file (CAV-MAE, OpenAI's CLIP), or package.module:name of a module or of "
        "a function that builds one",
    )
    command.add_argument(
        "--num-heads",
        type=_at_least_one,
        help="attention heads of a CAV-MAE (default: 12 at width 768, none at others)",
    )
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of an input, batch first (4x1024x128; 4x20:int64 for token ids), one for each: "
        "how the parts of a fusion transformer that is no CAV-MAE are found",
    )
    command.add_argument("--logits", help="where the logits are in what the model returns")


def add_inspect(commands: argparse._SubParsersAction) -> None:
    """Adds ``fasttta inspect`` to the subcommands of a parser."""
    inspect = commands.add_parser(
        "inspect", help="what a model is recognised as, and what each method would tune"
    )
    _add_model(inspect)
    inspect.add_argument("--emit-spec", action="store_true", help="print a ModelSpec as Python")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    _add_cost(inspect.add_argument_group(
        "cost", "what a step costs on a GPU, counted without one: launches, bytes, FLOP, memory, "
        "and an estimate of its time from published peaks"
    ))  # fmt: skip
    inspect.set_defaults(command=_inspect)


def _add_cost(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cost", action="store_true", help="count a step, in place of the rest")
    group.add_argument("--gpu", choices=GPUS, default="h200", help="(default: h200)")
    group.add_argument("--method", default="auto", help="(default: the family's)")
    group.add_argument("--batch", type=_at_least_one, default=8, help="samples (default: 8)")
    group.add_argument(
        "--classes", type=_at_least_one, default=100, help="of a CLIP (default: 100)"
    )
    group.add_argument("--engine", choices=("auto", "eager", "graph"), default="auto")
    group.add_argument("--precision", default="auto", help="as in fasttta.adapt (default: auto)")


def _inspect(options: argparse.Namespace) -> int:
    if options.cost:
        return count_elsewhere(options)
    from ..evaluate.output import as_json
    from . import inspect as inspection

    model = inspection.open_model(options.model, options.num_heads)
    spec: ModelSpec | None = None
    if options.input:
        spec = inspection.detect(model, options.input, options.logits, options.num_heads)
    if options.emit_spec:
        text = (spec or inspection.spec_of(model)).source()
        print(as_json({"spec": text}) if options.json else text)
        return 0
    description = inspection.describe(model, spec)
    from_file = ":" not in options.model or os.path.exists(options.model)
    assumed = "blocks" in description or ("image" in description and from_file)
    description["heads_assumed"] = options.num_heads is None and assumed
    print(as_json(description) if options.json else inspection.table(description))
    return 0


def add_warmup(commands: argparse._SubParsersAction) -> None:
    """Adds ``fasttta warmup`` to the subcommands of a parser."""
    warmup = commands.add_parser(
        "warmup",
        help="build and compile beforehand what a method needs on a model: library and kernels "
        "stay on the disk, captured graphs only show that they can be captured",
    )
    _add_model(warmup)
    warmup.add_argument("--method", default="auto", help="its name (default: auto)")
    warmup.add_argument(
        "--batch", type=_at_least_one, required=True, metavar="N", help="samples of a batch"
    )
    warmup.add_argument(
        "--window", type=_at_least_one, metavar="N", help="the method's, for --option window=N"
    )
    warmup.add_argument(
        "--views", type=_at_least_one, metavar="N", help="the method's, for --option views=N"
    )
    warmup.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="another of the method"
    )
    warmup.add_argument("--precision", default="auto", help="as of fasttta.adapt (default: auto)")
    warmup.add_argument("--engine", default="auto", help="as of fasttta.adapt (default: auto)")
    warmup.add_argument(
        "--encode-batch", type=_at_least_one, metavar="N", help="what stream() will encode at once"
    )
    warmup.add_argument(
        "--classes", metavar="N|FILE", help="of a CLIP: their number, or a file with a name a line"
    )
    warmup.add_argument("--source-stats", metavar="FILE", help="of SourceStats.save")
    warmup.add_argument("--device", help="default: the GPU if there is one that torch can use")
    warmup.add_argument("--json", action="store_true", help="print it as JSON")
    warmup.set_defaults(command=_warmup)


def _warmup(options: argparse.Namespace) -> int:
    import torch

    from ..evaluate.output import as_json
    from . import warmup
    from .inspect import open_model

    named = {"window": options.window, "views": options.views}
    given = warmup.parsed(options.option)
    given |= {name: value for name, value in named.items() if value is not None}
    model = open_model(options.model, options.num_heads)
    report = warmup.reported(lambda: warmup.warm(
        model, options.method, options.batch,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        precision=options.precision, engine=options.engine, encode_batch=options.encode_batch,
        shapes=options.input, logits=options.logits, num_heads=options.num_heads,
        classes=options.classes, source_stats=options.source_stats, options=given,
    ))  # fmt: skip
    print(as_json(report.as_dict()) if options.json else report)
    return 0


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """Adds ``fasttta doctor`` to the subcommands of a parser."""
    doctor = commands.add_parser(
        "doctor", help="versions, device, which backends of which operation are live and why not"
    )
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from .. import environment
    from ..evaluate.output import as_json

    state = environment.diagnose()
    print(as_json(state) if options.json else environment.table(state))
    return 0

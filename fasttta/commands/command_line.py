"""``fasttta inspect`` and ``fasttta doctor``: their arguments, and what runs them.

Modules that import torch are imported when a command runs, not for ``fasttta --help``.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

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


def add_inspect(commands: argparse._SubParsersAction) -> None:
    """Adds ``fasttta inspect`` to the subcommands of a parser."""
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
        "--num-heads",
        type=_at_least_one,
        help="attention heads of a CAV-MAE (default: 12 at width 768, none at others)",
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

"""Why ABPEM does what it does, on the demo's model: three measurements.

``gap``: attention gap and accuracy against the severity of corruptions. ``ablate``: loss terms and
options, one at a time. ``gradients``: how gradients of label-free losses agree with the
cross-entropy's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ...evaluate import machine
from ...evaluate.document import Document, Facts, Heading, Text
from ...evaluate.report import readable
from ..digits import load_model
from . import ablate, gap, gradients

STUDIES = {"gap": gap, "ablate": ablate, "gradients": gradients}
SEEDS = (0, 1, 2)


def run(
    names: Sequence[str] = tuple(STUDIES),
    *,
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """Runs studies on the demo's model.

    Args:
        names: of ``STUDIES``.
        seeds: each chooses pairs, their order and the corruptions' noise; spreads are over them.
        quick: fewer samples and settings.
        progress: called with (runs done, runs in all, what runs now), for each study from 0.

    Returns:
        JSON-ready: ``"studies"``: {name: what the study's own ``run`` returns}, ``"machine"``,
        ``"toy"``, ``"seconds"``.

    Raises:
        ValueError: an unknown name, or no seed.
    """
    unknown = [name for name in names if name not in STUDIES]
    if unknown or not names:
        raise ValueError(
            f"study: {', '.join(unknown) or 'none'} unknown; known: {', '.join(STUDIES)}"
        )
    if not seeds:
        raise ValueError("seeds: found none; needed at least one, e.g. --seeds 0,1,2")
    start, model = time.perf_counter(), load_model()
    studies = {}
    for name in dict.fromkeys(names):
        begin = time.perf_counter()
        result = STUDIES[name].run(
            model, seeds=seeds, progress=progress, **(STUDIES[name].QUICK if quick else {})
        )
        studies[name] = result | {"seconds": time.perf_counter() - begin}
    return {
        "title": "fasttta study: what adapts, and why",
        "toy": "real handwritten digits with the same digit in synthetic speech and a model of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "studies": studies,
        "machine": machine(),
        "seconds": time.perf_counter() - start,
    }


def table(data: dict[str, Any]) -> str:
    """The results as text."""
    texts = [STUDIES[name].table(result) for name, result in data["studies"].items()]
    return "\n\n".join(
        [*texts, f"A toy: {data['toy']}; no evidence about models of published size."]
    )


def document(data: dict[str, Any]) -> Document:
    """The results as a report: ``.to_html(path)``, ``.to_png(folder)``."""
    parts: list = [
        Text(
            "Three measurements behind attention bootstrapping with principal entropy "
            "minimisation (ABPEM), on a model small enough to repeat them on a laptop.",
            "lead",
        ),
        Text(
            f"A toy: {data['toy']}. It shows how the mechanism behaves here and is no evidence "
            "about models of published size.",
            "note",
        ),
    ]
    for name, result in data["studies"].items():
        parts += STUDIES[name].parts(result)
        protocol = result["protocol"] | {"took": f"{result['seconds']:.1f} s"}
        parts.append(Heading(f"Protocol of {name}"))
        parts.append(Facts({key: readable(value) for key, value in protocol.items()}))
    parts.append(Heading("Machine"))
    shown = {name: readable(value) for name, value in data["machine"].items()}
    parts.append(Facts(shown | {"whole run": f"{data['seconds']:.1f} s"}))
    return Document(data["title"], parts)

"""The results of ``fasttta demo clip``, as text and as a page."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

from ...evaluate.charts import Dots, Mark, Row
from ...evaluate.document import (
    Cell,
    Document,
    Facts,
    Figure,
    Gallery,
    Heading,
    Part,
    Picture,
    Share,
    Table,
    Text,
    Tiles,
)
from ...evaluate.report import readable

ABOUT = {
    "source": "zero-shot, as trained",
    "tpt": "prompt tuned on the mean prediction of confident views",
    "c-tpt": "the same, less dispersed classes held back",
    "r-tpt": "prompt tuned on each confident view; views that agree count more",
    "a-tpt": "views mixed where the model does not attend; smooth attention counts more",
    "mta": "robust mean of the views' features, nothing tuned",
    "ttc": "counterattack on the image, nothing tuned",
}


def _methods(data: dict[str, Any]) -> list[str]:
    return list(next(iter(data["streams"].values())))


def _several(data: dict[str, Any]) -> bool:
    return len(data["protocol"]["seeds"]) > 1


def table(data: dict[str, Any]) -> str:
    """Accuracy of each method on clean and on attacked images, speed, and what was assumed."""
    streams, several = data["streams"], _several(data)

    def cell(method: str, stream: str) -> str:
        record = streams[stream][method]
        return f"{record['score']:.1f}" + (f" ±{record['score_std']:.1f}" if several else "")

    head = f"{'accuracy, %':<12}" + "".join(f"{name:>14}" for name in streams)
    lines = [f"{head}{'images/s':>12}"]
    lines.append("-" * len(lines[0]))
    for method in _methods(data):
        cells = "".join(f"{cell(method, stream):>14}" for stream in streams)
        lines.append(f"{method:<12}{cells}{speed(data, method):>12,.0f}")
    return "\n".join([*lines, "", *(textwrap.fill(x, 80, subsequent_indent="  ")
                                    for x in notes(data))])  # fmt: skip


def speed(data: dict[str, Any], method: str) -> float:
    """Images a second, over all streams."""
    return statistics.fmean(x[method]["samples_per_s"] for x in data["streams"].values())


def notes(data: dict[str, Any]) -> list[str]:
    """The threat model, the protocol, and what the numbers are no evidence of."""
    p = data["protocol"]
    return [
        f"threat: {data['threat']['text']}; it breaks {data['success']:.1f} % of the images that "
        "are right when clean",
        f"protocol: {p['samples']} images, {p['views']} views each, one step, prompt "
        f"{p['prompt']}, published settings else; seeds {', '.join(map(str, p['seeds']))}; "
        f"{p['order']}",
        f"a toy: {data['toy']}; the attacker does not know of the adaptation, so these are no "
        "bounds on robustness, and orderings of methods are no evidence about models of published "
        "size",
    ]


def document(data: dict[str, Any]) -> Document:
    """The results as a report: ``.to_html(path)``, ``.to_png(folder)``."""
    methods = _methods(data)
    styles = {m: 0 if m == "source" else i for i, m in enumerate(methods, "source" not in methods)}
    scores = {m: {s: x[m]["score"] for s, x in data["streams"].items()} for m in methods}
    best = max(methods, key=lambda m: scores[m]["attacked"])
    lead = (
        f"{best} is right on {scores[best]['attacked']:.1f} % of the attacked images and on "
        f"{scores[best]['clean']:.1f} % of the clean ones"
    )
    if "source" in scores and best != "source":
        lead += (
            f"; the model as trained on {scores['source']['attacked']:.1f} % and "
            f"{scores['source']['clean']:.1f} %"
        )
    parts: list[Part] = [
        Text(lead + ".", "lead"),
        *(Text(note[:1].upper() + note[1:] + ".", "note") for note in notes(data)),
        Tiles(
            [(styles[m], f"{scores[m]['attacked']:.1f} %", f"{m}, under attack") for m in methods]
        ),
        Heading("Accuracy"),
        _table(data, methods),
        Facts({m: ABOUT.get(m, "a registered method") for m in methods}),
        _chart(data, methods),
    ]
    if data["examples"]:
        parts.append(Heading("Inside A-TPT"))
        parts += [part for example in data["examples"] for part in _example(example)]
    threat = {name: readable(x) for name, x in data["threat"].items() if name != "text"}
    parts += [
        Heading("Threat model"),
        Facts(threat),
        Heading("Protocol"),
        Facts({name: readable(value) for name, value in data["protocol"].items()}),
        Heading("Machine"),
        Facts(
            {name: readable(value) for name, value in data["machine"].items()}
            | {"whole run": f"{data['seconds']:.1f} s"}
        ),
    ]
    return Document(data["title"], parts)


def _table(data: dict[str, Any], methods: list[str]) -> Table:
    several = _several(data)
    rows: list[list[str | Cell]] = []
    best = {s: max(x["score"] for x in records.values()) for s, records in data["streams"].items()}
    for m in methods:
        cells: list[str | Cell] = []
        for stream, records in data["streams"].items():
            spread = f" ±{records[m]['score_std']:.1f}" if several else ""
            score = records[m]["score"]
            cells.append(Cell(f"{score:.1f}", "", spread, score == best[stream]))
        rows.append([m, *cells, f"{speed(data, m):,.0f}"])
    caption = (
        "Top-1 accuracy in percent; shaded is the best of a column. "
        + ("± is the standard deviation over seeds. " if several else "")
        + "Images a second are of the method's own episodes on this machine."
    )
    return Table(["method", *data["streams"], "images/s"], rows, caption)


def _chart(data: dict[str, Any], methods: list[str]) -> Figure:
    marks = {"clean": 2, "attacked": 1}
    rows = [
        Row(m, [
            Mark(s, marks[s], records[m]["score"], records[m]["score_std"])
            for s, records in data["streams"].items()
        ])
        for m in methods
    ]  # fmt: skip
    return Figure(
        "Clean and attacked",
        [Dots("accuracy by method", "accuracy, %", rows)],
        "What a method gives up on clean images for what it recovers on attacked ones"
        + ("; whiskers are standard deviations over seeds." if _several(data) else "."),
        [(s, style) for s, style in marks.items()],
    )


def _example(example: dict[str, Any]) -> list[Gallery]:
    digit = example["digit"]
    pair = [
        [Picture(example["clean"]["picture"], f"the clean image, a {digit}"),
         Picture(example["attacked"]["picture"], "the attacked image"),
         Picture(example["perturbation"], "the perturbation, stretched"),
         example["clean"]["says"], example["attacked"]["says"], example["adapted"]],
    ]  # fmt: skip
    rows = [
        [
            "anchor" if x["view"] == 0 else f"{x['view']}",
            *(Picture(x[name], f"view {x['view']}: {what}") for name, what in (
                ("base", "the crop"), ("attention", "attention"), ("region", "regions"),
                ("mixed", "mixed"))),
            f"{x['entropy']:.2f}",
            f"{x['tv']:.1f}",
            Share(x["weight"]) if x["selected"] else "not selected",
            x["says"],
        ]
        for x in example["views"]
    ]  # fmt: skip
    return [
        Gallery(
            f"A {digit}",
            ["clean", "attacked", "change, stretched", "clean: says", "attacked: says",
             "A-TPT: says"],
            pair,
        ),
        Gallery(
            f"Its views in A-TPT ({digit})",
            ["view", "crop", "attention", "regions", "mixed", "entropy", "variation", "weight",
             "says, tuned"],
            rows,
            "The views that are selected, by ascending entropy, and the least certain of the "
            "others. Attention is bright where the view's predicted class comes from; regions are "
            "yellow where it is high (there the mixed view keeps its own pixels) and dark where it "
            "is low (there an augmented copy shows through); variation is the total variation of "
            "the attention map, and the weight falls with it.",
        ),
    ]  # fmt: skip

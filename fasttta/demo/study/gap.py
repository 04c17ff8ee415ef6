"""Attention gap and accuracy against the severity of a corruption, with and without adapting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ...evaluate.charts import Line, Lines
from ...evaluate.document import Figure, Heading, Table, Text
from ...methods import ABPEM, Source
from ...models import CAVMAE
from ..digits import SEVERITIES, stream
from ..run import SETTINGS, adapt_stream, encode_stream
from .spread import rank_correlation, several_seeds, shown, spread

# one corruption that takes signal away and one that adds noise, for each modality
STREAMS = {"contrast": "video", "gaussian": "video", "low-pass": "audio", "white": "audio"}
QUICK = {"streams": ("contrast", "white"), "severities": (2, 5, 8), "samples": 192}
PARTS = ("va|aa", "av|vv", "aa|va", "vv|av")
_NAMES = {p: "KL({}‖{})".format(*p.split("|")) for p in PARTS}


def run(
    model: CAVMAE,
    *,
    seeds: Sequence[int],
    streams: Sequence[str] = tuple(STREAMS),
    severities: Sequence[float] = tuple(range(SEVERITIES[0], SEVERITIES[1] + 1)),
    samples: int = 512,
    batch: int = 64,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """Source model and ABPEM at every severity, from 0 (clean).

    Returns:
        ``"protocol"``; ``"streams"``: {stream: a list over severities of {"severity", "source":
        {"accuracy", "gap" and its ``PARTS``}, "adapted": the same with ABPEM's weights at the
        end}}, each number a mean with its standard deviation over seeds.
    """
    methods = {"source": Source(), "adapted": ABPEM(**SETTINGS["abpem"])}
    runs: dict[tuple, list[dict[str, float]]] = {}
    total = len(seeds) * len(methods) * (1 + len(streams) * len(severities))
    done = 0

    def measure(name: str, severity: float, seed: int) -> None:
        nonlocal done
        at = severity or SEVERITIES[0]  # the clean stream has none
        batches = stream(name, severity=at, samples=samples, batch=batch, seed=seed)
        encoded = encode_stream(model, batches)
        for which, method in methods.items():
            progress(done, total, f"gap: {name} {severity:g}, {which}")
            result, gap = adapt_stream(model, method, batches, encoded)
            numbers = {"accuracy": result["score"], **gap}
            runs.setdefault((name, severity, which), []).append(numbers)
            done += 1

    for seed in seeds:
        measure("clean", 0, seed)
        for name in streams:
            for severity in severities:
                measure(name, severity, seed)
    progress(done, total, "done")

    def point(name: str, severity: float) -> dict[str, Any]:
        stream_name = name if severity else "clean"
        by_method = {which: runs[stream_name, severity, which] for which in methods}
        return {"severity": severity} | {
            which: {key: spread([run[key] for run in measured]) for key in measured[0]}
            for which, measured in by_method.items()
        }

    return {
        "protocol": {
            "streams": {name: f"{STREAMS.get(name, 'corruption')} corrupted" for name in streams},
            "severities": [0, *severities],
            "samples": samples,
            "batch": batch,
            "seeds": list(seeds),
            "adapted": {"method": "abpem", **SETTINGS["abpem"]},
            "gap": "head-mean raw scores, mean over all samples of a stream, with the source's "
            "weights and with the weights after the last batch",
            "accuracy": "top-1 over all samples, in percent, as each method scores",
        },
        "streams": {name: [point(name, s) for s in (0, *severities)] for name in streams},
    }


def correlations(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlation of the source model's gap with severity and with accuracy."""
    gaps = [point["source"]["gap"]["mean"] for point in points]
    return {
        "severity": rank_correlation([point["severity"] for point in points], gaps),
        "accuracy": rank_correlation(
            [point["source"]["accuracy"]["mean"] for point in points], gaps
        ),
    }


def table(data: dict[str, Any]) -> str:
    """As text: accuracy and gap, source → adapted, at every severity."""
    show = partial(shown, several=several_seeds(data))
    lines = ["gap: attention gap in nats and accuracy in %, source → abpem", ""]
    for name, points in data["streams"].items():
        lines.append(f"{name:<10}{'gap':>32}{'accuracy':>34}")
        for point in points:
            source, adapted = point["source"], point["adapted"]
            gaps = f"{show(source['gap'], 2)} → {show(adapted['gap'], 2)}"
            scores = f"{show(source['accuracy'])} → {show(adapted['accuracy'])}"
            lines.append(f"{point['severity']:>5g}     {gaps:>32}{scores:>34}")
        correlation = correlations(points)
        lines.append(
            f"  rank correlation of the source's gap with severity {correlation['severity']:+.2f}, "
            f"with accuracy {correlation['accuracy']:+.2f}"
        )
        lines.append("")
    return "\n".join(lines).rstrip()


def parts(data: dict[str, Any]) -> list:
    """What the report shows."""
    streams, several = data["streams"], several_seeds(data)
    legend = [("source", 0), ("abpem", 3)]

    def lines(key: str, label: str, log: bool) -> list[Lines]:
        charts = []
        for name, points in streams.items():
            curves = [
                _line(points, which, key, shown_as, style)
                for which, (shown_as, style) in zip(("source", "adapted"), legend, strict=True)
            ]
            charts.append(Lines(_title(name), "severity (0: clean)", label, curves, log=log))
        return charts

    pieces = [
        Lines(
            _title(name), "severity (0: clean)", "nats (logarithmic)",
            [_line(points, "source", p, _NAMES[p], i) for i, p in enumerate(PARTS, 1)], log=True,
        )
        for name, points in streams.items()
    ]  # fmt: skip
    rows = []
    for name, points in streams.items():
        r = correlations(points)
        ends = (points[0]["source"]["gap"], points[-1]["source"]["gap"])
        rows.append(
            [
                name, *(shown(end, 2, several=several) for end in ends),
                f"{r['severity']:+.2f}", f"{r['accuracy']:+.2f}",
            ]
        )  # fmt: skip
    worst = f"gap at severity {next(iter(streams.values()))[-1]['severity']:g}"
    band = " Bands: ± one standard deviation over seeds." if several else ""
    means = ", mean ± standard deviation over seeds," if several else ""
    of_means = " of the seeds' means" if several else ""
    return [
        Heading("Does the attention gap grow with the shift?"),
        Text(_summary(streams)),
        Table(
            ["stream", "gap, clean", worst, "rank correlation with severity", "with accuracy"],
            rows,
            f"Attention gap of the source model in nats{means} and Spearman's rank correlation "
            f"over severities{of_means}.",
        ),
        Figure(
            "Attention gap against severity", lines("gap", "gap, nats (logarithmic)", True),
            f"KL(va‖aa) + KL(av‖vv) of the fusion block's raw scores.{band}", legend,
        ),
        Figure(
            "Accuracy against severity", lines("accuracy", "accuracy, %", False),
            f"Top-1 accuracy over the whole stream; severities above 5 are beyond the usual "
            f"benchmarks.{band}", legend,
        ),
        Figure(
            "Parts of the gap of the source model", pieces,
            f"Both pairs in both directions. The first two make up the gap and ABPEM's loss.{band}",
            [(_NAMES[p], i) for i, p in enumerate(PARTS, 1)],
        ),
    ]  # fmt: skip


def _title(name: str) -> str:
    return f"{name} ({STREAMS[name]})" if name in STREAMS else name


def _line(points: Sequence[dict], which: str, key: str, name: str, style: int) -> Line:
    values = [point[which][key] for point in points]
    at = [(point["severity"], v["mean"]) for point, v in zip(points, values, strict=True)]
    return Line(name, style, at, spread=[v["std"] for v in values])


def _summary(streams: dict[str, list]) -> str:
    grown = []
    for name, points in streams.items():
        first, last = (points[i]["source"]["gap"]["mean"] for i in (0, -1))
        grown.append(f"{last / first:.1f} times on {name}")
    dips = [
        name
        for name, points in streams.items()
        if min(point["source"]["gap"]["mean"] for point in points[1:])
        < points[0]["source"]["gap"]["mean"]
    ]
    text = f"At the highest severity the gap is {', '.join(grown)} what it is on clean data."
    if dips:
        text += f" It is not monotone: on {', '.join(dips)} it first falls below the clean value."
    return text

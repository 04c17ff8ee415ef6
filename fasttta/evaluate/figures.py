"""The figures of a ``Report``, with captions that say what is seen in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .charts import Dots, Heat, Line, Lines, Mark, Panel, Row
from .document import Figure, Heading

if TYPE_CHECKING:
    from .report import Report

GAPS = {
    "gap": "gap = KL(va‖aa) + KL(av‖vv)",
    "va|aa": "KL(va‖aa)",
    "av|vv": "KL(av‖vv)",
}
WINDOW = 4  # batches in a moving average: 256 samples of the demo


def accuracy(report: Report) -> Figure:
    """Accuracy of the scored prediction along every stream."""
    charts = []
    for name, found in report.data["streams"].items():
        lines = []
        for method, record in found.items():
            x, batches = _along(record, _scored(record))
            smooth = _along(record, _scored(record), WINDOW)[1]
            lines.append(
                Line(
                    method, report.styles[method],
                    list(zip(x, smooth, strict=True)), list(zip(x, batches, strict=True)),
                )
            )  # fmt: skip
        charts.append(Lines(name, "samples seen", "accuracy, %", lines))
    caption = (
        f"Accuracy of the scored prediction: dots are single batches, lines the last {WINDOW} "
        f"batches together{_seeds(report)}. {_trend(report)}"
    )
    return Figure("Accuracy along the stream", charts, caption, legend(report))


def classes(report: Report) -> Figure:
    """Which classes were predicted along every stream, of the first seed."""
    names = [str(name) for name in report.data["classes"]]
    charts = []
    for name, found in report.data["streams"].items():
        panels = [
            Panel(method, _shares(record["series"][0], "predicted"))
            for method, record in found.items()
        ]
        charts.append(Heat(name, "batches", "predicted class", names, panels))
    seed = report.data["protocol"].get("seeds", [0])[0]
    caption = (
        "Share of each batch's scored predictions that falls on each class, from the first batch "
        f"(left) to the last (right), seed {seed}. Labels are spread evenly, so an even tint is "
        "right and a dark row is a method that answers one class whatever it is given. "
        + _collapse(report)
    )
    return Figure("Predicted classes along the stream", charts, caption)


def gaps(report: Report) -> list[Heading | Figure]:
    """Attention gap with the source's weights and with each method's last ones; nothing where the
    model has no fusion attention."""
    streams = report.data["streams"]
    if not all("gap_after" in record for found in streams.values() for record in found.values()):
        return []
    charts = []
    for part, title in GAPS.items():
        rows = []
        for name, found in streams.items():
            before = next(iter(found.values()))[f"{part}_before"]
            marks = [Mark("source weights", 0, before)]
            marks += [
                Mark(f"after {method}", report.styles[method], record[f"{part}_after"])
                for method, record in found.items()
                if method != "source"
            ]
            rows.append(Row(name, marks))
        charts.append(Dots(title, "nats (logarithmic)", rows, log=True))
    records = {m: [found[m] for found in streams.values()] for m in report.methods if m != "source"}
    smaller = {m: sum(r["gap_after"] < r["gap_before"] for r in rs) for m, rs in records.items()}
    told = ", ".join(f"{m} on {n} of {len(streams)}" for m, n in smaller.items())
    caption = (
        "Divergence of the distributions of raw cross-modal scores from those of self-attention "
        "scores in the fusion block (query modality first), mean over a stream's samples, with "
        "the source model's weights and with those at the end of the stream. "
    ) + (f"The gap is smaller after adapting: {told} streams." if told else "")
    figure = Figure("Attention gap before and after adaptation", charts, caption, legend(report))
    return [Heading("Attention gap"), figure]


def legend(report: Report) -> list[tuple[str, int]]:
    return [(method, report.styles[method]) for method in report.methods]


# ------------------------------------------------------------------ numbers


def _scored(record: dict[str, Any]) -> str:
    return "hits_after" if record["score"] == record["after"] else "hits_before"


def _along(record: dict[str, Any], key: str, window: int = 1) -> tuple[list[int], list[float]]:
    """(samples seen, accuracy in percent of the last ``window`` batches) after every batch, over
    all seeds."""
    series, x, y, seen = record["series"], [], [], 0
    for i, size in enumerate(series[0]["samples"]):
        seen += size
        part = slice(max(0, i + 1 - window), i + 1)
        samples = sum(sum(one["samples"][part]) for one in series)
        x.append(seen)
        y.append(100 * sum(sum(one[key][part]) for one in series) / samples)
    return x, y


def _shares(series: dict[str, Any], key: str) -> list[list[float]]:
    """[classes][batches]"""
    rows = zip(*series[key], strict=True)
    return [[n / b for n, b in zip(row, series["samples"], strict=True)] for row in rows]


def _seeds(report: Report) -> str:
    count = len(report.data["protocol"].get("seeds", ()))
    return f", mean over {count} seeds" if count > 1 else ""


def _thirds(record: dict[str, Any]) -> tuple[float, float]:
    """Accuracy in percent over the first and over the last third of the batches."""
    key = _scored(record)
    n = len(record["series"][0]["samples"])
    cut = max(1, n // 3)
    found = []
    for part in (slice(0, cut), slice(n - cut, n)):
        hits = sum(sum(one[key][part]) for one in record["series"])
        found.append(100 * hits / sum(sum(one["samples"][part]) for one in record["series"]))
    return found[0], found[1]


def _trend(report: Report) -> str:
    """The strongest rise and the strongest fall of a method between the ends of a stream."""
    change = {
        (method, name): _thirds(record)
        for name, found in report.data["streams"].items()
        for method, record in found.items()
        if method != "source"
    }
    if not change:
        return ""
    told = []
    for word, sign in (("rise", 1), ("fall", -1)):
        (method, name), (first, last) = max(
            change.items(), key=lambda item: sign * (item[1][1] - item[1][0])
        )
        if sign * (last - first) > 1:
            told.append(f"the largest {word} is {method} on {name}, {first:.0f} → {last:.0f} %")
    return f"From the first third of a stream to the last, {' and '.join(told)}." if told else ""


def _collapse(report: Report) -> str:
    """Who answers one class far more often than the labels hold any, in the last third."""
    names, told = report.data["classes"], []
    for name, found in report.data["streams"].items():
        for method, record in found.items():
            series = record["series"][0]
            n = len(series["samples"])
            last = slice(n - max(1, n // 3), n)
            total = sum(series["samples"][last])
            predicted = [sum(row) for row in zip(*series["predicted"][last], strict=True)]
            labels = [sum(row) for row in zip(*series["labels"][last], strict=True)]
            top = max(range(len(predicted)), key=predicted.__getitem__)
            if predicted[top] > 2.5 * max(labels):
                share = 100 * predicted[top] / total
                told.append((share, f"{method} on {name}: {share:.0f} % “{names[top]}”"))
    if not told:
        return (
            "In the last third no method gives one class more than 2.5 times the commonest label."
        )
    worst = "; ".join(text for _, text in sorted(told, reverse=True)[:6])
    return (
        "In the last third of the stream these give one class more than 2.5 times as often as the "
        f"commonest label occurs: {worst}."
    )

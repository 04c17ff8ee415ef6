"""The figures of a ``Report``, with captions that say what is seen in them.

Each takes the report's data, as ``Report`` describes it, and {method: style}, the number of each
method's colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .charts import Dots, Heat, Line, Lines, Mark, Panel, Row
from .document import Figure, Heading
from .table import mean_over_streams, mean_spread, several_seeds

Data = Mapping[str, Any]
Styles = Mapping[str, int]

GAPS = {
    "gap": "gap = KL(va‖aa) + KL(av‖vv)",
    "va|aa": "KL(va‖aa)",
    "av|vv": "KL(av‖vv)",
}
WINDOW = 4  # batches in a moving average: 256 samples of the demo


def scores(data: Data, styles: Styles) -> Figure:
    """Accuracy of the scored prediction on each stream, and its mean."""
    rows = [
        Row(stream, [
            Mark(method, styles[method], record["score"], record["score_std"])
            for method, record in records.items()
        ])
        for stream, records in data["streams"].items()
    ]  # fmt: skip
    if len(rows) > 1:
        marks = [
            Mark(m, style, mean_over_streams(data, m, "score"), mean_spread(data, m))
            for m, style in styles.items()
        ]
        rows.append(Row("mean", marks, strong=True))
    whiskers = " Whiskers: standard deviation over seeds." if several_seeds(data) else ""
    return Figure(
        "Accuracy by stream",
        [Dots("scored prediction", "accuracy, %", rows)],
        f"Accuracy of the prediction that a method is scored with.{whiskers}",
        list(styles.items()),
    )


def accuracy(data: Data, styles: Styles) -> Figure:
    """Accuracy of the scored prediction along every stream."""
    charts = []
    for stream, records in data["streams"].items():
        lines = []
        for method, record in records.items():
            seen, batches = _along(record)
            smooth = _along(record, WINDOW)[1]
            points, dots = zip(seen, smooth, strict=True), zip(seen, batches, strict=True)
            lines.append(Line(method, styles[method], list(points), list(dots)))
        charts.append(Lines(stream, "samples seen", "accuracy, %", lines))
    caption = (
        f"Accuracy of the scored prediction: dots are single batches, lines the last {WINDOW} "
        f"batches together{_seeds(data)}. {_trend(data)}"
    )
    return Figure("Accuracy along the stream", charts, caption, list(styles.items()))


def classes(data: Data) -> Figure:
    """Which classes were predicted along every stream, for the first seed."""
    names = [str(name) for name in data["classes"]]
    charts = []
    for stream, records in data["streams"].items():
        panels = [Panel(method, _shares(record["series"][0])) for method, record in records.items()]
        charts.append(Heat(stream, "batches", "predicted class", names, panels))
    seed = data["protocol"].get("seeds", [0])[0]
    caption = (
        "Share of each batch's scored predictions that falls on each class, from the first batch "
        f"(left) to the last (right), seed {seed}. Labels are spread evenly, so an even tint is "
        "right and a dark row is a method that answers one class whatever it is given. "
        + _collapse(data)
    )
    return Figure("Predicted classes along the stream", charts, caption)


def gaps(data: Data, styles: Styles) -> list[Heading | Figure]:
    """Attention gap with the source's weights and with each method's last ones; nothing where the
    model has no fusion attention."""
    streams = data["streams"]
    if any(
        "gap_after" not in record for records in streams.values() for record in records.values()
    ):
        return []
    charts = []
    for part, title in GAPS.items():
        rows = []
        for stream, records in streams.items():
            before = next(iter(records.values()))[f"{part}_before"]
            marks = [Mark("source weights", 0, before)]
            marks += [
                Mark(f"after {method}", styles[method], record[f"{part}_after"])
                for method, record in records.items()
                if method != "source"
            ]
            rows.append(Row(stream, marks))
        charts.append(Dots(title, "nats (logarithmic)", rows, log=True))
    smaller = {
        method: sum(x[method]["gap_after"] < x[method]["gap_before"] for x in streams.values())
        for method in styles
        if method != "source"
    }
    counts = ", ".join(f"{method} on {n} of {len(streams)}" for method, n in smaller.items())
    caption = (
        "Divergence of the distributions of raw cross-modal scores from those of self-attention "
        "scores in the fusion block (query modality first), mean over a stream's samples, with "
        "the source model's weights and with those at the end of the stream. "
    ) + (f"The gap is smaller after adapting: {counts} streams." if counts else "")
    title = "Attention gap before and after adaptation"
    return [Heading("Attention gap"), Figure(title, charts, caption, list(styles.items()))]


def _scored(record: Mapping[str, Any]) -> str:
    """Name of the series of hits that the method is scored with."""
    return "hits_after" if record["score"] == record["after"] else "hits_before"


def _percent(record: Mapping[str, Any], batches: slice) -> float:
    """Accuracy over some batches of all seeds."""
    hits = sum(sum(series[_scored(record)][batches]) for series in record["series"])
    return 100 * hits / sum(sum(series["samples"][batches]) for series in record["series"])


def _along(record: Mapping[str, Any], window: int = 1) -> tuple[list[int], list[float]]:
    """(samples seen, accuracy of the last ``window`` batches in percent), after every batch."""
    seen, total = [], 0
    for size in record["series"][0]["samples"]:
        total += size
        seen.append(total)
    ends = range(1, len(seen) + 1)
    return seen, [_percent(record, slice(max(0, end - window), end)) for end in ends]


def _thirds(record: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy in percent over the first and over the last third of the batches."""
    n = len(record["series"][0]["samples"])
    third = max(1, n // 3)
    return _percent(record, slice(0, third)), _percent(record, slice(n - third, n))


def _shares(series: Mapping[str, Any]) -> list[list[float]]:
    """Shares of the predicted classes: [classes][batches]."""
    rows = zip(*series["predicted"], strict=True)
    return [[n / b for n, b in zip(row, series["samples"], strict=True)] for row in rows]


def _seeds(data: Data) -> str:
    count = len(data["protocol"].get("seeds", ()))
    return f", mean over {count} seeds" if count > 1 else ""


def _trend(data: Data) -> str:
    """The strongest rise and the strongest fall of a method between the ends of a stream."""
    ends = {
        (method, stream): _thirds(record)
        for stream, records in data["streams"].items()
        for method, record in records.items()
        if method != "source"
    }
    sentences = []
    for word, sign in (("rise", 1), ("fall", -1)):
        if not ends:
            continue
        (method, stream), (first, last) = max(
            ends.items(), key=lambda item: sign * (item[1][1] - item[1][0])
        )
        if sign * (last - first) > 1:
            change = f"{first:.0f} → {last:.0f} %"
            sentences.append(f"the largest {word} is {method} on {stream}, {change}")
    if not sentences:
        return ""
    return f"From the first third of a stream to the last, {' and '.join(sentences)}."


def _collapse(data: Data) -> str:
    """Which methods predict one class far more often than the labels hold any, in the last
    third."""
    collapses = []
    for stream, records in data["streams"].items():
        for method, record in records.items():
            series = record["series"][0]
            n = len(series["samples"])
            last = slice(n - max(1, n // 3), n)
            total = sum(series["samples"][last])
            predicted = [sum(row) for row in zip(*series["predicted"][last], strict=True)]
            labels = [sum(row) for row in zip(*series["labels"][last], strict=True)]
            top = max(range(len(predicted)), key=predicted.__getitem__)
            if predicted[top] > 2.5 * max(labels):
                share = 100 * predicted[top] / total
                text = f"{method} on {stream}: {share:.0f} % “{data['classes'][top]}”"
                collapses.append((share, text))
    if not collapses:
        return (
            "In the last third no method gives one class more than 2.5 times the commonest label."
        )
    worst = "; ".join(text for _, text in sorted(collapses, reverse=True)[:6])
    return (
        "In the last third of the stream these give one class more than 2.5 times as often as the "
        f"commonest label occurs: {worst}."
    )

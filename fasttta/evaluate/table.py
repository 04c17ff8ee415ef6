"""A comparison of methods as a text table."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from typing import Any

_WIDTH, _FIRST, _SOURCE = 80, 16, 8  # of a line, of streams' names, of the source's accuracy


def several_seeds(data: Mapping[str, Any]) -> bool:
    """Whether there is a spread over seeds to show."""
    return any(len(each["series"]) > 1 for records in data["streams"].values()
               for each in records.values())  # fmt: skip


def mean_over_streams(data: Mapping[str, Any], method: str, key: str) -> float:
    """A method's number, averaged over streams that count alike."""
    return statistics.fmean(records[method][key] for records in data["streams"].values())


def mean_spread(data: Mapping[str, Any], method: str) -> float:
    """Standard deviation over seeds (n - 1) of a method's accuracy averaged over streams."""
    streams = [records[method] for records in data["streams"].values()]
    when = data["protocol"].get("score_at", {}).get(method)
    if when not in ("before", "after"):  # the source model, or data without that setting
        when = "after" if streams[0]["score"] == streams[0]["after"] else "before"
    of_seeds = [
        statistics.fmean(100 * sum(run[f"hits_{when}"]) / sum(run["samples"]) for run in runs)
        for runs in zip(*(stream["series"] for stream in streams), strict=True)
    ]
    return statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0


def table(data: Mapping[str, Any]) -> str:
    """Accuracy before and after the update, spread over seeds, speed, and the protocol.

    No line is longer than 80 characters: methods that do not fit get another table below.

    Args:
        data: as ``Report`` takes it.
    """
    methods = list(next(iter(data["streams"].values())))
    adapting = [m for m in methods if m != "source"]
    first = _FIRST + (_SOURCE if "source" in methods else 0)
    fitting = (_WIDTH - first) // _cell_width(data)
    blocks = [adapting[i : i + fitting] for i in range(0, len(adapting), fitting)] or [[]]
    tables = ["\n".join(_lines(data, block, "source" in methods)) for block in blocks]
    return "\n\n".join(
        [*tables, "\n".join(textwrap.fill(n, _WIDTH, subsequent_indent="  ") for n in notes(data))]
    )


def _cell_width(data: Mapping[str, Any]) -> int:
    return 20 if several_seeds(data) else 14


def _lines(data: Mapping[str, Any], adapting: list[str], source: bool) -> list[str]:
    """The table of some methods, with the source model's column if it ran."""
    width = _cell_width(data)

    def line(first: str, of_source: str, cells: list[str]) -> str:
        of_source = f"{of_source:>{_SOURCE}}" if source else ""
        return f"{first:<{_FIRST}}{of_source}" + "".join(f"{c:>{width}}" for c in cells)

    def cell(before: float, after: float, spread: float) -> str:
        return f"{before:.1f} → {after:.1f}" + (f" ±{spread:.1f}" if several_seeds(data) else "")

    def row(first: str, key: str, digits: int, cells: list[str]) -> str:
        of_source = f"{mean_over_streams(data, 'source', key):,.{digits}f}" if source else ""
        return line(first, of_source, cells)

    def mean(method: str, key: str) -> float:
        return mean_over_streams(data, method, key)

    lines = [line("accuracy, %", "source", adapting)]
    lines.append("-" * len(lines[0]))
    for name, records in data["streams"].items():
        cells = [cell(*(records[m][k] for k in ("before", "after", "score_std"))) for m in adapting]
        lines.append(line(name, f"{records['source']['score']:.1f}" if source else "", cells))
    lines.append("-" * len(lines[0]))
    means = [cell(mean(m, "before"), mean(m, "after"), mean_spread(data, m)) for m in adapting]
    lines.append(row("mean", "score", 1, means))
    speeds = [f"{mean(m, 'samples_per_s'):,.0f}" for m in adapting]
    lines.append(row("samples/s", "samples_per_s", 0, speeds))
    return lines


def notes(data: Mapping[str, Any]) -> list[str]:
    """What must be read with the numbers: their meaning, the protocol, what they are no evidence
    of."""
    lines = [
        "a → b: accuracy of each batch's predictions before and after the update on it; samples/s "
        "are of the method's own steps"
    ]
    if several_seeds(data):
        lines.append("±: standard deviation over seeds, of the prediction that a method scores")
    protocol = _protocol(data)
    if protocol:
        lines.append(f"protocol: {protocol}")
    if "toy" in data:
        lines.append(
            f"a toy: {data['toy']}; orderings of methods here are no evidence about models of "
            "published size"
        )
    return lines


def _protocol(data: Mapping[str, Any]) -> str:
    """Those of the usual settings that the protocol names."""
    p = data["protocol"]
    texts = {
        "severity": "severity {:g}",
        "samples": "{} samples a stream",
        "batch": "batch {}",
        "steps": "{} step a batch, one pass",
    }
    parts = [", ".join(text.format(p[name]) for name, text in texts.items() if name in p)]
    for method in next(iter(data["streams"].values())):
        lr, when = p.get("lr", {}).get(method), p.get("score_at", {}).get(method)
        settings = ([f"lr {lr:g}"] if lr is not None else []) + ([f"scored {when}"] if when else [])
        if settings:
            parts.append(f"{method} {' '.join(settings)}")
    if "seeds" in p:
        parts.append(f"seeds {', '.join(map(str, p['seeds']))}")
    return "; ".join(filter(None, [*parts, p.get("order"), p.get("reset")]))

"""A comparison of methods as a text table."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any


def mean_over_streams(data: dict[str, Any], method: str, key: str) -> float:
    """A method's number, averaged over streams that count alike."""
    return statistics.fmean(found[method][key] for found in data["streams"].values())


def table(data: dict[str, Any]) -> str:
    """Accuracy before and after the update, spread over seeds, speed, and the protocol.

    Args:
        data: as ``Report`` takes it.
    """
    streams = data["streams"]
    methods = list(next(iter(streams.values())))
    adapting = [m for m in methods if m != "source"]
    several = len(data["protocol"]["seeds"]) > 1
    width = 20 if several else 14

    def cell(found: dict[str, float]) -> str:
        spread = f" ±{found['score_std']:.1f}" if several else ""
        return f"{found['before']:.1f} → {found['after']:.1f}{spread}"

    def line(first: str, source: str, cells: list[str]) -> str:
        source = f"{source:>8}" if "source" in methods else ""
        return f"{first:<16}{source}" + "".join(f"{c:>{width}}" for c in cells)

    def mean(method: str, key: str) -> float:
        return mean_over_streams(data, method, key)

    lines = [line("accuracy, %", "source", adapting)]
    lines.append("-" * len(lines[0]))
    for name, found in streams.items():
        source = f"{found['source']['score']:.1f}" if "source" in found else ""
        lines.append(line(name, source, [cell(found[m]) for m in adapting]))
    lines.append("-" * len(lines[0]))
    lines.append(
        line(
            "mean",
            f"{mean('source', 'score'):.1f}" if "source" in methods else "",
            [f"{mean(m, 'before'):.1f} → {mean(m, 'after'):.1f}" for m in adapting],
        )
    )
    lines.append(
        line(
            "samples/s",
            f"{mean('source', 'samples_per_s'):,.0f}" if "source" in methods else "",
            [f"{mean(m, 'samples_per_s'):,.0f}" for m in adapting],
        )
    )
    return "\n".join(
        [*lines, "", *(textwrap.fill(n, 92, subsequent_indent="  ") for n in notes(data))]
    )


def notes(data: dict[str, Any]) -> list[str]:
    """What must be read with the numbers: their meaning, the protocol, what they are no evidence
    of."""
    p = data["protocol"]
    adapting = [m for m in next(iter(data["streams"].values())) if m != "source"]
    settings = "; ".join(f"{n} lr {p['lr'][n]:g} scored {p['score_at'][n]}" for n in adapting)
    found = [
        "a → b: accuracy of each batch's predictions before and after the update on it; samples/s "
        "are of the method's own steps",
        f"protocol: severity {p['severity']:g}, {p['samples']} samples a stream, batch "
        f"{p['batch']}, {p['steps']} step a batch, one pass; {settings}{'; ' if settings else ''}"
        f"seeds {', '.join(map(str, p['seeds']))}; {p['order']}; {p['reset']}",
    ]
    if "toy" in data:
        found.append(
            f"a toy: {data['toy']}; orderings of methods here are no evidence about models of "
            "published size"
        )
    return found

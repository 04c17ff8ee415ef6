"""The three kinds of charts in reports, as data; ``svg`` and ``png`` draw them.

A style is a number: 0 the baseline (grey), 1 to 6 the colour-blind safe palette of Okabe and Ito.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Args: points (x, y) joined by a line; dots: single points, faint; spread: of each y."""

    name: str
    style: int
    points: Sequence[Point]
    dots: Sequence[Point] = ()
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class Lines:
    """Lines over a common x axis.

    Args:
        y_range: lowest and highest y; None: what the lines need.
        log: logarithmic y axis.
        x_ticks: (x, label) pairs; None: round numbers.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    y_range: tuple[float, float] | None = None
    log: bool = False
    x_ticks: Sequence[tuple[float, str]] | None = None


@dataclass(frozen=True)
class Mark:
    """A value in a row, with its spread (standard deviation) as a whisker."""

    name: str
    style: int
    value: float
    spread: float = 0.0


@dataclass(frozen=True)
class Row:
    """A label and its marks; without marks a heading."""

    label: str
    marks: Sequence[Mark] = ()
    strong: bool = False


@dataclass(frozen=True)
class Dots:
    """A dot plot: a row a label, values along x.

    Args:
        reference: x of a vertical line, e.g. the value that rows are compared with.
    """

    title: str
    x_label: str
    rows: Sequence[Row]
    log: bool = False
    reference: float | None = None


@dataclass(frozen=True)
class Panel:
    """shares [rows][columns], each from 0 to 1."""

    name: str
    shares: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Heat:
    """Small maps of shares side by side, darker for more; all panels have one scale.

    Args:
        full: the share that is drawn darkest; more looks the same.
    """

    title: str
    x_label: str
    y_label: str
    row_labels: Sequence[str]
    panels: Sequence[Panel]
    full: float = 0.5


Chart = Lines | Dots | Heat


def number(value: float) -> str:
    """As short as it can be read on an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], about so many; of an empty range its only value."""
    if low == high:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((f * power for f in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with digits in between where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [d * 10.0**e for e in exponents for d in digits if low <= d * 10.0**e <= high]
        if len(found) >= 3:
            return found
    return ticks(low, high)


def value_range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Lowest and highest value with a margin, never empty.

    Raises:
        ValueError: nothing is finite (or, on a logarithmic axis, positive).
    """
    usable = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not usable:
        raise ValueError("a chart without a finite value" + (" above 0" if log else ""))
    low, high = min(usable), max(usable)
    if log:
        margin = max((high / low) ** 0.06, 1.05)
        return low / margin, high * margin
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def lines_range(chart: Lines) -> tuple[float, float]:
    """Lowest and highest y that a chart of lines shows."""
    if chart.y_range is not None:
        return chart.y_range
    values = [y for line in chart.lines for _, y in (*line.points, *line.dots)]
    for line in chart.lines:
        for (_, y), s in zip(line.points, line.spread, strict=bool(line.spread)):
            values += [y - s, y + s]
    return value_range(values, chart.log)


def dots_range(chart: Dots) -> tuple[float, float]:
    """Lowest and highest x that a dot plot shows."""
    marks = [mark for row in chart.rows for mark in row.marks]
    values = [mark.value + sign * mark.spread for mark in marks for sign in (-1, 1)]
    if chart.log:  # a whisker that reaches below 0 has no end here
        values += [mark.value for mark in marks]
    if chart.reference is not None:
        values.append(chart.reference)
    return value_range(values, chart.log)

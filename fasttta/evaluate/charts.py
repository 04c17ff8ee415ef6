"""The three kinds of charts as data; ``drawing`` draws them.

A style is a number: 0 the baseline (grey), 1 to 6 the colour-blind safe palette of Okabe and Ito.
Numbers that are not finite are left out of a drawing, as are those not above 0 on a logarithmic
axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a ``Lines`` chart.

    Args:
        name: what the line shows, for the reader who points at it.
        style: number of its colour and marker.
        points: (x, y) pairs, joined by the line.
        dots: (x, y) pairs that stand alone, drawn faint.
        spread: for each of the points how far a band reaches above and below it, or nothing.
    """

    name: str
    style: int
    points: Sequence[Point]
    dots: Sequence[Point] = ()
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class Lines:
    """Lines over a common x axis.

    Args:
        log: logarithmic y axis.
        x_ticks: (x, label) pairs; None: round numbers.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
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
    """A label and its marks; without marks it is a heading."""

    label: str
    marks: Sequence[Mark] = ()
    strong: bool = False


@dataclass(frozen=True)
class Dots:
    """A dot plot: one row for each label, values along x.

    Args:
        log: logarithmic x axis.
        reference: x of a vertical line, for example the value that rows are compared with.
        unit: where it is set, each mark's number is written beside it, followed by the unit.
    """

    title: str
    x_label: str
    rows: Sequence[Row]
    log: bool = False
    reference: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Panel:
    """One map of a ``Heat`` chart: shares [rows][columns], each from 0 to 1."""

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
    """A number as short as it can be read on an axis: "0.25", "91.35", "1,200"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

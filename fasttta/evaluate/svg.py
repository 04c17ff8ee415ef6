"""Charts as inline SVG for the HTML report; colours and fonts come from the page's style sheet.

A chart is 360 wide, about the width of a phone, so that its text is readable everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from .charts import Chart, Dots, Heat, Lines, dots_range, lines_range, log_ticks, number, ticks

WIDTH, HEIGHT = 360, 232
STYLES = 7  # colours in the style sheet: s0 the baseline, s1 ... s6
LANE = 5  # between the marks of a row, so that equal values do not hide each other
LEVELS = 10  # steps of darkness in a map
Scale = Callable[[float], float]


def draw(chart: Chart) -> str:
    """One <svg> element."""
    if isinstance(chart, Lines):
        return _lines(chart)
    return _dots(chart) if isinstance(chart, Dots) else _heat(chart)


def marker(x: float, y: float, style: int, title: str = "") -> str:
    """A mark whose shape differs by style as well as its colour."""
    r, s = 4.2, 3.8
    shapes = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",  # circle
        f"M{x:.1f} {y - r - 1:.1f}l{r + 0.6} {2 * r}h{-2 * r - 1.2}z",  # triangle up
        f"M{x - s:.1f} {y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}z",  # square
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",  # diamond
        f"M{x:.1f} {y + r + 1:.1f}l{r + 0.6} {-2 * r}h{-2 * r - 1.2}z",  # triangle down
    )
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="mark f{style % STYLES}" d="{shapes[style % len(shapes)]}">{inside}</path>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Scale:
    if low == high:
        return lambda value: (start + end) / 2
    if log:
        low, high = math.log(low), math.log(high)

    def at(value: float) -> float:
        if log:
            value = math.log(value) if value > 0 else low
        return start + (end - start) * (value - low) / (high - low)

    return at


def _lines(chart: Lines) -> str:
    low, high = lines_range(chart)
    left, right, top, bottom = 38, WIDTH - 10, 40, HEIGHT - 36
    xs = [x for line in chart.lines for x, _ in line.points]
    x_at = _scale(min(xs), max(xs), left + 6, right - 6)
    y_at = _scale(low, high, bottom, top, chart.log)
    parts = [
        _text(4, 14, chart.title, "title", "start"),
        _text(4, 30, chart.y_label, "axis", "start"),
    ]
    for value in log_ticks(low, high) if chart.log else ticks(low, high):
        y = y_at(value)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(_text(left - 5, y + 3.5, number(value), anchor="end"))
    x_ticks = chart.x_ticks
    if x_ticks is None:
        x_ticks = [(value, number(value)) for value in ticks(min(xs), max(xs), 6)]
    parts += [_text(x_at(value), bottom + 15, label) for value, label in x_ticks]
    parts.append(_text((left + right) / 2, HEIGHT - 5, chart.x_label, "axis"))
    for line in chart.lines:
        style = line.style % STYLES
        if line.spread:
            band = list(zip(line.points, line.spread, strict=True))
            edge = [(x, y + s) for (x, y), s in band] + [(x, y - s) for (x, y), s in band[::-1]]
            at = [f"{x_at(x):.1f} {min(max(y_at(y), top), bottom):.1f}" for x, y in edge]
            parts.append(f'<path class="band f{style}" d="M{"L".join(at)}z"/>')
        parts += [
            f'<circle class="dot f{style}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="1.8"/>'
            for x, y in line.dots
        ]
    for line in chart.lines:
        at = [f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in line.points]
        name = f"<title>{escape(line.name)}</title>"
        path = f'<path class="line l{line.style % STYLES}" d="M{"L".join(at)}">{name}</path>'
        parts.append(path)
        if len(line.points) <= 12:
            parts += [
                marker(x_at(x), y_at(y), line.style, f"{line.name}: {number(y)} at {number(x)}")
                for x, y in line.points
            ]
    return _svg(chart.title, HEIGHT, parts)


def _dots(chart: Dots) -> str:
    low, high = dots_range(chart)
    labels = max(len(row.label) for row in chart.rows)
    left, right, top = min(170, 14 + 5.6 * labels), WIDTH - 12, 28
    step = 15 + LANE * max(len(row.marks) for row in chart.rows)
    bottom = top + step * len(chart.rows)
    x_at = _scale(low, high, left + 8, right - 4, chart.log)
    parts = [_text(4, 14, chart.title, "title", "start")]
    for value in log_ticks(low, high) if chart.log else ticks(low, high, 4):
        parts.append(f'<path class="grid" d="M{x_at(value):.1f} {top}V{bottom}"/>')
        parts.append(_text(x_at(value), bottom + 15, number(value)))
    parts.append(_text((left + right) / 2, bottom + 31, chart.x_label, "axis"))
    if chart.reference is not None:
        parts.append(f'<path class="reference" d="M{x_at(chart.reference):.1f} {top}V{bottom}"/>')
    for i, row in enumerate(chart.rows):
        y = top + step * (i + 0.5)
        if not row.marks:
            parts.append(_text(4, y + 4, row.label, "heading", "start"))
            continue
        kind = "label strong" if row.strong else "label"
        parts.append(_text(left, y + 3.5, row.label, kind, "end"))
        for lane, mark in enumerate(row.marks):
            at = y + LANE * (lane - (len(row.marks) - 1) / 2)
            spread = f" ± {number(mark.spread)}" if mark.spread else ""
            if mark.spread:
                ends = (max(x_at(mark.value - mark.spread), left), x_at(mark.value + mark.spread))
                whisker = f"M{ends[0]:.1f} {at:.1f}H{ends[1]:.1f}"
                parts.append(f'<path class="whisker l{mark.style % STYLES}" d="{whisker}"/>')
            title = f"{row.label}, {mark.name}: {number(mark.value)}{spread}"
            parts.append(marker(x_at(mark.value), at, mark.style, title))
    return _svg(chart.title, bottom + 38, parts)


def _heat(chart: Heat) -> str:
    across = 2 if len(chart.panels) > 1 else 1
    gap, left, top = 14, 26, 22
    width = (WIDTH - left - 8 - gap * (across - 1)) / across
    rows = len(chart.row_labels)
    height = 8 * rows
    down = math.ceil(len(chart.panels) / across)
    total = top + down * (height + 22) + 22
    parts = [_text(4, 14, chart.title, "title", "start")]
    for i, panel in enumerate(chart.panels):
        x0, y0 = left + (i % across) * (width + gap), top + (i // across) * (height + 22) + 16
        columns = len(panel.shares[0])
        cell_w, cell_h = width / columns, height / rows
        parts.append(_text(x0, y0 - 5, panel.name, "label", "start"))
        parts.append(
            f'<path class="panel" d="M{x0:.1f} {y0:.1f}h{width:.1f}v{height}h{-width:.1f}z"/>'
        )
        for level in range(1, LEVELS + 1):
            cell = f"h{cell_w:.1f}v{cell_h:g}h{-cell_w:.1f}z"
            cells = [
                f"M{x0 + c * cell_w:.1f} {y0 + r * cell_h:.1f}{cell}"
                for r, row in enumerate(panel.shares)
                for c, share in enumerate(row)
                if _level(share, chart.full) == level
            ]
            if cells:
                opacity = level / LEVELS
                parts.append(
                    f'<path class="heat" fill-opacity="{opacity:g}" d="{"".join(cells)}"/>'
                )
        if i % across == 0:
            for r in (0, rows - 1):
                parts.append(
                    _text(x0 - 5, y0 + cell_h * (r + 0.5) + 3.5, chart.row_labels[r], anchor="end")
                )
    parts.append(
        _text(WIDTH / 2, total - 5, f"{chart.x_label} →   (rows: {chart.y_label})", "axis")
    )
    return _svg(chart.title, total, parts)


def _level(share: float, full: float) -> int:
    return round(LEVELS * min(max(share, 0.0) / full, 1.0))

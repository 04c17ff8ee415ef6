"""Draws charts with matplotlib: one drawing each, as SVG for a page or a file, or as PNG.

A chart is 360 points wide, about the width of a phone, so that its text is readable everywhere.
Colours are those of ``markup.LIGHT``; in SVG they become CSS variables, so that a page shows the
same drawing in the light and the dark. The same chart gives the same bytes, with the same
matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D

from .charts import Chart, Dots, Heat, Lines, Panel, number
from .markup import LIGHT, markup, style_sheet

STYLES = 7  # s0 the baseline, s1 to s6
WIDTH, HEIGHT = 360, 232  # points
LANE = 6  # points between the marks of a row, so that equal values do not hide each other
LEVELS = 10  # steps of darkness in a map
PANEL = 8  # height of a map's row in points
FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
MARKERS = (("o", 8.0), ("^", 8.8), ("s", 7.2), ("D", 6.8), ("v", 8.8))  # shape, size in points
SETTINGS = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that PNG files are the same anywhere
    "font.size": 10.5,
    "svg.fonttype": "none",  # text stays text
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.xmargin": 0.04,
    "axes.ymargin": 0.07,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 1.0,
    "text.color": LIGHT["text"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.scale_dashes": False,
    "lines.solid_joinstyle": "round",
    "lines.solid_capstyle": "round",
}


@contextmanager
def _settings(salt: str = "") -> Iterator[None]:
    """Our settings in place of the user's; salt makes the ids inside an SVG."""
    with matplotlib.style.context(["default", SETTINGS | {"svg.hashsalt": salt}]):
        yield


class _Canvas:
    """A place for one chart, measured in points from its upper left corner."""

    def __init__(self, figure: Figure | SubFigure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height
        #: of an artist's id: what is read when one points at it, and then at each of its marks
        self.titles: dict[str, list[str]] = {}

    def axes(self, left: float, top: float, right: float, bottom: float) -> Axes:
        """Axes whose frame has these edges."""
        return self.figure.add_axes((
            left / self.width, 1 - bottom / self.height,
            (right - left) / self.width, (bottom - top) / self.height,
        ))  # fmt: skip

    def text(self, x: float, y: float, text: str, colour: str = "muted", **options: Any) -> None:
        """Text whose baseline begins (or, with ``ha``, is centred or ends) at a point."""
        self.figure.text(
            x / self.width, 1 - y / self.height, text, color=LIGHT[colour], parse_math=False,
            **options,
        )  # fmt: skip

    def title(self, text: str) -> None:
        """The title of the chart."""
        self.text(4, 14, text, "text", weight="bold", size=12.5)

    def name(self, *titles: str) -> str:
        """A new id for an artist that has these titles."""
        key = f"named-{len(self.titles)}"
        self.titles[key] = list(titles)
        return key


def svg(chart: Chart) -> str:
    """One <svg> element for a page that defines the colours as ``markup.style_sheet`` does.

    Args:
        chart: to be drawn. A mark's title, which browsers show at the pointer, is its number.
    """
    with _settings(repr(chart)):
        figure = Figure(figsize=(WIDTH / 72, _height(chart) / 72))
        canvas = _Canvas(figure, WIDTH, _height(chart))
        _draw(chart, canvas)
        return markup(figure, canvas.titles, {"role": "img", "aria-label": chart.title})


def svg_file(chart: Chart, legend: Sequence[tuple[str, int]] = ()) -> bytes:
    """An SVG file that stands alone: with a background, and colours for the light and the dark.

    Args:
        legend: (name, style) of what the chart's colours mean, written below it.
    """
    foot = 26 if legend else 4
    height = _height(chart) + foot
    with _settings(repr(chart)):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        rows = figure.add_gridspec(2, 1, height_ratios=(_height(chart), foot), hspace=0)
        canvas = _Canvas(figure.add_subfigure(rows[0]), WIDTH, _height(chart))
        _draw(chart, canvas)
        _legend(figure, [_key(style, xdata=(), ydata=(), label=name) for name, style in legend])
        sheet = f"text{{font-family:{FONT}}}{style_sheet()}"
        attributes = {"xmlns": "http://www.w3.org/2000/svg"}
        return (markup(figure, canvas.titles, attributes, sheet) + "\n").encode()


def key(style: int) -> str:
    """A small <svg> element that stands for a style in a legend."""
    with _settings("key"):
        figure = Figure(figsize=(26 / 72, 12 / 72))
        figure.add_artist(_key(style, xdata=(1 / 26, 0.5, 25 / 26), ydata=(0.5, 0.5, 0.5)))
        return markup(figure, {}, {"class": "key", "aria-hidden": "true"})


def png(charts: Sequence[Chart], title: str, legend: Sequence[tuple[str, int]]) -> bytes:
    """One PNG file with several charts, up to three beside each other.

    Args:
        legend: (name, style) of what the charts' colours mean.
    """
    across = min(3, len(charts))
    down = math.ceil(len(charts) / across)
    height = max(map(_height, charts))
    top, bottom = 30.0, 30.0  # for the title and the legend
    total = top + down * height + bottom
    with _settings():
        figure = Figure(figsize=(across * WIDTH / 72, total / 72), facecolor=LIGHT["card"])
        figure.text(0.5, 1 - 20 / total, title, ha="center", size=14, weight="bold")
        rows = figure.add_gridspec(3, 1, height_ratios=(top, down * height, bottom), hspace=0)
        body = figure.add_subfigure(rows[1], facecolor="none")
        cells = body.add_gridspec(down, across, wspace=0, hspace=0)
        for i, chart in enumerate(charts):
            part = body.add_subfigure(cells[i // across, i % across], facecolor="none")
            _draw(chart, _Canvas(part, WIDTH, height))
        handles: list[Artist] = [
            _key(style, xdata=(), ydata=(), label=name) for name, style in legend
        ]
        heat = next((chart for chart in charts if isinstance(chart, Heat)), None)
        if heat is not None:
            handles += [
                Patch(color=LIGHT["s2"], alpha=share, lw=0, label=f"{100 * share * heat.full:g} %")
                for share in (0.2, 0.6, 1.0)
            ]
        _legend(figure, handles)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        return file.getvalue()


def _height(chart: Chart) -> float:
    """Height of a chart in points."""
    if isinstance(chart, Lines):
        return HEIGHT
    if isinstance(chart, Dots):
        return 66 + _step(chart) * len(chart.rows)
    _, down = _grid(chart)
    return 44 + down * (PANEL * len(chart.row_labels) + 22)


def _draw(chart: Chart, canvas: _Canvas) -> None:
    canvas.title(chart.title)
    if isinstance(chart, Lines):
        _lines(chart, canvas)
    elif isinstance(chart, Dots):
        _dots(chart, canvas)
    else:
        _heat(chart, canvas)


def _colour(style: int) -> str:
    return LIGHT[f"s{style % STYLES}"]


def _marks(style: int) -> dict[str, Any]:
    """Markers whose shape differs by style as well as their colour."""
    shape, size = MARKERS[style % len(MARKERS)]
    return {
        "color": _colour(style), "marker": shape, "markersize": size,
        "markeredgecolor": LIGHT["card"], "markeredgewidth": 1,
    }  # fmt: skip


def _key(style: int, **options: Any) -> Line2D:
    return Line2D(markevery=[1], **_stroke(style), **_marks(style), **options)


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """What the colours of a figure mean, in one row at its foot."""
    if handles:
        figure.legend(
            handles=handles, loc="lower center", ncols=len(handles), frameon=False,
            columnspacing=1.2, handletextpad=0.5,
        )  # fmt: skip


def _stroke(style: int) -> dict[str, Any]:
    """A line; that of the baseline is dashed."""
    return {"linewidth": 2, "linestyle": (0, (5, 4)) if style == 0 else "-"}


def _seen(values: Sequence[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    """Those points that can be drawn."""
    return [(x, y) for x, y in values if math.isfinite(y) and (y > 0 or not log)]


def _ticks(axis: Any, log: bool, about: int = 7) -> None:
    """At most about so many round numbers; to be called once everything has been drawn."""
    low, high = axis.get_view_interval()
    if (
        log and high > 2 * low
    ):  # 1, 2 and 5 in each power of ten, and more of them where there is less than one
        digits = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
        axis.set_major_locator(LogLocator(subs=digits, numticks=12))
    else:
        axis.set_major_locator(MaxNLocator(nbins=about, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _lines(chart: Lines, canvas: _Canvas) -> None:
    left, right, top, bottom = 38, canvas.width - 10, 40, canvas.height - 36
    axes = canvas.axes(left, top, right, bottom)
    canvas.text(4, 30, chart.y_label)
    canvas.text((left + right) / 2, canvas.height - 5, chart.x_label, ha="center")
    if chart.log:
        axes.set_yscale("log")
    axes.grid(axis="y")
    for line in chart.lines:
        points, colour = _seen(line.points, chart.log), _colour(line.style)
        if line.spread:
            band = [(x, y, s) for (x, y), s in zip(line.points, line.spread, strict=True)]
            x, low, high = zip(*((x, y - s, y + s) for x, y, s in band), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        if dots := _seen(line.dots, chart.log):
            x, y = zip(*dots, strict=True)
            axes.scatter(x, y, s=10, color=colour, alpha=0.5, linewidth=0)
        titles, marks = [line.name], {}
        if len(points) <= 12:
            titles += [f"{line.name}: {number(y)} at {number(x)}" for x, y in points]
            marks = _marks(line.style)
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            x, y, **_stroke(line.style), **{"color": colour, **marks}, clip_on=False,
            gid=canvas.name(*titles),
        )  # fmt: skip
    _ticks(axes.yaxis, chart.log)
    if chart.x_ticks is None:
        _ticks(axes.xaxis, False, 8)
    else:
        axes.set_xticks(*zip(*chart.x_ticks, strict=True))


def _step(chart: Dots) -> float:
    """Height of a row in points."""
    return 15 + LANE * max((len(row.marks) for row in chart.rows), default=1)


def _dots(chart: Dots, canvas: _Canvas) -> None:
    longest = max((len(row.label) for row in chart.rows if row.marks), default=0)
    left, right, top = min(190, 14 + 5.9 * longest), canvas.width - (40 if chart.unit else 12), 28
    step = _step(chart)
    bottom = top + step * len(chart.rows)
    axes = canvas.axes(left, top, right, bottom)
    canvas.text((left + right) / 2, bottom + 31, chart.x_label, ha="center")
    if chart.log:
        axes.set_xscale("log")
    axes.set_yticks([])
    axes.set_ylim(step * len(chart.rows), 0)  # in points
    axes.grid(axis="x")
    if chart.reference is not None:
        axes.axvline(chart.reference, color=LIGHT["muted"], lw=1, ls=(0, (2, 3)), zorder=1)
    for i, row in enumerate(chart.rows):
        middle = step * (i + 0.5)
        if not row.marks:
            canvas.text(4, top + middle + 4, row.label, weight="bold")
            continue
        weight = "bold" if row.strong else "normal"
        canvas.text(left, top + middle + 3.5, row.label, "text", ha="right", weight=weight)
        for lane, mark in enumerate(row.marks):
            y = middle + LANE * (lane - (len(row.marks) - 1) / 2)
            if not _seen([(0.0, mark.value)], chart.log):
                continue
            spread = ""
            if mark.spread:
                spread = f" ± {number(mark.spread)}"
                ends = [mark.value - mark.spread, mark.value + mark.spread]
                axes.plot(
                    ends, [y, y], color=_colour(mark.style), lw=1.6, alpha=0.55,
                    solid_capstyle="butt",
                )  # fmt: skip
            if chart.unit:
                axes.annotate(
                    f"{mark.value:.3g}{chart.unit}", (mark.value, y), (7, -3.5),
                    textcoords="offset points", color=LIGHT["muted"], annotation_clip=False,
                )  # fmt: skip
            title = f"{row.label}, {mark.name}: {number(mark.value)}{spread}"
            axes.plot(
                [mark.value], [y], linestyle="none", **_marks(mark.style), clip_on=False,
                gid=canvas.name("", title),
            )  # fmt: skip
    _ticks(axes.xaxis, chart.log, 6)


def _grid(chart: Heat) -> tuple[int, int]:
    """How many panels are beside and below each other."""
    across = 2 if len(chart.panels) > 1 else 1
    return across, math.ceil(len(chart.panels) / across)


def _heat(chart: Heat, canvas: _Canvas) -> None:
    across, down = _grid(chart)
    gap, left, top = 14, 26, 22
    width = (canvas.width - left - 8 - gap * (across - 1)) / across
    height = PANEL * len(chart.row_labels)
    for i, panel in enumerate(chart.panels):
        x, y = left + (i % across) * (width + gap), top + (i // across) * (height + 22) + 16
        canvas.text(x, y - 5, panel.name, "text")
        axes = canvas.axes(x, y, x + width, y + height)
        axes.set(xticks=[], xlim=(0, len(panel.shares[0])), ylim=(len(chart.row_labels), 0))
        axes.spines[:].set(visible=True, color=LIGHT["line"], linewidth=0.8)
        ends = (0, len(chart.row_labels) - 1) if i % across == 0 else ()
        axes.set_yticks([r + 0.5 for r in ends], [chart.row_labels[r] for r in ends])
        for level in range(1, LEVELS + 1):
            if cells := _cells(panel, chart.full, level):
                path = Path.make_compound_path(*cells)
                axes.add_patch(PathPatch(path, color=LIGHT["s2"], alpha=level / LEVELS, lw=0))
    foot = top + down * (height + 22) + 17
    text = f"{chart.x_label} →   (rows: {chart.y_label})"
    canvas.text(canvas.width / 2, foot, text, ha="center")


def _cells(panel: Panel, full: float, level: int) -> list[Path]:
    """The cells of a map that have one level of darkness; one path for all of them, because
    neighbours in separate paths show seams."""
    return [
        Path.unit_rectangle().transformed(Affine2D().translate(c, r))
        for r, row in enumerate(panel.shares)
        for c, share in enumerate(row)
        if math.isfinite(share) and round(LEVELS * min(max(share, 0.0) / full, 1.0)) == level
    ]

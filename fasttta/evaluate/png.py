"""Charts as PNG files, drawn by matplotlib (the extra ``fasttta[report]``)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from .charts import Chart, Dots, Heat, Lines, dots_range, lines_range, log_ticks, number

# the style sheet's light colours
COLOURS = ("#6b7480", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "^", "s", "D", "v")


def draw(charts: Sequence[Chart], title: str, legend: Sequence[tuple[str, int]]) -> bytes:
    """One PNG file with several charts, up to three beside each other.

    The same charts give the same bytes, with the same matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    across = min(3, len(charts))
    down = math.ceil(len(charts) / across)
    heights = max(_height(chart) for chart in charts)
    figure = Figure(figsize=(4.6 * across, heights * down + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    cells = figure.add_gridspec(down, across)
    for i, chart in enumerate(charts):
        cell = cells[i // across, i % across]
        if isinstance(chart, Lines):
            _lines(figure, cell, chart)
        elif isinstance(chart, Dots):
            _dots(figure, cell, chart)
        else:
            _heat(figure, cell, chart)
    if legend:
        handles = [
            Line2D([], [], color=_colour(style), marker=_marker(style), label=name)
            for name, style in legend
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(legend), frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def _height(chart: Chart) -> float:
    return 1.2 + 0.24 * len(chart.rows) if isinstance(chart, Dots) else 3.1


def _colour(style: int) -> str:
    return COLOURS[style % len(COLOURS)]


def _marker(style: int) -> str:
    return MARKERS[style % len(MARKERS)]


def _bare(axes, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _log_axis(axis, limits: tuple[float, float]) -> None:
    values = log_ticks(*limits)
    axis.set_ticks(values, [number(value) for value in values])
    axis.set_ticks([], minor=True)


def _lines(figure, cell, chart: Lines) -> None:
    axes = figure.add_subplot(cell)
    _bare(axes, chart.title)
    for line in chart.lines:
        x, y = zip(*line.points, strict=True)
        marker = _marker(line.style) if len(x) <= 12 else None
        dash = "--" if line.style == 0 else "-"
        axes.plot(x, y, dash, color=_colour(line.style), marker=marker, ms=4)
        if line.spread:
            low = [v - s for v, s in zip(y, line.spread, strict=True)]
            high = [v + s for v, s in zip(y, line.spread, strict=True)]
            axes.fill_between(x, low, high, color=_colour(line.style), alpha=0.15, lw=0)
        if line.dots:
            axes.scatter(*zip(*line.dots, strict=True), s=5, color=_colour(line.style), alpha=0.4)
    if chart.log:
        axes.set_yscale("log")
        _log_axis(axes.yaxis, lines_range(chart))
    axes.set_ylim(lines_range(chart))
    if chart.x_ticks is not None:
        axes.set_xticks(*zip(*chart.x_ticks, strict=True))
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.set_ylabel(chart.y_label, fontsize=9)
    axes.grid(axis="y", alpha=0.3)


def _dots(figure, cell, chart: Dots) -> None:
    axes = figure.add_subplot(cell)
    _bare(axes, chart.title)
    for i, row in enumerate(chart.rows):
        for lane, mark in enumerate(row.marks):
            y = i + 0.12 * (lane - (len(row.marks) - 1) / 2)
            axes.errorbar(
                mark.value, y, xerr=mark.spread or None, color=_colour(mark.style),
                marker=_marker(mark.style), ms=5, lw=1,
            )  # fmt: skip
    axes.set_yticks(range(len(chart.rows)), [row.label for row in chart.rows])
    for row, label in zip(chart.rows, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if row.strong else "normal")
        label.set_fontstyle("normal" if row.marks else "italic")
    axes.set_ylim(len(chart.rows) - 0.4, -0.6)
    if chart.log:
        axes.set_xscale("log")
        _log_axis(axes.xaxis, dots_range(chart))
    axes.set_xlim(dots_range(chart))
    if chart.reference is not None:
        axes.axvline(chart.reference, color="#888888", lw=0.8, ls=":")
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def _heat(figure, cell, chart: Heat) -> None:
    across = 2 if len(chart.panels) > 1 else 1
    grid = cell.subgridspec(math.ceil(len(chart.panels) / across), across)
    for i, panel in enumerate(chart.panels):
        axes = figure.add_subplot(grid[i // across, i % across])
        _bare(axes, f"{chart.title}: {panel.name}")
        axes.title.set_fontsize(9)
        image = axes.imshow(panel.shares, cmap="Blues", vmin=0, vmax=chart.full, aspect="auto")
        axes.set_yticks([0, len(chart.row_labels) - 1], [chart.row_labels[j] for j in (0, -1)])
        last = len(panel.shares[0]) - 1
        axes.set_xticks([0, last] if last else [0], ["1", str(last + 1)] if last else ["1"])
        axes.set_ylabel(chart.y_label, fontsize=7)
        axes.set_xlabel(chart.x_label, fontsize=7)
        axes.tick_params(labelsize=7)
    label = figure.colorbar(image, ax=axes, shrink=0.9)
    label.ax.tick_params(labelsize=6)

"""A report as data: headings, text, tables and figures, written as HTML or as PNG charts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from . import svg
from .charts import Chart, Heat
from .output import check_folder, check_matplotlib, check_output, write_whole
from .page import page
from .pictures import Gallery


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = ""  # "lead", "note"

    def html(self) -> str:
        return f'<p class="{self.kind}">{escape(self.text)}</p>'


@dataclass(frozen=True)
class Heading:
    text: str

    def html(self) -> str:
        return f"<h2>{escape(self.text)}</h2>"


@dataclass(frozen=True)
class Tiles:
    """A few numbers to be seen first: (style of charts, number with unit, what it is)."""

    tiles: Sequence[tuple[int, str, str]]

    def html(self) -> str:
        inside = "".join(
            f'<div class="card tile"><b>{escape(value)}</b><span><i class="b{style % svg.STYLES}">'
            f"</i>{escape(what)}</span></div>"
            for style, value, what in self.tiles
        )
        return f'<div class="tiles">{inside}</div>'


@dataclass(frozen=True)
class Cell:
    """A table cell: what counts, with what is said beside it in small."""

    text: str
    before: str = ""
    after: str = ""
    best: bool = False

    def html(self) -> str:
        small = [f"<small>{escape(x)}</small>" if x else "" for x in (self.before, self.after)]
        kind = ' class="best"' if self.best else ""
        return f"<td{kind}>{small[0]}<b>{escape(self.text)}</b>{small[1]}</td>"


@dataclass(frozen=True)
class Table:
    """Rows of text or cells; the last ``totals`` rows are set apart."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    totals: int = 0

    def html(self) -> str:
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in self.header)
        lines = []
        for i, row in enumerate(self.rows):
            kind = ' class="total"' if i == len(self.rows) - self.totals else ""
            cells = [c.html() if isinstance(c, Cell) else f"<td>{escape(c)}</td>" for c in row]
            lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
        note = f'<p class="note">{escape(self.caption)}</p>' if self.caption else ""
        return (
            f'<div class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>{note}</div>"
        )


@dataclass(frozen=True)
class Figure:
    """Charts that belong together.

    Args:
        title: names the PNG file, too.
        legend: (name, style) of what the charts' colours mean.
    """

    title: str
    charts: Sequence[Chart]
    caption: str
    legend: Sequence[tuple[str, int]] = ()

    def html(self) -> str:
        keys = [_key(name, style) for name, style in self.legend]
        heat = next((chart for chart in self.charts if isinstance(chart, Heat)), None)
        if heat is not None:
            keys.append(f'<span>0 % <i class="ramp"></i> {100 * heat.full:g} % and more</span>')
        legend = f'<div class="legend">{"".join(keys)}</div>' if keys else ""
        charts = "".join(map(svg.draw, self.charts))
        kind = "charts two" if len(self.charts) in (2, 4) else "charts"
        return (
            f'<figure class="card"><h3>{escape(self.title)}</h3>{legend}'
            f'<div class="{kind}">{charts}</div>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


def _key(name: str, style: int) -> str:
    """An entry of a legend."""
    return (
        '<span><svg viewBox="0 0 26 12" aria-hidden="true">'
        f'<path class="line l{style % svg.STYLES}" d="M1 6H25"/>{svg.marker(13, 6, style)}</svg>'
        f"{escape(name)}</span>"
    )


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    facts: Mapping[str, str]

    def html(self) -> str:
        inside = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in self.facts.items()
        )
        return f'<div class="card"><dl>{inside}</dl></div>'


Part = Text | Heading | Tiles | Table | Figure | Facts | Gallery


@dataclass
class Document:
    """A title and parts in order."""

    title: str
    parts: list[Part] = field(default_factory=list)

    def html(self) -> str:
        body = [f"<h1>{escape(self.title)}</h1>", *(part.html() for part in self.parts)]
        return page(self.title, "\n".join(body))

    def to_html(self, path: str | os.PathLike) -> Path:
        """Writes one self-contained HTML file; returns its path.

        Raises:
            ValueError, OSError: the path is a folder, or cannot be written to.
        """
        target = check_output(path)
        write_whole(target, self.html().encode())
        return target

    def to_png(self, folder: str | os.PathLike) -> list[Path]:
        """Writes every figure as a PNG file into a folder, which is made where it is missing.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; says how to install it.
            ValueError, OSError: the folder cannot be made or written to.
        """
        check_matplotlib()
        target = check_folder(folder)
        from . import png

        figures = [part for part in self.parts if isinstance(part, Figure)]
        target.mkdir(exist_ok=True)
        paths = []
        for i, figure in enumerate(figures, 1):
            slug = re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-")
            paths.append(target / f"{i:02}-{slug}.png")
            write_whole(paths[-1], png.draw(figure.charts, figure.title, figure.legend))
        return paths

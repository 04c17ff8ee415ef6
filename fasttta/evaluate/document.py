"""A report as data: headings, text, tables, figures and pictures; written as HTML or as PNG charts.

``report.html`` and ``parts.html`` are its Jinja2 templates, ``report.css`` its style sheet.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .charts import Chart, Heat
from .output import check_extra, check_folder, check_output, write_whole


@dataclass(frozen=True)
class Text:
    """A paragraph; ``kind`` is "lead" or "note", or nothing."""

    template: ClassVar[str] = "text"
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading of the second level."""

    template: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Tiles:
    """A few numbers to be seen first: (style of charts, number with unit, what it is)."""

    template: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[int, str, str]]


@dataclass(frozen=True)
class Cell:
    """A table cell: what counts, with what is said beside it in small."""

    text: str
    before: str = ""
    after: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text or cells; the last ``totals`` rows are set apart."""

    template: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    totals: int = 0


@dataclass(frozen=True)
class Figure:
    """Charts that belong together.

    Args:
        title: names the PNG file, too.
        legend: (name, style) of what the charts' colours mean.
    """

    template: ClassVar[str] = "figure"
    title: str
    charts: Sequence[Chart]
    caption: str
    legend: Sequence[tuple[str, int]] = ()

    @property
    def scale(self) -> str:
        """The share that maps draw darkest, in percent; empty where there is no map."""
        full = [chart.full for chart in self.charts if isinstance(chart, Heat)]
        return f"{100 * full[0]:g} %" if full else ""


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    template: ClassVar[str] = "facts"
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Picture:
    """An image inside a page.

    Args:
        source: a data URI of a PNG file, as ``data_uri`` makes it.
        text: what is seen, for those who do not see it.

    Raises:
        ValueError: source is something else, which a page would load from elsewhere.
    """

    source: str
    text: str

    def __post_init__(self) -> None:
        if not self.source.startswith("data:image/png;base64,"):
            raise ValueError(f"source={self.source[:40]!r}: needed a data URI of a PNG file")


@dataclass(frozen=True)
class Share:
    """A number from 0 to 1, written and as a bar."""

    value: float


@dataclass(frozen=True)
class Gallery:
    """A table of pictures, numbers and text."""

    template: ClassVar[str] = "gallery"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Picture | Share]]
    caption: str = ""


Part = Text | Heading | Tiles | Table | Figure | Facts | Gallery


@dataclass
class Document:
    """A title and parts in order."""

    title: str
    parts: list[Part] = field(default_factory=list)

    def html(self) -> str:
        """One self-contained page: it has no scripts and loads nothing.

        Raises:
            ModuleNotFoundError: a package of the extra ``report`` is missing; says how to install.
        """
        check_extra()
        import jinja2
        from markupsafe import Markup

        from . import drawing, markup

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.globals |= {
            "draw": lambda chart: Markup(drawing.svg(chart)),
            "key": lambda style: Markup(drawing.key(style)),
            "colours": Markup(markup.style_sheet()),
            "styles": drawing.STYLES,
        }
        return environment.get_template("report.html").render(document=self)

    def to_html(self, path: str | os.PathLike) -> Path:
        """Writes one self-contained HTML file; returns its path.

        Raises:
            ModuleNotFoundError: a package of the extra ``report`` is missing; says how to install.
            ValueError, OSError: the path is a folder, or cannot be written to.
        """
        target = check_output(path)
        write_whole(target, self.html().encode())
        return target

    def to_png(self, folder: str | os.PathLike) -> list[Path]:
        """Writes every figure as a PNG file into a folder, which is made where it is missing.

        Raises:
            ModuleNotFoundError: a package of the extra ``report`` is missing; says how to install.
            ValueError, OSError: the folder cannot be made or written to.
        """
        check_extra()
        target = check_folder(folder)
        from . import drawing

        figures = [part for part in self.parts if isinstance(part, Figure)]
        target.mkdir(exist_ok=True)
        paths = []
        for i, figure in enumerate(figures, 1):
            slug = re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-")
            paths.append(target / f"{i:02}-{slug}.png")
            write_whole(paths[-1], drawing.png(figure.charts, figure.title, figure.legend))
        return paths


def data_uri(pixels: Tensor) -> str:
    """An image [3, H, W] in [0, 1] as a ``data:`` URI of a PNG file, 8 bits for each channel.

    Values outside of [0, 1] become 0 and 1.

    Raises:
        ModuleNotFoundError: a package of the extra ``report`` is missing; says how to install.
        ValueError: pixels is no such image.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise ValueError(f"pixels has shape {list(pixels.shape)}; needed [3, H, W], not empty")
    if not torch.isfinite(pixels).all():
        raise ValueError("pixels holds NaN or infinity; needed values in [0, 1]")
    check_extra()
    from PIL import Image

    levels = (pixels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

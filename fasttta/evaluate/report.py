"""The report of a comparison of methods on streams."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from . import figures
from .document import Cell, Document, Facts, Heading, Table, Text, Tiles
from .output import as_json, check_extra, check_output, write_whole
from .table import mean_over_streams, mean_spread, notes, several_seeds, table

_NEEDED = ("protocol", "machine", "streams", "classes", "seconds")


class Report:
    """What several methods did on several streams, to be looked at.

    Args:
        data: JSON-ready, as ``fasttta.demo.run.run`` returns it. ``"streams"``: {stream: {method:
            ``over_seeds`` of what ``measure_stream`` returns, and, where a model has a fusion
            attention, ``gap_numbers`` of its attention gaps}}; ``"classes"``: their names;
            ``"protocol"``, ``"machine"``: settings and versions, shown as they are; ``"seconds"``;
            optionally ``"title"`` and ``"toy"``, what the numbers are no evidence of.

    Raises:
        ValueError, TypeError: data lacks something; says what.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        if not isinstance(data, Mapping):
            raise TypeError(f"data must be what demo.run.run returns, found {type(data).__name__}")
        missing = [name for name in _NEEDED if name not in data]
        if missing:
            raise ValueError(f"data lacks {', '.join(missing)}; needed {', '.join(_NEEDED)}")
        if not data["streams"] or not all(data["streams"].values()):
            raise ValueError("data['streams'] is empty; needed at least one stream and method")
        methods = [list(records) for records in data["streams"].values()]
        if any(names != methods[0] for names in methods):
            raise ValueError("data['streams']: every stream must have the same methods")
        self.data = data
        self.methods = methods[0]
        adapting = iter(range(1, len(self.methods) + 1))
        #: number of a method's colour in every chart; 0 is the unadapted model's
        self.styles = {m: 0 if m == "source" else next(adapting) for m in self.methods}

    def __repr__(self) -> str:
        streams = ", ".join(self.data["streams"])
        return f"<Report of {', '.join(self.methods)} on {streams}>"

    def _repr_html_(self) -> str | None:
        """The page in a frame, for notebooks; nothing without the extra ``report``."""
        try:
            check_extra()
        except ModuleNotFoundError:
            return None
        return (
            '<iframe title="report" style="width:100%;height:40em;border:0" '
            f'srcdoc="{escape(self.document.html())}"></iframe>'
        )

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> Report:
        """The report of data that ``to_json`` wrote.

        Raises:
            ValueError, OSError: there is no such file, or it holds something else.
        """
        try:
            data = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{os.fspath(path)!r} is not JSON: {error}") from error
        if isinstance(data, dict) and isinstance(data.get("streams"), dict):
            data["streams"] = _with_nan(data["streams"])
        return cls(data)

    def table(self) -> str:
        """As text, for a terminal."""
        return table(self.data)

    def to_json(self, path: str | os.PathLike) -> Path:
        """Writes all data; ``from_json`` reads it."""
        target = check_output(path)
        write_whole(target, (as_json(self.data) + "\n").encode())
        return target

    def to_html(self, path: str | os.PathLike) -> Path:
        """Writes one HTML file that needs no network: table, charts, protocol, versions.

        Raises:
            ModuleNotFoundError: a package of the extra ``report`` is missing; says how to install.
            ValueError, OSError: the path is a folder, or cannot be written to.
        """
        return self.document.to_html(path)

    def to_png(self, folder: str | os.PathLike) -> list[Path]:
        """Writes the charts as PNG files into a folder.

        Raises:
            ModuleNotFoundError: a package of the extra ``report`` is missing; says how to install.
            ValueError, OSError: the folder cannot be made or written to.
        """
        return self.document.to_png(folder)

    @cached_property
    def document(self) -> Document:
        """Everything that the HTML shows."""
        protocol = self.data["protocol"]
        return Document(
            self.data.get("title", "Test-time adaptation"),
            [
                Text(self._headline(), "lead"),
                *([Text(f"A toy: {self.data['toy']}. Orderings of methods here are no evidence "
                        "about models of published size.", "note")] if "toy" in self.data else []),
                self._tiles(),
                Heading("Accuracy"),
                self._table(),
                figures.scores(self.data, self.styles),
                Heading("Along the stream"),
                figures.accuracy(self.data, self.styles),
                Heading("What is predicted"),
                figures.classes(self.data),
                *figures.gaps(self.data, self.styles),
                Heading("Protocol"),
                Facts({name: readable(value) for name, value in protocol.items()}),
                Heading("Machine"),
                Facts(
                    {name: readable(value) for name, value in self.data["machine"].items()}
                    | {"whole run": f"{self.data['seconds']:.1f} s"}
                ),
            ],
        )  # fmt: skip

    def mean(self, method: str, key: str = "score") -> float:
        """A method's number, averaged over streams."""
        return mean_over_streams(self.data, method, key)

    def _headline(self) -> str:
        count = len(self.data["streams"])
        over = f"Averaged over {count} streams" if count > 1 else "On one stream"
        scores = {m: self.mean(m) for m in self.methods}
        best = max(scores, key=scores.__getitem__)
        text = f"{over}, {best} is right on {scores[best]:.1f} % of the samples"
        if "source" in scores and best != "source":
            text += f", the model without adaptation on {scores['source']:.1f} %"
            worse = [
                f"{m} on {name}"
                for name, records in self.data["streams"].items()
                for m in self.methods
                if records[m]["score"] < records["source"]["score"] - 1
            ]
            if worse:
                text += f". Adapting cost more than one point here: {', '.join(worse)}"
        return text + "."

    def _tiles(self) -> Tiles:
        source = self.mean("source") if "source" in self.methods else None
        tiles = []
        for m in self.methods:
            gain = (
                f" ({self.mean(m) - source:+.1f})" if source is not None and m != "source" else ""
            )
            tiles.append((self.styles[m], f"{self.mean(m):.1f} %", f"{m}, mean accuracy{gain}"))
        return Tiles(tiles)

    def _table(self) -> Table:
        several = several_seeds(self.data)
        rows = []
        for name, records in self.data["streams"].items():
            best = max(records, key=lambda m: records[m]["score"])
            rows.append([name, *(_cell(m, x, m == best, several) for m, x in records.items())])
        average = {
            m: {k: self.mean(m, k) for k in ("before", "after", "score")}
            | {"score_std": mean_spread(self.data, m)}
            for m in self.methods
        }
        best = max(average, key=lambda m: average[m]["score"])
        rows.append(["mean", *(_cell(m, x, m == best, several) for m, x in average.items())])
        speed = [Cell(f"{self.mean(m, 'samples_per_s'):,.0f}") for m in self.methods]
        rows.append(["samples/s", *speed])
        caption = (
            "Top-1 accuracy in percent, before → after the update on each batch; bold is the "
            "prediction that the method is scored with, shaded the best of a row. "
            + ("± is the standard deviation over seeds. " if several else "")
            + "Samples a second are of the method's own steps on this machine."
        )
        return Table(["stream", *self.methods], rows, caption, totals=2)

    def notes(self) -> list[str]:
        """What must be read with the numbers."""
        return notes(self.data)


def _cell(method: str, record: Mapping[str, float], best: bool, several: bool) -> Cell:
    """A method's accuracy on a stream; the prediction that it is scored with counts."""
    spread = f" ±{record['score_std']:.1f}" if several else ""
    before, after = f"{record['before']:.1f}", f"{record['after']:.1f}"
    if method == "source":
        return Cell(f"{record['score']:.1f}", "", spread, best)
    if record["score"] == record["after"]:
        return Cell(after, f"{before} → ", spread, best)
    return Cell(before, "", f"{spread} → {after}", best)


def _with_nan(value: Any) -> Any:
    """Measured numbers as they were before ``as_json`` wrote null for NaN."""
    if isinstance(value, dict):
        return {name: _with_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


def readable(value: Any) -> str:
    """A setting as text: lists and mappings without brackets."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {readable(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(readable, value))
    return f"{value:g}" if isinstance(value, float) else str(value)

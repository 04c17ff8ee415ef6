"""Charts: one drawing, as SVG in a page, as an SVG file and as PNG."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET

import pytest

from fasttta.evaluate import markup
from fasttta.evaluate.charts import Dots, Heat, Line, Lines, Mark, Panel, Row, number

matplotlib = pytest.importorskip("matplotlib")
drawing = pytest.importorskip("fasttta.evaluate.drawing")
Image = pytest.importorskip("PIL.Image")

CURVE = Lines("curve", "x", "y", [Line("a", 1, [(i, i * i + 1.0) for i in range(5)])])


def _titles(svg: str) -> list[str]:
    return [title.text for title in ET.fromstring(svg).iter("title")]


def _texts(svg: str) -> list[str]:
    return [text.text for text in ET.fromstring(svg).iter("text")]


def test_numbers_on_axes():
    assert [number(x) for x in (0.25, 91.349, 1200.0, -0.5)] == ["0.25", "91.35", "1,200", "-0.5"]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(0.3, 0.8), (0.55, 0.9), (61.0, 61.4), (0.99, 1.01), (0.9, 2000), (5.0, 5.0)]
)
def test_every_axis_has_round_numbers(low, high, log):
    chart = Lines("t", "x", "y", [Line("a", 0, [(0, low), (1, high)])], log=log, x_ticks=[(0, "")])
    labels = [text for text in _texts(drawing.svg(chart)) if re.fullmatch(r"[\d.,]+", text or "")]
    assert 2 <= len(labels) <= 12, labels
    assert len(set(labels)) == len(labels)
    assert all(len(label) <= 5 for label in labels), labels


def test_what_is_drawn_can_be_read():
    """Every point of a line and every mark of a row has its number as a title."""
    assert _titles(drawing.svg(CURVE)) == ["a", *(f"a: {i * i + 1} at {i}" for i in range(5))]
    rows = [Row("group"), Row("r", [Mark("m", 1, 2.0, 0.5), Mark("n", 2, 3.0)], strong=True)]
    dots = drawing.svg(Dots("d", "x", rows, reference=2.5))
    assert _titles(dots) == ["r, m: 2 ± 0.5", "r, n: 3"]
    assert {"group", "r", "d", "x"} <= set(_texts(dots))
    heat = drawing.svg(Heat("h", "time", "class", ["0", "1", "2"], [Panel("p", [[0.2]] * 3)]))
    assert {"h", "p", "0", "2", "time → (rows: class)"} <= {
        " ".join((text or "").split()) for text in _texts(heat)
    }


def test_a_page_chooses_the_colours():
    svg = drawing.svg(CURVE)
    assert {"var(--s1)", "var(--text)", "var(--muted)", "var(--grid)"} <= set(
        re.findall(r"var\(--\w+\)", svg)
    )
    assert not re.search(r"(fill|stroke): (?!none|var\()", svg)


def test_odd_contents():
    """One point, one level, nothing to show, numbers that no axis has."""
    for points in ([(1.0, 2.0)], [(0.0, math.nan), (1.0, 2.0), (2.0, -1.0)], [(0.0, math.nan)], []):
        for log in (False, True):
            lines = Lines("one", "x", "y", [Line("a", 1, points)], log=log)
            shown = [y for _, y in points if math.isfinite(y) and (y > 0 or not log)]
            assert len(_titles(drawing.svg(lines))) == 1 + len(shown)
    wide = Row("r", [Mark("m", 9, 0.1, 0.5), Mark("n", 1, math.nan), Mark("o", 1, -1.0)])
    dots = drawing.svg(Dots("d", "x", [Row("group"), wide], log=True, reference=0.2))
    assert _titles(dots) == ["r, m: 0.1 ± 0.5"]
    flat = Heat("h", "x", "y", ["0"], [Panel("only", [[0.0, math.nan, 2.0]])])
    assert drawing.svg(flat).count("opacity: 1") + drawing.svg(flat).count("fill: var(--s2)") >= 1
    figure = drawing.png([CURVE, flat], "odd", [("many", 12)])
    assert Image.open(io.BytesIO(figure)).format == "PNG"


def test_maps_are_darker_for_more():
    """A cell's opacity is its share of the darkest one, in ten steps."""
    shares = [[0.0, 0.1, 0.25, 0.5, 0.9]]
    svg = drawing.svg(Heat("h", "x", "y", ["0"], [Panel("p", shares)], full=0.5))
    cells = {}
    for path, style in re.findall(r'd="([^"]*)"[^>]*style="(fill: var\(--s2\)[^"]*)"', svg):
        opacity = re.search(r"opacity: ([\d.]+)", style)
        cells[float(opacity[1]) if opacity else 1.0] = path.count("z")
    assert cells == {0.2: 1, 0.5: 1, 1.0: 2}


def test_a_file_stands_alone():
    content = drawing.svg_file(CURVE)
    root = ET.fromstring(content)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (root.attrib["width"], root.attrib["height"]) == ("360", "236")
    text = content.decode()
    assert "prefers-color-scheme:dark" in text
    for name, colour in (*markup.LIGHT.items(), *markup.DARK.items()):
        assert f"--{name}:{colour}" in text
    assert markup.LIGHT.keys() == markup.DARK.keys()
    assert text.replace("http://www.w3.org/2000/svg", "").count("//") == 0


def test_the_users_settings_do_not_matter():
    before = drawing.svg(CURVE), drawing.png([CURVE], "t", [])
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert (drawing.svg(CURVE), drawing.png([CURVE], "t", [])) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_a_png_holds_every_chart():
    """Three beside each other, and below them what the colours mean."""
    one, four = (
        Image.open(io.BytesIO(drawing.png([CURVE] * n, "t", [("a", 1)]))).size for n in (1, 4)
    )
    assert four[0] == 3 * one[0] == 3 * 750
    assert four[1] > 1.5 * one[1]

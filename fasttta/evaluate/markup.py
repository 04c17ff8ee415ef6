"""A matplotlib figure as SVG for a page: colours and fonts come from a style sheet.

A figure that is drawn in the colours of ``LIGHT`` is shown in those of ``DARK`` where the reader
prefers that.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

from matplotlib.figure import Figure

LIGHT = {
    "s0": "#6b7480", "s1": "#d55e00", "s2": "#0072b2", "s3": "#009e73", "s4": "#cc79a7",
    "s5": "#e69f00", "s6": "#56b4e9",
    "text": "#1d2024", "muted": "#62686f", "grid": "#ecece8", "line": "#e3e3df", "card": "#ffffff",
}  # fmt: skip
DARK = {
    "s0": "#98a1ac", "s1": "#f28444", "s2": "#5cb3ea", "s3": "#2fc39a", "s4": "#e2a3c6",
    "s5": "#f3bd52", "s6": "#9ad4f5",
    "text": "#e7e8ea", "muted": "#9aa1a9", "grid": "#282c31", "line": "#2c3036", "card": "#1a1d21",
}  # fmt: skip


def style_sheet() -> str:
    """A style sheet with every colour as a variable, for the light and for the dark."""
    light, dark = (
        ";".join(f"--{name}:{colour}" for name, colour in palette.items())
        for palette in (LIGHT, DARK)
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def markup(
    figure: Figure, titles: dict[str, list[str]], attributes: dict[str, str], style: str = ""
) -> str:
    """A figure as an <svg> element that takes its colours and its font from a style sheet.

    Args:
        titles: of an artist's id: its title and those of its marks.
        style: a style sheet that the element is to hold, and with it a background.
    """
    file = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    root = ET.fromstring(file.getvalue())
    names = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip() or None, None
        label = element.attrib.pop("id", "") if element.tag == "g" else ""
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            value = re.sub(r"-?\d+\.\d{3,}", lambda match: _rounded(match[0]), value)
            value = re.sub(r"#[0-9a-f]{6}\b", lambda match: names.get(match[0], match[0]), value)
            value = re.sub(r" font-family: [^;]*;", "", value)
            if not value.startswith("rotate(-0"):
                element.set(name.rpartition("}")[2], " ".join(value.split()))
        if label in titles:
            first, *others = titles[label]
            uses = [each for each in element.iter() if each.tag.endswith("use")]
            for target, title in ((element, first), *zip(uses, others, strict=True)):
                if title:
                    target.insert(0, ET.Element("title"))
                    target[0].text = title
    _, _, width, height = root.get("viewBox", "").split()
    _inline(root)
    _flatten(root)
    root.attrib = {"viewBox": root.get("viewBox", ""), **attributes}
    if style:
        root.attrib |= {"width": width, "height": height}
        root.insert(0, ET.Element("style"))
        root[0].text = style
        background = {"width": width, "height": height, "rx": "8", "style": "fill: var(--card)"}
        root.insert(1, ET.Element("rect", background))
    return ET.tostring(root, encoding="unicode")


def _inline(root: ET.Element) -> None:
    """Puts shapes that are used once where they are used: an id fewer, and a shorter text."""
    places: dict[str, list[ET.Element]] = {}
    for element in root.iter("use"):
        places.setdefault(element.get("href", "")[1:], []).append(element)
    for defs in list(root.iter("defs")):
        for shape in defs.findall("path"):
            name = shape.get("id", "")
            if len(uses := places.get(name, [])) == 1:
                defs.remove(shape)
                use = uses[0]
                use.tag = "path"
                del use.attrib["href"]
                place = f"translate({use.attrib.pop('x')} {use.attrib.pop('y')})"
                use.attrib |= {"d": shape.get("d", ""), "transform": place}


def _flatten(element: ET.Element) -> None:
    """Removes groups that say nothing, shapes that show nothing, and matplotlib's style sheet,
    which would apply to all of the page."""
    kept: list[ET.Element] = []
    for child in element:
        _flatten(child)
        group = child.tag == "g" and not child.attrib and child.find("title") is None
        if group or (child.tag == "defs" and not len(child)):
            kept.extend(child)
        elif child.tag != "style" and child.get("style") != "fill: none":
            kept.append(child)
    element[:] = kept


def _rounded(value: str) -> str:
    return f"{float(value):.2f}".rstrip("0").rstrip(".")

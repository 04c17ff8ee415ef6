"""Reports: what the HTML holds and does not load, charts, files that are whole or not there."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from places import ROOT

from fasttta import cli
from fasttta.demo import run as demo
from fasttta.evaluate import Report, drawing
from fasttta.evaluate import output as files
from fasttta.evaluate.document import Document, Figure
from fasttta.evaluate.table import mean_spread


@pytest.fixture(scope="module")
def report():
    return Report(demo.run(["white", "fog"], ["source", "tent", "abpem"], samples=86, seeds=(0, 1)))


def _renamed(data, stream="white", to="white"):
    data = copy.deepcopy(data)
    data["streams"] = {to if name == stream else name: x for name, x in data["streams"].items()}
    return data


class _Loads(HTMLParser):
    """Collects what a browser would fetch or run; references inside the page are none of that."""

    def __init__(self):
        super().__init__()
        self.attributes, self.tags, self.ids, self.references = [], set(), [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name == "href" and value.startswith("#"):
                self.references.add(value[1:])
            elif name == "clip-path":
                self.references.add(re.fullmatch(r"url\(#(\w+)\)", value)[1])
            elif name.startswith("on") or name in (
                "src",
                "srcset",
                "href",
                "data",
                "action",
                "xlink:href",
            ):
                self.attributes.append((tag, name))


def test_html_is_self_contained(report, tmp_path):
    text = report.to_html(tmp_path / "out.html").read_text()
    parser = _Loads()
    parser.feed(text)
    assert parser.attributes == []
    assert parser.tags.isdisjoint({"script", "link", "iframe", "img", "object", "embed", "base"})
    for word in ("http:", "https:", "//", "@import"):
        assert word not in text
    assert "url(" not in text.replace('clip-path="url(#', "")
    assert len(parser.ids) == len(set(parser.ids))
    assert parser.references <= set(parser.ids)
    assert str(tmp_path) not in text
    assert list(tmp_path.iterdir()) == [tmp_path / "out.html"]  # no temporary files


def test_html_holds_every_number_of_the_table(report):
    text = re.sub(r"<[^>]+>", " ", report.document.html().split("<h2>Along")[0])
    for records in report.data["streams"].values():
        for record in records.values():
            assert f"{record['score']:.1f}" in text
            assert f"±{record['score_std']:.1f}" in text
        for method in ("tent", "abpem"):
            assert f"{records[method]['before']:.1f}" in text
            assert f"{records[method]['after']:.1f}" in text
    for method in report.methods:
        assert f"{report.mean(method):.1f} %" in text
        assert f"{report.mean(method, 'samples_per_s'):,.0f}" in text
    numbers = re.findall(r"\d[\d,.]*\d", report.table().split("a → b")[0])
    assert len(numbers) > 20
    assert set(numbers) <= set(re.findall(r"\d[\d,.]*\d", text))


def test_html_holds_protocol_and_versions(report):
    text = report.document.html()
    for word in ("severity", "score_at", "tent before; abpem after", "seeds", "0, 1"):
        assert word in text
    for value in report.data["machine"].values():
        assert str(value) in text
    assert report.data["toy"] in text


def test_charts_are_well_formed_and_in_the_frame(report):
    text = report.document.html()
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len([c for c in charts if "aria-label" in c]) == 1 + 2 + 2 + 3
    for chart in charts:
        root = ET.fromstring(chart)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for element in root.iter("text"):
            assert -1 <= float(element.attrib["x"]) <= width
            assert 0 <= float(element.attrib["y"]) <= height
        assert "nan" not in chart
        assert "inf" not in chart


def test_charts_take_their_colours_from_the_page(report):
    """So that they are seen in the dark; a colour that is no variable would stay as it is."""
    text = report.document.html()
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    variables = {name for chart in charts for name in re.findall(r"var\((--\w+)\)", chart)}
    assert {"--s0", "--s1", "--s2", "--text", "--muted", "--grid", "--card"} <= variables
    for name in variables:
        assert len(set(re.findall(rf"{name}:(#\w+)", text))) == 2, name  # light and dark
    for chart in charts:
        assert not re.search(r"(fill|stroke): (?!none|var\()", chart)
        assert "font-family" not in chart
        for label in ET.fromstring(chart).iter("text"):
            assert "fill: var(" in label.attrib["style"]


def test_a_mark_tells_its_number(report):
    text = report.document.html()
    for stream, records in report.data["streams"].items():
        for method, record in records.items():
            spread = f" ± {record['score_std']:.4g}" if record["score_std"] else ""
            title = f"{stream}, {method}: {record['score']:.4g}{spread}"
            assert f"<title>{title}</title>" in text


def test_everything_is_escaped(report):
    bad = '<script>alert("1")</script>&'
    data = _renamed(report.data, to=bad)
    data |= {"title": bad, "toy": bad, "classes": [bad] * 10}
    data["protocol"] = data["protocol"] | {bad: bad}
    data["machine"] = data["machine"] | {"processor": bad}
    data["streams"] = {
        stream: {bad if name == "tent" else name: record for name, record in records.items()}
        for stream, records in data["streams"].items()
    }
    data["protocol"] |= {"lr": {bad: 1.0, "abpem": 1.0}, "score_at": {bad: "before", "abpem": "x"}}
    text = Report(data).document.html()
    assert "<script" not in text
    assert html.unescape(text).count(bad) > 10


def test_series_count_every_sample_once(report):
    for records in report.data["streams"].values():
        for record in records.values():
            assert len(record["series"]) == 2  # seeds
            for series in record["series"]:
                assert series["samples"] == [64, 22]
                for key in ("predicted", "labels"):
                    assert [sum(counts) for counts in series[key]] == series["samples"]
                    assert {len(counts) for counts in series[key]} == {10}
            for when in ("before", "after"):
                hits = [sum(series[f"hits_{when}"]) / 86 for series in record["series"]]
                assert record[when] == pytest.approx(100 * sum(hits) / 2)
            labels = [series["labels"] for series in record["series"]]
            assert labels == [series["labels"] for series in records["source"]["series"]]
        first = {method: record["series"][0]["predicted"] for method, record in records.items()}
        assert first["tent"][0] == first["source"][0]  # scored before the first update
        assert first["abpem"] != first["source"]


def test_json_round_trip(report, tmp_path):
    path = report.to_json(tmp_path / "out.json")
    again = Report.from_json(path)
    assert again.data == report.data
    assert again.document.html() == report.document.html()
    assert again.table() == report.table() == demo.table(report.data)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Report.from_json(tmp_path / "bad.json")


def test_same_data_same_bytes(report, tmp_path):
    again = Report(report.data)
    assert again.document.html() == report.document.html()
    paths = report.to_png(tmp_path / "charts")
    assert [path.name for path in paths] == [
        "01-accuracy-by-stream.png",
        "02-accuracy-along-the-stream.png",
        "03-predicted-classes-along-the-stream.png",
        "04-attention-gap-before-and-after-adaptation.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    figure = next(part for part in again.document.parts if isinstance(part, Figure))
    assert drawing.png(figure.charts, figure.title, figure.legend) == paths[0].read_bytes()


def test_bad_data(report):
    with pytest.raises(TypeError, match="found list"):
        Report([])
    with pytest.raises(ValueError, match="lacks streams; needed protocol"):
        Report({k: v for k, v in report.data.items() if k != "streams"})
    with pytest.raises(ValueError, match="at least one stream"):
        Report(report.data | {"streams": {}})
    uneven = _renamed(report.data)
    del uneven["streams"]["fog"]["tent"]
    with pytest.raises(ValueError, match="the same methods"):
        Report(uneven)


def test_a_model_without_fusion_attention_has_no_gap(report):
    data = copy.deepcopy(report.data)
    for records in data["streams"].values():
        for record in records.values():
            for name in [key for key in record if key.endswith(("gap_after", "|aa_after"))]:
                del record[name]
    assert "Attention gap" in report.document.html()
    assert "Attention gap" not in Report(data).document.html()


def test_caption_names_a_collapse(report):
    data = copy.deepcopy(report.data)
    assert "fog" not in Report(data).document.html().split("In the last third")[1].split("<")[0]
    for series in data["streams"]["fog"]["tent"]["series"]:
        series["predicted"] = [[0] * 7 + [n, 0, 0] for n in series["samples"]]
    caption = Report(data).document.html().split("In the last third")[1].split("<")[0]
    assert "tent on fog: 100 % “7”" in caption


@pytest.mark.parametrize("command", ["demo", "study"])
def test_bad_paths_are_refused_before_anything_runs(capsys, monkeypatch, tmp_path, command):
    from fasttta.demo import study

    monkeypatch.setattr(demo, "run", None)
    monkeypatch.setattr(study, "run", None)
    (tmp_path / "out-charts").write_text("in the way")
    for arguments, message in (
        (["--report", str(tmp_path / "none" / "out.html")], "make it first: mkdir -p"),
        (["--report", str(tmp_path)], "is a folder; needed the name of a file"),
        (["--png"], "--report out.html"),
        (["--report", str(tmp_path / "out.html"), "--png"], "is a file; needed a folder"),
    ):
        assert cli.main([command, *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_extra(capsys, monkeypatch, report, tmp_path, missing):
    """Tables and JSON are there; what needs the extra says what to type, before anything runs."""
    real = files.importlib.util.find_spec
    monkeypatch.setattr(
        files.importlib.util, "find_spec", lambda name: None if name == missing else real(name)
    )
    monkeypatch.setattr(demo, "run", None)
    message = rf"need {missing}; type: pip install 'fasttta\[report\]'"
    for write in (report.to_html, report.to_png):
        with pytest.raises(ModuleNotFoundError, match=message):
            write(tmp_path / "out")
    assert cli.main(["demo", "--report", str(tmp_path / "b.html")]) == 2
    assert "pip install 'fasttta[report]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert report._repr_html_() is None
    assert report.table()
    assert Report.from_json(report.to_json(tmp_path / "out.json")).data == report.data


def test_nan_is_null_in_json_and_nan_again(report, tmp_path):
    data = copy.deepcopy(report.data)
    data["streams"]["white"]["tent"]["gap_after"] = math.nan
    path = Report(data).to_json(tmp_path / "data.json")
    assert json.loads(path.read_text())["streams"]["white"]["tent"]["gap_after"] is None
    again = Report.from_json(path)
    assert math.isnan(again.data["streams"]["white"]["tent"]["gap_after"])
    assert again.document.html() == Report(data).document.html()
    assert again.table() == report.table()


def test_mean_row_has_its_spread(report):
    text = report.document.html()
    mean = text[text.index("<td>mean</td>") : text.index("<td>samples/s</td>")]
    for method in report.methods:
        assert f"±{mean_spread(report.data, method):.1f}" in mean


def test_spread_of_own_data_is_that_of_the_score(report):
    """Which prediction is scored is told by the numbers where the protocol does not say it."""
    data = copy.deepcopy(report.data)
    data["protocol"].pop("score_at")
    differing = 0
    for method in ("tent", "abpem"):
        assert mean_spread(data, method) == mean_spread(report.data, method)
        data["protocol"]["score_at"] = {method: "before"}
        before = mean_spread(data, method)
        data["protocol"]["score_at"] = {method: "after"}
        differing += before != mean_spread(data, method)
        data["protocol"].pop("score_at")
    assert differing


def test_a_heat_map_has_its_scale(report):
    assert "% and more</span>" in report.document.html()


def test_notebooks_show_the_page(report):
    assert repr(report) == "<Report of source, tent, abpem on white, fog>"
    shown = HTMLParser()
    sources = []
    shown.handle_starttag = lambda tag, attributes: sources.append(dict(attributes).get("srcdoc"))
    shown.feed(report._repr_html_())
    assert sources == [report.document.html()]


def test_protocol_of_own_data(report):
    """A protocol may name what it likes; the usual settings are written out where it has them."""
    data = report.data | {"protocol": {"lr": {"tent": 0.1}, "batch": 7, "split": "test"}}
    own = Report(data)
    notes = " ".join(own.notes())
    assert "protocol: batch 7; tent lr 0.1" in notes
    assert own.table().startswith("accuracy, %")
    assert "split" in own.document.html()
    assert not any("protocol" in note for note in Report(data | {"protocol": {}}).notes())


def test_tables_need_no_optional_package(report, tmp_path):
    path = report.to_json(tmp_path / "data.json")
    code = f"""
import sys
import fasttta.evaluate, fasttta.cli, fasttta.demo.run, fasttta.demo.study, fasttta.demo.clip.report
loaded = {{name.partition(".")[0] for name in sys.modules}} & {{"matplotlib", "jinja2", "PIL"}}
assert not loaded, loaded
sys.modules["matplotlib"] = sys.modules["jinja2"] = sys.modules["PIL"] = None
print(fasttta.evaluate.Report.from_json({str(path)!r}).table())
"""
    command = [sys.executable, "-P", "-c", code]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown == report.table() + "\n"


def test_an_earlier_file_survives_a_failed_write(monkeypatch, tmp_path):
    path = tmp_path / "out.html"
    path.write_text("before")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        Document("title").to_html(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_command_writes_report(capsys, tmp_path):
    out = tmp_path / "out.html"
    arguments = ["--streams", "white", "--methods", "read", "--samples", "64", "--json"]
    assert cli.main(["demo", *arguments, "--report", str(out), "--png"]) == 0
    text, err = capsys.readouterr()
    assert out.read_text() == Report(json.loads(text)).document.html()
    assert len(list((tmp_path / "out-charts").glob("*.png"))) == 4
    assert "report: " in err


def test_readmes_example_runs(capsys, monkeypatch, tmp_path):
    text = (ROOT / "fasttta/evaluate/README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("classes=309", "classes=10")
    monkeypatch.chdir(tmp_path)
    names = {"model": demo.load_model(), "batches": demo.stream("white", samples=64)}
    exec(code, names | {"names": list(demo.CLASSES)})
    assert capsys.readouterr().out.startswith("accuracy, %")
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html", "charts"}

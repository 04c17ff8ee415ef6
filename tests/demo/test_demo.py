"""The demo: its report, its command, and that adapting helps where it should."""

from __future__ import annotations

import json
import re
import statistics
from xml.etree import ElementTree

import pytest

import fasttta
from fasttta import cli
from fasttta.demo import digits, picture
from fasttta.demo import run as demo
from fasttta.evaluate import drawing
from fasttta.evaluate.table import mean_spread


@pytest.fixture(scope="module")
def report():
    calls = []
    result = demo.run(["contrast"], samples=448, progress=lambda *call: calls.append(call))
    count = len(demo.METHODS)
    assert [done for done, _, _ in calls] == list(range(count + 1))
    assert {total for _, total, _ in calls} == {count}
    return result


@pytest.fixture(scope="module")
def several():
    return demo.run(["white", "fog"], ["source", "tent", "read", "abpem"], samples=64, seeds=(0, 1))


def test_every_method_has_settings():
    assert demo.SETTINGS.keys() == set(fasttta.methods.names("fusion"))
    result = demo.run(["fog"], ["eata", "sar", "rada"], samples=64)
    assert list(result["streams"]["fog"]) == ["eata", "sar", "rada"]
    assert result["protocol"]["score_at"]["rada"] == "before"


def test_shipped_statistics_are_of_the_shipped_model():
    """And of features like those of clean test pairs, up to what 32 samples can tell."""
    model, shipped = digits.load_model(), digits.load_statistics()
    assert shipped.n == 32
    clean = fasttta.collect_stats(model, [b[:2] for b in digits.stream("clean")], n=512)
    assert clean.model == shipped.model
    for name in ("audio", "video", "joint"):
        (std, mean), (theirs_std, theirs_mean) = getattr(clean, name), getattr(shipped, name)
        # the mean over 32 samples has a standard error of std / 32 ** 0.5 a component
        assert (mean - theirs_mean).norm() < 1.5 * std.norm() / 32**0.5
        assert (std - theirs_std).norm() < 0.3 * std.norm()


def test_report(report):
    assert json.loads(json.dumps(report)) == report
    assert list(report["streams"]) == ["contrast"]
    assert list(report["streams"]["contrast"]) == list(demo.METHODS)
    for name, result in report["streams"]["contrast"].items():
        assert result["score"] == result["after" if name in ("read", "abpem") else "before"]
        assert 0 < result["before"] < 100
        assert result["samples_per_s"] > 0
    source = report["streams"]["contrast"]["source"]
    assert source["before"] == source["after"]
    protocol = report["protocol"]
    assert (protocol["samples"], protocol["batch"], protocol["seeds"]) == (448, 64, [0])
    assert protocol["score_at"] == {
        "tent": "before", "read": "after", "abpem": "after", "brimpr": "before",
    }  # fmt: skip
    assert report["machine"]["fasttta"] == fasttta.__version__


def test_adapting_helps_against_low_contrast(report):
    """Seeded; the margins are a third of what it gains (source 80 %, others above 88 %)."""
    scores = {name: result["score"] for name, result in report["streams"]["contrast"].items()}
    for name in ("tent", "read", "abpem", "brimpr"):
        assert scores[name] > scores["source"] + 3, scores


def test_same_seed_same_numbers(report):
    def accuracies(result):
        return {
            name: (x["before"], x["after"]) for name, x in result["streams"]["contrast"].items()
        }

    two = demo.run(["contrast"], ["source", "read"], samples=448, seeds=(0, 1))
    one = accuracies(report)
    again = demo.run(["contrast"], ["source", "read"], samples=448)
    assert accuracies(again) == {name: one[name] for name in ("source", "read")}
    assert two["streams"]["contrast"]["read"]["score_std"] > 0
    assert accuracies(two) != accuracies(again)


def test_table(report):
    text = demo.table(report)
    for word in (*demo.METHODS, "contrast", "mean", "samples/s", "protocol: severity 5", "a toy"):
        assert word in text
    tent = report["streams"]["contrast"]["tent"]
    assert f"{tent['before']:.1f} → {tent['after']:.1f}" in text
    alone = demo.table(demo.run(["white"], ["source"], samples=64))
    assert "read" not in alone
    spread = demo.table(demo.run(["white"], ["read"], samples=64, seeds=(0, 1)))
    assert "±" in spread


def test_table_fits_a_terminal(several):
    """Of two seeds and all methods; methods that do not fit are below, with the source again."""
    text = demo.table(several)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.split()[2:] for line in lines if line.startswith("accuracy, %")]
    assert len(heads) > 1
    assert all(names[0] == "source" for names in heads)
    methods = list(several["streams"]["white"])
    assert [name for names in heads for name in names[1:]] == methods[1:]


def test_mean_has_its_spread(several):
    """That of the seeds' means over streams, in the prediction that a method scores."""
    for method, when in {"tent": "before", "read": "after", "source": "before"}.items():
        of_seeds = []
        for seed in range(2):
            runs = [result[method]["series"][seed] for result in several["streams"].values()]
            shares = [100 * sum(run[f"hits_{when}"]) / sum(run["samples"]) for run in runs]
            of_seeds.append(statistics.fmean(shares))
        expected = statistics.stdev(of_seeds)
        assert mean_spread(several, method) == pytest.approx(expected)
        if method != "source":
            mean = statistics.fmean(f[method]["after"] for f in several["streams"].values())
            assert f"→ {mean:.1f} ±{expected:.1f}" in demo.table(several)
    assert mean_spread(several, "tent") != several["streams"]["white"]["tent"]["score_std"]
    alone = demo.run(["white"], ["source", "read"], samples=64)
    assert mean_spread(alone, "read") == 0
    assert "±" not in demo.table(alone)


def test_nothing_to_run():
    with pytest.raises(ValueError, match="methods: found none"):
        demo.run(["white"], [])
    with pytest.raises(ValueError, match="seeds: found none"):
        demo.run(["white"], ["read"], seeds=())


def test_command(capsys):
    assert cli.main(["demo", "--quick", "--samples", "64", "--methods", "source", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert list(result["streams"]) == list(demo.QUICK["streams"])
    assert result["protocol"]["samples"] == 64
    assert err == ""  # no bar where nobody watches
    assert cli.main(["demo", "--streams", "white,fog", "--samples", "64", "--methods", "read"]) == 0
    out = capsys.readouterr().out
    assert "white" in out
    assert "torch" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "rain"], "rain unknown; known: clean, gaussian"),
        (["--methods", "magic"], "method='magic' is unknown; known: 'source'"),
        (["--methods", "read,a-tpt"], "for images: fasttta demo clip --methods a-tpt"),
        (["--methods", "mta"], "which runs 'source', 'tent', 'eata', 'sar', 'read', 'abpem'"),
        (["--severity", "99"], "severity=99.0 is out of range"),
        (["--samples", "0"], "samples=0"),
        (["--batch", "0"], "batch=0"),
    ],
)
def test_command_errors(capsys, arguments, message):
    assert cli.main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_what_works(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE) == [
        "demo",
        "study",
        "inspect",
        "warmup",
        "doctor",
    ]
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert fasttta.__version__ in capsys.readouterr().out


def test_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = demo.ProgressBar(width=4)
    bar(1, 2, "white, read")
    assert "██·· 1/2" in capsys.readouterr().err
    bar(2, 2, "done")
    assert capsys.readouterr().err.endswith("\x1b[K")


def test_readme_shows_todays_demo():
    """Its figures are measured; at least its rows, columns and protocol are what the code does."""
    text = picture.README.read_text()
    shown = text.split("<!-- demo-table -->")[1].split("<!-- /demo-table -->")[0]
    rows = [line.split()[0] for line in shown.splitlines() if "→" in line and "%" not in line]
    assert [row for row in rows if row not in ("mean", "a")] == list(demo.STREAMS)
    header = next(line for line in shown.splitlines() if "source" in line)
    assert header.split()[2:] == list(demo.METHODS)
    for name in demo.METHODS[1:]:
        if options := demo.SETTINGS[name]:
            assert f"{name} lr {options['lr']:g}" in " ".join(shown.split())


def test_the_picture_is_that_of_the_table():
    """Whatever version of matplotlib drew it: its marks and its labels are today's."""

    def contents(svg: bytes) -> list[tuple[str, str]]:
        root = ElementTree.fromstring(svg)
        parts = [(e.tag.rpartition("}")[2], " ".join(e.itertext())) for e in root.iter()]
        return [(tag, text) for tag, text in parts if tag in ("title", "text")]

    chart, legend = picture.chart(picture.README.read_text())
    assert [row.label for row in chart.rows] == [*demo.STREAMS, "mean"]
    assert [name for name, _ in legend] == list(demo.METHODS)
    white = {mark.name: mark.value for mark in chart.rows[demo.STREAMS.index("white")].marks}
    text = " ".join(picture.README.read_text().split())
    before, after = re.search(r"white [\d.]+ ([\d.]+) → [\d.]+ [\d.]+ → ([\d.]+)", text).groups()
    assert (white["tent"], white["read"]) == (float(before), float(after))  # as they are scored
    shown = contents(picture.PICTURE.read_bytes())
    assert len(shown) > len(demo.STREAMS) * len(demo.METHODS)
    assert shown == contents(drawing.svg_file(chart, legend)), (
        "fasttta/demo/demo.svg is stale; type: python -m fasttta.demo.picture"
    )

"""fasttta study: what is measured is what it says it is."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from places import ROOT

import fasttta
from fasttta import cli
from fasttta.demo import run as demo
from fasttta.demo import study
from fasttta.demo.digits import load_model, stream
from fasttta.demo.study import ablate, gap, gradients
from fasttta.demo.study.spread import rank_correlation, shown, spread
from fasttta.methods.options import option_names

SAMPLES = 128


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def ablation(model):
    wanted = ("full", "V1: no attention term", "k = 2", "query", "source")
    variants = [v for v in ablate.VARIANTS if v.label in wanted]
    calls = []
    data = ablate.run(
        model, seeds=(0, 1), streams=("white",), variants=variants, samples=SAMPLES,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    # full and k = 2 are one method: source model and four methods, two seeds
    assert [done for done, _, _ in calls] == list(range(11))
    return data


@pytest.fixture(scope="module")
def gaps(model):
    return gap.run(model, seeds=(0,), streams=("contrast",), severities=(2, 8), samples=SAMPLES)


def _rows(ablation):
    return {row["label"]: row for row in ablation["streams"]["white"]["variants"]}


def test_full_is_a_plain_run_of_abpem(model, ablation):
    plain = demo.run(["white"], ["source", "abpem"], samples=SAMPLES, seeds=(0, 1))
    data = plain["streams"]["white"]
    full = _rows(ablation)["full"]
    assert full["accuracy"] == {
        "mean": pytest.approx(data["abpem"]["score"]),
        "std": pytest.approx(data["abpem"]["score_std"]),
    }
    assert full["gap"]["mean"] == pytest.approx(data["abpem"]["gap_after"])
    source = ablation["streams"]["white"]["source"]
    assert source["accuracy"]["mean"] == pytest.approx(data["source"]["score"])
    assert source["gap"]["mean"] == pytest.approx(data["source"]["gap_before"])


def test_differences_are_to_the_default(ablation):
    rows = _rows(ablation)
    assert rows["full"]["default"]
    assert rows["k = 2"]["default"]
    assert rows["k = 2"] | {"group": "", "label": ""} == rows["full"] | {"group": "", "label": ""}
    for row in rows.values():
        expected = row["accuracy"]["mean"] - rows["full"]["accuracy"]["mean"]
        assert row["difference"]["mean"] == pytest.approx(expected)
        if row["default"]:
            assert row["difference"] == {"mean": 0, "std": 0}


def test_the_attention_term_closes_the_gap(ablation):
    rows = _rows(ablation)
    assert rows["V1: no attention term"]["gap"]["mean"] > 1.5 * rows["full"]["gap"]["mean"]


def test_variants_change_one_thing():
    default = fasttta.methods.ABPEM(**demo.SETTINGS["abpem"])
    for variant in ablate.VARIANTS:
        assert len(variant.options) <= 1 or variant.label == "attention term alone"
        changed = {n for n in option_names(default)
                   if getattr(variant.method, n) != getattr(default, n)}  # fmt: skip
        assert changed <= set(variant.options)
    labels = [(v.group, v.label) for v in ablate.VARIANTS]
    assert len(set(labels)) == len(labels)
    defaults = [v.group for v in ablate.VARIANTS if v.method == default]
    assert sorted(defaults) == sorted({v.group for v in ablate.VARIANTS})  # one in every group


def test_gap_grows_where_contrast_shrinks(gaps):
    """Seeded; at severity 8 the gap is 30 times the clean one and ABPEM closes 4 tenths of it."""
    points = gaps["streams"]["contrast"]
    assert [point["severity"] for point in points] == [0, 2, 8]
    source = [point["source"]["gap"]["mean"] for point in points]
    accuracy = [point["source"]["accuracy"]["mean"] for point in points]
    assert source[0] < source[1] < source[2]
    assert source[2] > 5 * source[0]
    assert accuracy[0] > accuracy[2] + 5
    assert points[2]["adapted"]["gap"]["mean"] < 0.9 * source[2]
    assert gap.correlations(points) == {
        "severity": pytest.approx(1),
        "accuracy": pytest.approx(rank_correlation(accuracy, source)),
    }
    for point in points:
        for which in ("source", "adapted"):
            parts = point[which]
            whole = parts["va|aa"]["mean"] + parts["av|vv"]["mean"]
            assert parts["gap"]["mean"] == pytest.approx(whole)


@pytest.fixture(scope="module")
def batch(model):
    audio, video, labels = stream("white", samples=64)[0]
    with torch.no_grad():
        return audio, video, model.encode(audio, video), labels


@pytest.fixture(scope="module")
def vectors(model, batch):
    return gradients.loss_gradients(model, *batch[2:])


def test_a_gradient_agrees_with_itself(vectors):
    for vector in vectors.values():
        assert gradients.cosine(vector, vector) == pytest.approx(1)
        assert gradients.cosine(vector, -vector) == pytest.approx(-1)
        assert gradients.cosine(vector, 3 * vector) == pytest.approx(1)
    assert gradients.cosine(vectors["labels"], vectors["entropy"]) < 0.99


def test_principal_entropy_of_all_classes_is_entropy(vectors):
    assert gradients.cosine(vectors["principal 10"], vectors["entropy"]) == pytest.approx(
        1, abs=1e-4
    )
    assert gradients.cosine(vectors["principal 1"], vectors["entropy"]) < 0.99


@pytest.mark.parametrize(
    ("loss", "weights"),
    [("principal 2", (1, 0, 0)), ("balance", (0, 1, 0)), ("attention", (0, 0, 1)),
     ("abpem", (1, 1, 1))],
)  # fmt: skip
def test_gradients_are_those_of_a_step(model, batch, vectors, loss, weights):
    names = ("entropy_weight", "balance_weight", "attention_weight")
    options = dict(zip(names, map(float, weights), strict=True))
    adapted = fasttta.adapt(model, "abpem", k=gradients.K, window=1, **options)
    grads = adapted.step(*batch[:2], trace=True).grads
    # the packed qkv: rows of q, k, v one after the other, first all weights, then all biases
    order = sorted(grads, key=lambda name: (name.endswith("bias"), "qkv".index(name.split(".")[3])))
    stepped = torch.cat([grads[name].flatten().double() for name in order])
    torch.testing.assert_close(stepped, vectors[loss], rtol=2e-3, atol=2e-6)
    assert gradients.cosine(stepped, vectors[loss]) == pytest.approx(1, abs=1e-5)


def test_gradients_change_nothing(model, batch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients.loss_gradients(model, *batch[2:])
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_readme_shows_todays_variants():
    """Its figures are measured; at least its rows are variants, its streams those of ablate."""
    text = (ROOT / "fasttta/demo/study/README.md").read_text()
    shown_rows = text.split("<!-- study -->")[1].split("<!-- /study -->")[0].strip().splitlines()
    labels = [line.split("|")[1].strip() for line in shown_rows[2:]]
    assert set(labels) <= {"source", *(v.label for v in ablate.VARIANTS)}
    assert {v.label for v in ablate.VARIANTS if v.group == "loss terms"} < set(labels)
    assert re.findall(r"`([\w-]+)`", shown_rows[0]) == list(ablate.STREAMS)
    for name in study.STUDIES:
        assert f"`{name}`" in text or f"study {name}`" in text


def test_command(capsys, tmp_path, monkeypatch):
    for module in study.STUDIES.values():
        monkeypatch.setitem(module.QUICK, "samples", 64)
    monkeypatch.setitem(ablate.QUICK, "variants", ablate.VARIANTS[:2])
    monkeypatch.setitem(gap.QUICK, "streams", ("white",))
    out = tmp_path / "study.html"
    arguments = ["study", "--quick", "--seeds", "0,1", "--json", "--report", str(out)]
    assert cli.main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["studies"]) == ["gap", "ablate", "gradients"]
    for result in data["studies"].values():
        assert result["protocol"]["seeds"] == [0, 1]
        assert result["protocol"]["samples"] == 64
    html = out.read_text()
    assert html == study.document(data).html()
    for word in ("http", "//", "<script"):
        assert word not in html
    assert "url(" not in html.replace('clip-path="url(#', "")
    text = study.table(data)
    full = data["studies"]["ablate"]["streams"]["white"]["variants"][0]
    cosine = data["studies"]["gradients"]["streams"]["white"]["cosine"]["entropy"]
    for value in (shown(full["accuracy"]), shown(cosine, 2)):
        assert value in text
        assert value in html
    for word in ("V1: no attention term", "rank correlation", "A toy"):
        assert word in text


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_spreads_are_shown_of_several_seeds_only(model, monkeypatch, seeds):
    for module in study.STUDIES.values():
        monkeypatch.setitem(module.QUICK, "samples", 64)
    monkeypatch.setitem(ablate.QUICK, "variants", ablate.VARIANTS[:2])
    monkeypatch.setitem(gap.QUICK, "streams", ("white",))
    data = study.run(seeds=seeds, quick=True)
    for text in (study.table(data), study.document(data).html()):
        assert ("±" in text) == (len(seeds) > 1)
        assert ("over seeds" in text or "all seeds" in text) == (len(seeds) > 1)
        assert "source" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fame"], "study: fame unknown; known: gap, ablate, gradients"),
        (["gap", "--seeds", ""], "--seeds"),
    ],
)
def test_command_errors(capsys, arguments, message):
    try:
        status = cli.main(["study", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_spread():
    assert spread([2.0]) == {"mean": 2.0, "std": 0.0}
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2))}
    assert shown(spread([1.0, 3.0]), sign=True) == "+2.0 ±1.4"
    assert rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0
    assert rank_correlation([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(0.894, abs=1e-3)

"""fasttta demo clip: its scenes, its model, its report, and that methods recover what they do."""

from __future__ import annotations

import importlib.resources
import json
import re

import pytest
import torch
from places import ROOT
from safetensors import safe_open

import fasttta
from fasttta import cli
from fasttta.data.attack import pgd
from fasttta.demo.clip import captions, scenes, train
from fasttta.demo.clip import report as pages
from fasttta.demo.clip import run as demo

QUICK = {"methods": ["source", "r-tpt", "a-tpt"], "samples": 16}


@pytest.fixture(scope="module")
def results():
    calls = []
    data = demo.run(**QUICK, examples=1, progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(8))
    assert {total for _, total, _ in calls} == {7}
    return data


def test_captions():
    ids = captions.tokenize(["a photo of the digit seven.", "A cyan two on brown."])
    assert ids.shape == (2, captions.CONTEXT)
    assert ids.dtype == torch.int64
    ends = ids.argmax(1).tolist()
    assert ends == [8, 7]
    assert ids[0, 9:].tolist() == [0, 0, 0]
    assert ids.max() == captions.VOCABULARY - 1
    for text, match in (("a photo of a cat", "unknown cat"), ("a " * 11, "11 words")):
        with pytest.raises(ValueError, match=match):
            captions.tokenize([text])
    prompts = demo.class_ids()
    assert (prompts[:, : 1 + len(captions.PROMPT.split())] == prompts[0, :6]).all()
    assert len(prompts.unique(dim=0)) == 10


def test_scenes_are_seeded_and_never_seen_in_training():
    one, again, other = (scenes.test_scenes(20, seed) for seed in (0, 0, 1))
    assert torch.equal(one.pixels, again.pixels)
    assert not torch.equal(one.pixels, other.pixels)
    assert one.pixels.shape == (20, 3, 32, 32)
    assert one.pixels.min() >= 0
    assert one.pixels.max() <= 1
    assert 1 < scenes.test_scenes(200, 0).digits.unique().numel() <= 10
    for n in (0, 598):
        with pytest.raises(ValueError, match=f"samples={n}; needed 1 to 597"):
            scenes.test_scenes(n, 0)


def test_captions_are_true_of_what_they_say():
    drawn = scenes.test_scenes(40, 3)
    texts, true = train.captions(drawn, torch.Generator().manual_seed(0))
    inks, papers = list(captions.INKS), list(captions.PAPERS)
    for j, text in enumerate(texts):
        said = set(re.findall(r"\w+", text))
        for i in range(40):
            facts = {captions.DIGITS[drawn.digits[i]], inks[drawn.ink[i]], papers[drawn.paper[i]]}
            about = said & {*captions.DIGITS, *inks, *papers}
            assert true[i, j] == (about <= facts), (text, facts)
    assert true.diagonal().all()


def test_training_is_seeded_and_learns():
    generator = torch.Generator().manual_seed(0)
    images, digits = torch.rand(32, 8, 8, generator=generator), torch.arange(32) % 10
    before = torch.are_deterministic_algorithms_enabled()
    try:
        runs = [train.train(images, digits, seed=5, epochs=2, batch=16) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(before)
    for (name, a), b in zip(
        runs[0].state_dict().items(), runs[1].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    start = train.new_model(5)
    assert not torch.equal(start.visual.proj, runs[0].visual.proj)
    # what is trained is what is used: the plain text tower and the packed one
    ids = demo.class_ids()
    assert torch.allclose(train.encode_text(runs[0], ids), runs[0].encode_text(ids), atol=1e-5)


def test_the_shipped_model():
    model, drawn = scenes.load_clip(), scenes.test_scenes(200, 7)
    assert scenes.MODEL_PATH.stat().st_size < 1e6
    with safe_open(scenes.MODEL_PATH, "pt") as file:
        provenance = file.metadata()["provenance"]
    accuracy = float(re.search(r"accuracy (\d+\.\d)", provenance)[1])
    measured = 100 * (model(drawn.pixels).argmax(1) == drawn.digits).double().mean().item()
    assert abs(measured - accuracy) < 6  # standard error of 200 images: 2.5 points or less
    assert accuracy > 80
    files = importlib.resources.files("fasttta.demo.clip")
    assert (files / "clip.safetensors").is_file()


def test_report(results):
    assert json.loads(json.dumps(results)) == results
    assert list(results["streams"]) == ["clean", "attacked"]
    for by_method in results["streams"].values():
        assert list(by_method) == QUICK["methods"]
        for result in by_method.values():
            assert 0 <= result["score"] <= 100
            assert result["samples_per_s"] > 0
            assert sum(result["series"][0]["samples"]) == 16
    assert results["threat"]["steps"] == 10
    assert results["threat"]["label_source"] == "true"
    assert results["threat"]["eps"] == pytest.approx(4 / 255)
    assert "nothing of an adaptation" in results["threat"]["knowledge"]
    assert results["protocol"]["seeds"] == [0]


def test_the_attack_breaks_it_and_views_bring_it_back(results):
    """Seeded; the margin is less than half of what they recover."""
    scores = {m: x["score"] for m, x in results["streams"]["attacked"].items()}
    assert results["streams"]["clean"]["source"]["score"] > 75
    assert scores["source"] < 15
    assert results["success"] > 85
    for name in ("r-tpt", "a-tpt"):
        assert scores[name] > scores["source"] + 25, scores


def test_the_numbers_are_those_of_the_public_api(results):
    """The same images, attack and methods, without the demo's code."""
    model, drawn = scenes.load_clip(), scenes.test_scenes(16, 0)
    attacked = pgd(model, drawn.pixels, drawn.digits, eps=4 / 255, steps=10,
                   generator=torch.Generator().manual_seed(0))  # fmt: skip
    adapted = fasttta.adapt(
        model, "r-tpt", classes=[*captions.DIGITS], prompt=captions.PROMPT,
        tokenizer=captions.tokenize, views=demo.VIEWS,
    )  # fmt: skip
    for stream, pixels in (("clean", drawn.pixels), ("attacked", attacked.pixels)):
        hits = (adapted(pixels).argmax(1) == drawn.digits).double().mean().item()
        assert results["streams"][stream]["r-tpt"]["score"] == pytest.approx(100 * hits)


def test_examples_show_what_happened(results):
    (shown,) = results["examples"]
    assert shown["clean"]["says"] == shown["digit"] != shown["attacked"]["says"]
    weights = [x["weight"] for x in shown["views"]]
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert all((x["weight"] > 0) == x["selected"] for x in shown["views"])
    chosen = [x for x in shown["views"] if x["selected"]]
    assert [x["entropy"] for x in chosen] == sorted(x["entropy"] for x in chosen)
    # the smoother the attention, the larger the weight
    smooth = sorted(chosen, key=lambda x: x["tv"])
    assert [x["weight"] for x in smooth] == sorted((x["weight"] for x in chosen), reverse=True)


def test_table_and_page(results, tmp_path):
    text = pages.table(results)
    for word in (*QUICK["methods"], "clean", "attacked", "PGD-10 in L-infinity, eps 4/255",
                 "white box", "true label", "a toy"):  # fmt: skip
        assert word in " ".join(text.split())
    score = results["streams"]["attacked"]["a-tpt"]["score"]
    row = next(line for line in text.splitlines() if line.startswith("a-tpt"))
    assert f"{score:.1f}" in row.split()
    page = pages.document(results).to_html(tmp_path / "out.html").read_text()
    assert page.count("<img ") == 3 + 4 * len(results["examples"][0]["views"])
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for word in ("Threat model", "Inside A-TPT", "L-infinity", "not selected"):
        assert word in page
    alone = demo.run(["a-tpt"], samples=4, steps=1, seeds=(0, 1))
    assert "±" in pages.table(alone)
    assert "<img" not in pages.document(alone).html()


def test_seeds_and_labels():
    one, again, other = (
        demo.run(["source", "ttc"], samples=24, seeds=[seed], labels=labels, eps=1, steps=2)
        for seed, labels in ((0, "true"), (0, "true"), (0, "pseudo"))
    )
    for stream, by_method in one["streams"].items():
        for name, result in by_method.items():
            assert result["series"] == again["streams"][stream][name]["series"]
    assert other["threat"]["label_source"] == "pseudo"
    assert (
        other["streams"]["clean"]["source"]["score"] == one["streams"]["clean"]["source"]["score"]
    )


def test_command(capsys, tmp_path):
    arguments = ["--samples", "3", "--methods", "source,a-tpt", "--eps", "2", "--steps", "1"]
    out_file = tmp_path / "out.html"
    assert cli.main(["demo", "clip", *arguments, "--json", "--report", str(out_file)]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["threat"]["eps"] == pytest.approx(2 / 255)
    assert len(data["examples"]) == 3
    assert err.strip() == f"report: {out_file}"
    assert out_file.read_text().count("<figure") >= 7
    assert cli.main(["demo", "clip", "--quick", "--samples", "1", "--steps", "0"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in demo.QUICK["methods"])
    assert "torch" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip", "--streams", "fog"], "demo clip takes no --streams"),
        (["clip", "--severity", "3", "--batch", "2"], "demo clip takes no --severity, --batch"),
        (["--eps", "4"], "needs demo clip: --eps"),
        (["clip", "--methods", "tent"], "tent unknown; known: source, tpt"),
        (["clip", "--samples", "0"], "samples=0"),
        (["clip", "--eps", "400"], "eps is 1.56"),
        (["clip", "--report", "no/such/out.html"], "there is no folder"),
    ],
)
def test_command_errors(capsys, arguments, message):
    assert cli.main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_method_has_settings():
    assert list(demo.SETTINGS) == [
        name for name in ("source", "tpt", "c-tpt", "r-tpt", "a-tpt", "mta", "ttc")
    ]
    assert {*demo.SETTINGS, "rada"} == set(fasttta.methods.names("vision-language"))
    assert set(demo.SETTINGS) == set(pages.ABOUT)


def test_readme_shows_todays_demo():
    """Its figures are measured; at least its rows and protocol are what the code does."""
    readme = (ROOT / "fasttta/demo/clip/README.md").read_text()
    shown = readme.split("<!-- clip-table -->")[1].split("<!-- /clip-table -->")[0]
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("-----"))
    rows = [line.split()[0] for line in lines[start + 1 :][: len(demo.METHODS)]]
    assert tuple(rows) == demo.METHODS
    text = " ".join(shown.split())
    assert f"{demo.VIEWS} views each" in text
    assert "PGD-10 in L-infinity, eps 4/255" in text

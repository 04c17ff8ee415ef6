"""fasttta warmup: models of every kind, and what it says."""

from __future__ import annotations

import json

import pytest
import torch
from cases import tiny_stats
from clips import tiny_clip

import fasttta
from fasttta import cli
from fasttta.commands import warmup
from fasttta.demo.digits import MODEL_PATH
from fasttta.models import CAVMAE
from fasttta.ops import first_use

DEMO = (str(MODEL_PATH), "--num-heads", "4", "--device", "cpu")


def _run(capsys, *arguments):
    status = cli.main(["warmup", *arguments])
    return status, *capsys.readouterr()


def test_a_checkpoint(capsys):
    arguments = (*DEMO, "--method", "abpem", "--batch", "4", "--window", "3", "--option", "k=2")
    status, out, err = _run(capsys, *arguments, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["steps"] == 3 * 2 + 2  # three fillings of the window, predictions
    assert report["seconds"] >= sum(x["seconds"] for x in report["made"])
    status, out, _ = _run(capsys, *arguments, "--encode-batch", "5")
    assert status == 0
    assert "10 runs in" in out


def test_a_module_and_source_statistics(capsys, tmp_path):
    tiny_stats().save(tmp_path / "stats.safetensors")
    status, out, err = _run(
        capsys, "cases:tiny_model", "--method", "brimpr", "--batch", "3", "--device", "cpu",
        "--source-stats", str(tmp_path / "stats.safetensors"), "--option", "prompts=(2, 3)",
    )  # fmt: skip
    assert status == 0, err
    assert "4 runs in" in out


def test_what_adapting_makes_is_reported_too(capsys, monkeypatch):
    plain = warmup.adapt

    def building(*args, **options):
        with first_use.telling("library", "kernels.so", "builds", "built"):
            return plain(*args, **options)

    monkeypatch.setattr(warmup, "adapt", building)
    status, out, _ = _run(capsys, *DEMO, "--method", "read", "--batch", "2")
    assert status == 0
    assert out.splitlines()[0].startswith("library ")
    assert out.splitlines()[0].endswith(" s  kernels.so")


@pytest.mark.parametrize("name", ["Joint", "HuggingFaceStyle"])
def test_any_fusion_transformer(capsys, name):
    audio = "7x12x5" if name == "Joint" else "7x4:int64"
    status, out, err = _run(
        capsys, f"fusions:{name}", "--method", "read", "--batch", "2", "--device", "cpu",
        "--input", audio, "--input", "7x3x6x6",
    )  # fmt: skip
    assert status == 0, err
    assert "4 runs in" in out


def test_a_clip(capsys, tmp_path):
    arguments = ("clips:tiny_clip", "--batch", "2", "--device", "cpu", "--views", "4")
    status, out, err = _run(capsys, *arguments, "--classes", "5")
    assert status == 0, err
    assert "3 runs in" in out
    status, _, err = _run(capsys, *arguments)
    assert status == 2
    assert "a CLIP needs --classes" in err
    status, _, err = _run(capsys, *arguments, "--classes", str(tmp_path / "none"))
    assert status == 2
    assert "none" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "nothing"), "nothing"),
        (("--option", "k"), "--option k: needed name=value"),
        (("--option", "knob=3"), "knob"),
        (("--classes", "7"), "has its classes in its weights"),
        (("--engine", "graph"), 'engine="graph" needs a model on a GPU'),
        (("--precision", "int1"), "int1"),
        (("--device", "nowhere"), "--device nowhere"),
    ],
)
def test_errors(capsys, arguments, message):
    status, out, err = _run(capsys, *DEMO, "--batch", "2", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_shapes_of_the_published_models():
    model = CAVMAE(2, dim=12, num_heads=3, depth=(0, 0, 1))
    assert warmup._cavmae_shapes(model) == ((1024, 128), (3, 224, 224))


def test_shapes_of_inputs_of_other_models(tiny_model):
    shapes = [(3, *shape) for shape in warmup._cavmae_shapes(tiny_model())]
    tiny_model().check_inputs(*map(torch.zeros, shapes))
    assert warmup._of_batch(["4x1024x128", "4x20:int64"], 2) == ["2x1024x128", "2x20:int64"]


def test_options():
    assert warmup.parsed(["k=8", "balance=mean", "prompts=(2, 3)", "gate=True"]) == {
        "k": 8, "balance": "mean", "prompts": (2, 3), "gate": True,
    }  # fmt: skip


def test_ids_of_classes_fit_a_clip():
    clip = tiny_clip()
    ids = warmup._classes(clip, "9")
    assert len(ids) == 9
    assert fasttta.adapt(clip, "tpt", classes=ids, views=2).step(torch.rand(3, 24, 24))

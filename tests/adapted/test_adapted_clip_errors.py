"""CLIP with methods for single images: bad input is named, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from clips import (
    TUNING,
    adapt,
    image,
    tiny_clip,
    tiny_ids,
    tiny_views,
)

import fasttta
from fasttta import methods


@pytest.fixture(scope="module")
def model():
    """Nothing may change it."""
    return tiny_clip()


def test_bad_calls(model):
    adapted = adapt(model, "a-tpt")
    views = tiny_views(8)
    for call, error, match in (
        (lambda: adapted.step(), TypeError, "needed images, or views="),
        (lambda: adapted.step(image(0), views=views), TypeError, "found both or neither"),
        (lambda: adapted.predict(), TypeError, "needed images, or views="),
        (lambda: adapted.step([]), ValueError, "empty list"),
        (lambda: adapted.step(torch.rand(0, 3, 9, 9)), ValueError, "empty batch"),
        (lambda: adapted.step(image(0) * 5 - 2), ValueError, "image 0.*normalised"),
        (lambda: adapted.step(image(0).to("meta")), ValueError, "image 0 is on meta"),
        (lambda: adapted.step("cat.png"), TypeError, "image 0"),
        (lambda: adapted.step(views=[1]), TypeError, "fasttta.data.Views, found list"),
        (lambda: adapted.step(views=tiny_views(8, 32)), ValueError, "32 pixels a side, .* 24"),
        (lambda: adapt(model, "a-tpt", drop_self=(True,), ensemble="similarity").step(views=views),
         ValueError, "drop_self has 1 entries, the image 8 views"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_bad_options(model):
    for name, options, match in (
        ("a-tpt", {"rollout": "x"}, "rollout='x': needed 'code' or 'paper' or 'gar'"),
        ("a-tpt", {"mask": "x"}, "mask='x'"),
        ("a-tpt", {"ensemble": "x"}, "ensemble='x'"),
        ("a-tpt", {"tv_map": "x"}, "tv_map='x'"),
        ("a-tpt", {"base_view": "x"}, "base_view='x'"),
        ("a-tpt", {"high": 0.5}, "needed high \\+ low of at most 1"),
        ("a-tpt", {"mix_low": 2}, "mix_low=2: needed a number from 0 to 1"),
        ("a-tpt", {"tv_temperature": 0}, "tv_temperature=0"),
        ("a-tpt", {"tv_loss": 1}, "tv_loss=1: needed True or False"),
        ("tpt", {"views": 0}, "views=0: needed an integer of at least 1"),
        ("tpt", {"select": 0}, "select=0"),
        ("tpt", {"select": 1.5}, "select=1.5: needed a share above 0 and at most 1"),
        ("tpt", {"lr": 0}, "lr=0"),
        ("tpt", {"weight_decay": -1}, "weight_decay=-1: needed a finite number of at least 0"),
        ("tpt", {"prompt": " "}, "prompt=' '"),
        ("tpt", {"prompt_length": 0}, "prompt_length=0"),
        ("tpt", {"steps": 0}, "steps=0"),
        ("c-tpt", {"dispersion_weight": "x"}, "dispersion_weight='x'"),
        ("r-tpt", {"neighbours": 0}, "neighbours=0"),
        ("r-tpt", {"temperature": 0.0}, "temperature=0.0"),
        ("mta", {"nearest": 2}, "nearest=2"),
        ("ttc", {"eps": 0}, "eps=0"),
        ("ttc", {"threshold": -1}, "threshold=-1"),
    ):
        with pytest.raises(ValueError, match=match):
            methods.by_name(name)(**options)
    with pytest.raises(TypeError, match="TPT has no option k; known: .*views.*tokenizer"):
        adapt(model, "tpt", k=3)
    with pytest.raises(ValueError, match="TPT has no preset 'x'; known: 'code', 'paper'"):
        methods.TPT.preset("x")


def test_models_and_methods_that_do_not_fit(model, tiny_model):
    for name in ("tent", "read", "abpem", "sar"):
        with pytest.raises(
            ValueError, match=f"'{name}' adapts fusion models, found fasttta.models.CLIP"
        ):
            fasttta.adapt(model, name, classes=tiny_ids())
    for name in (*TUNING, "mta", "ttc"):
        with pytest.raises(ValueError, match=f"'{name}' adapts vision-language models"):
            fasttta.adapt(tiny_model(), name)
    with pytest.raises(ValueError, match="models of this family take no classes"):
        fasttta.adapt(tiny_model(), "read", classes=["cat"])
    with pytest.raises(ValueError, match="guard: 'a-tpt' begins every image anew"):
        fasttta.adapt(model, classes=tiny_ids(), guard=fasttta.ShiftDetector())
    with pytest.raises(ValueError, match='engine="graph"'):
        fasttta.adapt(model, classes=tiny_ids(), engine="graph")


def test_bad_classes(model):
    for classes, options, error, match in (
        (None, {}, ValueError, "classes=None: vision-language models need class names"),
        ("cat", {}, TypeError, "a list of names or token ids, found 'cat'"),
        ([], {}, TypeError, "classes is an empty list; needed a list of names"),
        (["cat", ""], {}, TypeError, "a list of names, found ''"),
        (["cat", 3], {}, TypeError, "a list of names, found 3"),
        (torch.zeros(2, 3), {}, TypeError, "int64 token ids .*found torch.float32"),
        (tiny_ids()[0], {}, TypeError, r"\[14\]"),
        (["cat"], {"tokenizer": 3}, TypeError, "a callable or a path, found 3"),
        (["cat"], {"tokenizer": "no/such.gz"}, FileNotFoundError, "no such merges file"),
        (tiny_ids(), {"prompt_length": 5}, ValueError, "prompt_length=5: the classes differ"),
    ):
        with pytest.raises(error, match=match):
            fasttta.adapt(model, "tpt", classes=classes, **options)


def test_names_without_a_tokenizer(model, monkeypatch):
    from fasttta.families import class_names as classes

    monkeypatch.setattr(classes, "_PACKAGES", ())
    with pytest.raises(ValueError, match="pass tokenizer=, a callable"):
        fasttta.adapt(model, classes=["cat"])

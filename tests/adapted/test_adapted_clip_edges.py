"""CLIP with methods for single images, at the edges: one class, one view, equal views, NaN."""

from __future__ import annotations

import pytest
import torch
from clips import (
    EOT,
    METHODS,
    NOISE,
    SOT,
    TUNING,
    adapt,
    image,
    same,
    tiny_clip,
    tiny_ids,
    tiny_views,
)

import fasttta
from fasttta.data import Views


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def model():
    """Nothing may change it."""
    return tiny_clip()


def test_at_least_one_view_is_selected(model):
    assert adapt(model, "tpt", views=6, select=0.1).step(image(0)).stats["selected"].numel() == 1
    adapted = adapt(model, "r-tpt", views=10, select=0.15)
    assert adapted.step(views=tiny_views(6)).stats["selected"].numel() == 1


def test_one_class(model, method):
    if method in TUNING:
        with pytest.raises(ValueError, match="needed at least 2 classes"):
            fasttta.adapt(model, method, classes=tiny_ids(1), **METHODS[method])
        return
    adapted = fasttta.adapt(model, method, classes=tiny_ids(1), **METHODS[method])
    result = adapted.step(image(0))
    assert result.logits.shape == (1, 1)
    assert result.logits.isfinite().all()


def test_one_view(model, method):
    options = {"views": 1, "select": 1.0} if method in TUNING else {}
    options = {"views": 1} if method == "mta" else options
    result = adapt(model, method, **options).step(image(0))
    assert result.logits.isfinite().all()
    if method in TUNING:
        assert result.stats["weights"].tolist() == [1.0]
    if method == "mta":
        assert torch.allclose(result.logits, result.logits_before, **NOISE)


def test_equal_views(model, method):
    one = tiny_views(1)
    equal = Views(
        one.base.repeat(8, 1, 1, 1), one.base.repeat(8, 1, 1, 1), torch.full((8,), 0.5).double()
    )
    result = adapt(model, method).step(views=equal)
    assert result.logits.isfinite().all()
    if method in TUNING:
        assert len(set(result.stats["selected"].tolist())) == 2
    if method == "r-tpt":
        assert torch.allclose(result.stats["weights"], torch.full((8,), 1 / 8))
    if method == "mta":
        assert torch.allclose(result.logits, result.logits_before, atol=1e-4)


def test_nan_pixels(model, method):
    adapted, poisoned = adapt(model, method), image(0)
    before = adapted.step(image(1))
    poisoned[1, 3, 3] = torch.nan
    for call in (adapted, adapted.step, adapted.predict):
        with pytest.raises(ValueError, match="image 0"):
            call(poisoned)
    with pytest.raises(ValueError, match="image 1"):
        adapted.step([image(0), poisoned])
    same(adapted.step(image(1)), before)


def test_names_longer_than_the_context(model):
    def tokenizer(texts):
        return [[SOT, 5, 6, 7, 8, *[30] * (len(text) - 15), EOT] for text in texts]

    for name, match in (("x" * 30, r"context of 16 tokens.*'x{30}' \(\d+ tokens\)"),):
        with pytest.raises(ValueError, match=match):
            fasttta.adapt(model, "tpt", classes=["ab", name], tokenizer=tokenizer)
    adapted = fasttta.adapt(model, "tpt", classes=["ab", "cd e"], tokenizer=tokenizer)
    assert adapted.step(image(0)).logits.shape == (1, 2)

"""The methods that fasttta/methods/README.md has in full: each is run as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import torch
from cases import differing, snapshot
from clips import image, tiny_clip, tiny_ids
from places import ROOT

import fasttta
from fasttta import methods
from fasttta.methods import Method, registry

README = (ROOT / "fasttta" / "methods" / "README.md").read_text()
EXAMPLES = dict(
    re.findall(
        r"<!-- example: (\w+) -->\n```python\n(.*?)```\n<!-- /example -->", README, re.DOTALL
    )
)


@pytest.fixture
def method(request, tmp_path, monkeypatch):
    """The class of an example, from a module of its own; its registration ends with the test."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    before = set(registry._methods)
    path = tmp_path / f"example_{request.param}.py"
    path.write_text(EXAMPLES[request.param])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    (name,) = set(registry._methods) - before
    return methods.by_name(name)


def lived_through(model, cls: type[Method], batches: list, folder, **options) -> None:
    """An adapted model learns something, is saved, loaded and reset, each time to the bit."""
    adapted = fasttta.adapt(model, cls.name, **options)
    fresh = snapshot(adapted)
    for batch in batches[:-1]:
        assert torch.isfinite(adapted.step(*batch).logits).all()
    adapted.save(folder)
    loaded = fasttta.load(model, folder)
    assert type(loaded.options) is cls
    assert torch.equal(adapted.step(*batches[-1]).logits, loaded.step(*batches[-1]).logits)
    assert differing(adapted, loaded) == []
    adapted.reset()
    assert differing(adapted, fresh) == []


def test_there_are_three_short_examples():
    assert list(EXAMPLES) == ["gradient", "state", "image"]
    for text in EXAMPLES.values():
        assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("method", ["gradient", "state"], indirect=True)
def test_methods_of_streams(method, tiny_model, tiny_batch, tmp_path):
    model, batches = tiny_model(), [tiny_batch(seed=seed) for seed in range(4)]
    lived_through(model, method, batches, tmp_path / "save")
    adapted, fresh = fasttta.adapt(model, method()), fasttta.adapt(model, method())
    adapted.step(*batches[0])
    assert differing(adapted, fresh)


@pytest.mark.parametrize("method", ["gradient"], indirect=True)
def test_the_one_with_gradients_learns_from_sure_samples(method, tiny_model, tiny_batch):
    model = tiny_model()
    result = fasttta.adapt(model, method(threshold=0.0)).step(*tiny_batch())
    entropy = fasttta.functional.entropy(result.logits_before).mean()
    torch.testing.assert_close(result.losses["total"], entropy)
    adapted = fasttta.adapt(model, method(threshold=1.0))
    assert int(adapted.step(*tiny_batch()).n_used) == 0
    with pytest.raises(ValueError, match=r"threshold=1\.5: needed a number from 0 to 1"):
        method(threshold=1.5)


@pytest.mark.parametrize("method", ["state"], indirect=True)
def test_the_one_with_a_state_balances(method, tiny_model, tiny_batch):
    """With all of the mean from the batch before, a class that was frequent there loses."""
    model, batch = tiny_model(), tiny_batch()
    adapted = fasttta.adapt(model, method(momentum=0.0))
    adapted.step(*batch)
    p = model(*batch).softmax(-1)
    expected = (p / p.mean(0)).log()
    torch.testing.assert_close(adapted.step(*batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["image"], indirect=True)
def test_the_one_for_images(method, tmp_path):
    clip = tiny_clip()
    images = [(image(seed),) for seed in range(3)]
    lived_through(clip, method, images, tmp_path / "save", classes=tiny_ids(), views=4)
    for other in ("abpem", "source"):  # of images a source is run
        if other == "abpem":
            with pytest.raises(ValueError, match="'abpem' adapts fusion models"):
                fasttta.adapt(clip, other, classes=tiny_ids())

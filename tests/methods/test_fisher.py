"""Fisher weights in the form that the official BriMPR code saves them."""

from __future__ import annotations

import pickle

import pytest
import torch
from archives import writes

import fasttta
from fasttta.methods import EATA

OPTIONS = {"lr": 1e-2, "e_margin": 1.9, "d_margin": 0.999, "fisher_weight": 1e6}


def _published(model, fisher):
    """All norms, with zeros where they do not run, and source values."""
    norms = {
        f"{path}.{name}": x
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for name, x in module.named_parameters()
    }
    assert len(norms) > len(fisher)
    return {
        f"module.{name}": [fisher.get(name, torch.zeros_like(x)).clone(), x.detach().clone()]
        for name, x in norms.items()
    }


@pytest.fixture
def made(tiny_model, tiny_batch):
    model = tiny_model()
    fisher = fasttta.collect_fisher(model, [tiny_batch(seed=3)])
    return model, fisher, _published(model, fisher)


def test_the_published_form_is_ours(made, tiny_batch, tmp_path):
    """Bit for bit the same steps, from the dict and from a file of pickle.dump."""
    model, fisher, published = made
    path = tmp_path / "fisher.pkl"
    path.write_bytes(pickle.dumps(published))
    read = EATA.fisher_from_official(path)
    assert "norm.weight" in read
    assert "norm_a.weight" in read
    results = []
    for weights in (fisher, published, read):
        adapted = fasttta.adapt(model, "eata", fisher=weights, **OPTIONS)
        adapted.step(*tiny_batch())
        results.append((adapted.step(*tiny_batch(seed=2)), adapted.tuned))
    assert results[0][0].losses["fisher"] > 0
    for result, tuned in results[1:]:
        assert torch.equal(result.losses["fisher"], results[0][0].losses["fisher"])
        assert torch.equal(result.logits, results[0][0].logits)
        assert all(torch.equal(x, results[0][1][name]) for name, x in tuned.items())
    # and the penalty is that of the official code
    adapted = fasttta.adapt(model, "eata", fisher=published, **OPTIONS)
    adapted.step(*tiny_batch())
    penalty = sum(
        (published[f"module.{n}"][0] * (x - published[f"module.{n}"][1]) ** 2).sum()
        for n, x in adapted.tuned.items()
    )
    loss = adapted.step(*tiny_batch(seed=2)).losses["fisher"]
    assert torch.allclose(loss, penalty, rtol=1e-4)


def test_what_is_refused(made):
    model, _, published = made
    name = "module.norm.weight"
    weights, source = published[name]
    nan = torch.full_like(weights, torch.nan)
    for changes, match in (
        ({name: [nan, source]}, r"fisher\['module.norm.weight'\] must be finite"),
        ({name: [-weights - 1, source]}, "must be finite and not negative"),
        ({name: [weights, source + 0.1]}, "its source values of module.norm.weight are not this"),
        ({name: [weights, source[1:]]}, "its source values of module.norm.weight are not this"),
        ({name: [weights[1:], source]}, r"has shape \(11,\), needed \(12,\)"),
        ({"module.norm_a.weight": [weights + 1, source]}, "norm_a.weight in one of them only"),
        ({"module.other": [weights + 1, source]}, "other in one of them only"),
        ({"norm.weight": weights}, "two entries for norm.weight"),
        ({name: [weights.to_sparse(), source]}, "is sparse"),
    ):
        with pytest.raises(ValueError, match=match):
            fasttta.adapt(model, "eata", fisher={**published, **changes})
    with pytest.raises(ValueError, match="norm.weight in one of them only"):
        fasttta.adapt(model, "eata", fisher={n: x for n, x in published.items() if n != name})
    half = {n: [w, s.half().float()] for n, (w, s) in published.items()}
    fasttta.adapt(model, "eata", fisher=half)
    for bad in ({name: [weights]}, {name: [weights, 3]}, [weights], "fisher.pkl"):
        with pytest.raises(TypeError, match="fisher must be a dict of tensors"):
            fasttta.adapt(model, "eata", fisher=bad)


def test_files_that_are_none(tmp_path):
    path, marker = tmp_path / "fisher.pkl", tmp_path / "marker"
    for content, match in (
        ({"a": torch.ones(2)}, "'a' is no pair"),
        ({"a": [torch.ones(2), torch.ones(3)]}, "'a' is no pair"),
        ({"a": [torch.ones(2).int()] * 2}, "'a' is no pair"),
        ([1], "found list"),
        ({}, "found dict"),
        ({"a": writes(marker)}, "it would call posix.system"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=match):
            EATA.fisher_from_official(path)
    assert not marker.exists()
    with pytest.raises(FileNotFoundError, match="no Fisher weights at"):
        EATA.fisher_from_official(tmp_path / "none")

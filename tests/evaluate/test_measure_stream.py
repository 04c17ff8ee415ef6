"""What is recorded of a labelled stream, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from cases import METHODS

import fasttta
from fasttta.demo import run as demo
from fasttta.evaluate import attention_gap, measure_stream
from fasttta.evaluate.stream import over_seeds

SIZES = (5, 3, 2)  # a mean over batches is not the mean over samples


@pytest.mark.parametrize("name", ["source", "tent", "read"])
def test_every_sample_is_counted(tiny_model, tiny_batch, name):
    options = {**METHODS[name], "lr": 5.0} if name != "source" else {}
    batches = [tiny_batch(n, seed=n) for n in SIZES]
    twin = fasttta.adapt(tiny_model(), name, **options)
    results = []
    for batch in batches:
        result = twin.step(*batch)
        results.append((result.logits_before, twin.predict(*batch), result.logits))
    # labels that single out the two predictions where they differ
    labels = [before.argmax(1) for before, _, _ in results]
    labels[0][0], labels[2] = (labels[0][0] + 1) % 7, results[2][1].argmax(1)
    if name == "read":
        differ = [not torch.equal(b.argmax(1), a.argmax(1)) for b, a, _ in results]
        assert any(differ), "the update changes no prediction"
    adapted = fasttta.adapt(tiny_model(), name, **options)
    stream = [(*batch, label) for batch, label in zip(batches, labels, strict=True)]
    measured = measure_stream(adapted, stream, 7)

    def hits(which):
        return [int((r[which].argmax(1) == y).sum()) for r, y in zip(results, labels, strict=True)]

    assert measured["before"] == pytest.approx(100 * sum(hits(0)) / 10)
    assert measured["after"] == pytest.approx(100 * sum(hits(1)) / 10)
    assert measured["score"] == measured["after" if name == "read" else "before"]
    assert measured["samples_per_s"] > 0
    series = measured["series"]
    assert series["samples"] == list(SIZES)
    assert (series["hits_before"], series["hits_after"]) == (hits(0), hits(1))
    scored = [r[2].argmax(1).bincount(minlength=7).tolist() for r in results]
    assert series["predicted"] == scored
    assert series["labels"] == [y.bincount(minlength=7).tolist() for y in labels]


class OnDevice(torch.Tensor):
    """Stands for a result on a GPU: notes what would wait for the device."""

    waits: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "bincount", "nonzero"):
            cls.waits.append(name)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["tent", "read"])  # scored before and after the update
def test_nothing_of_a_batch_is_read_before_the_stream_ends(
    tiny_model, tiny_batch, monkeypatch, name
):
    adapted = fasttta.adapt(tiny_model(), name)
    monkeypatch.setattr(OnDevice, "waits", [])

    def on_device(call):
        def called(*inputs):
            result = call(*inputs)
            if isinstance(result, torch.Tensor):
                return result.as_subclass(OnDevice)
            return replace(
                result,
                logits=result.logits.as_subclass(OnDevice),
                logits_before=result.logits_before.as_subclass(OnDevice),
            )

        return called

    monkeypatch.setattr(adapted, "step", on_device(adapted.step))
    monkeypatch.setattr(adapted, "predict", on_device(adapted.predict))
    waits = []

    def stream():
        for n in SIZES:
            yield (*tiny_batch(n, seed=n), torch.zeros(n, dtype=torch.int64))
            waits.extend(OnDevice.waits)

    measure_stream(adapted, stream(), 7)
    assert waits == []
    assert OnDevice.waits, "the results were read otherwise, and the test sees nothing"


def test_over_seeds():
    runs = [{"score": s, "before": 2 * s, "series": [s]} for s in (1.0, 2.0, 6.0)]
    measured = over_seeds(runs)
    assert (measured["score"], measured["before"]) == (3.0, 6.0)
    assert measured["score_std"] == pytest.approx(7**0.5)  # n - 1
    assert measured["series"] == [[1.0], [2.0], [6.0]]
    assert over_seeds(runs[:1])["score_std"] == 0.0


def test_measure_stream_leaves_the_adapted_state():
    model, batches = demo.load_model(), demo.stream("white", samples=128)
    adapted, plain = fasttta.adapt(model, "tent"), fasttta.adapt(model, "tent")
    result = measure_stream(adapted, batches, 10)
    for audio, video, _ in batches:
        plain(audio, video)
    for name, tensor in plain.tuned.items():
        assert tensor.equal(adapted.tuned[name])
    assert result["score"] == result["before"]
    with pytest.raises(ValueError, match="the stream is empty"):
        measure_stream(adapted, [], 10)


def test_attention_gap_is_the_bootstrapping_loss():
    model, batches = demo.load_model(), demo.stream("contrast", samples=96)
    gap = attention_gap(model, demo.encode_stream(model, batches).tokens)
    losses = [
        fasttta.adapt(model, "abpem", k=2, window=1).step(audio, video).stats["attention_gap"]
        for audio, video, _ in batches
    ]
    mean = sum(float(loss.sum()) for loss in losses) / 96
    assert gap["gap"] == pytest.approx(mean, rel=1e-5)
    assert gap["gap"] == gap["va|aa"] + gap["av|vv"]
    assert all(value > 0 for value in gap.values())
    with pytest.raises(ValueError, match="no batch"):
        attention_gap(model, [])

"""warmup: it runs on every shape of a stream, changes nothing, and says what it made."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from cases import METHODS, buffered, differing, flat, snapshot
from clips import adapt as adapt_clip
from clips import image, tiny_clip, tiny_ids, tiny_views

import fasttta
from fasttta.adapted import warmup
from fasttta.ops import first_use


def _steps(adapted, monkeypatch):
    """Shapes of the samples that the steps of an adapted model see, with those in its window."""
    sizes, step = [], adapted._step.__class__._objective

    def noted(self, features, valid, state):
        past = [len(x) for name, x in state.items() if name.startswith("queue.")]
        sizes.append((*past, len(features) if torch.is_tensor(features) else len(features[0])))
        return step(self, features, valid, state)

    monkeypatch.setattr(adapted._step.__class__, "_objective", noted)
    return sizes


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_the_state_is_the_same_to_the_bit(tiny_model, tiny_batch, method, engine):
    adapted, twin = (fasttta.adapt(tiny_model(), method, **METHODS[method]) for _ in range(2))
    if engine == "graph":
        adapted, twin = buffered(adapted), buffered(twin)
    for seed in range(2):  # the window is neither empty nor full
        for each in (adapted, twin):
            each.step(*tiny_batch(seed=seed))
    before, random = snapshot(adapted), torch.get_rng_state()
    adapted.warmup(*tiny_batch(4, seed=9))
    assert differing(before, adapted) == []
    assert torch.equal(random, torch.get_rng_state())
    for seed in range(2, 5):
        pairs = zip(*(flat(x.step(*tiny_batch(seed=seed))) for x in (adapted, twin)), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    assert differing(twin, adapted) == []


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_failure_changes_nothing(tiny_model, tiny_batch, monkeypatch, engine, call):
    adapted = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"])
    adapted = buffered(adapted) if engine == "graph" else adapted
    adapted.step(*tiny_batch(seed=1))
    before, random, calls = snapshot(adapted), torch.get_rng_state(), []
    plain = adapted._step._update

    def failing(*args):
        calls.append(torch.rand(()))
        plain(*args)
        if len(calls) == call:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(adapted._step, "_update", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapted.warmup(*tiny_batch(3))
    assert differing(before, adapted) == []
    assert torch.equal(random, torch.get_rng_state())
    monkeypatch.undo()
    twin = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"])
    twin = buffered(twin) if engine == "graph" else twin
    twin.step(*tiny_batch(seed=1))
    results = [flat(x.step(*tiny_batch(seed=2))) for x in (adapted, twin)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_guard_and_its_past_stay(tiny_model, tiny_batch):
    guard = fasttta.ShiftDetector(window=2)
    adapted = fasttta.adapt(tiny_model(), "tent", guard=guard)
    adapted.step(*tiny_batch(seed=1))
    before = snapshot(adapted)
    assert any(name.startswith("guard.") for name in before)
    adapted.warmup(*tiny_batch(seed=3))
    assert differing(before, adapted) == []


def test_every_count_of_samples_in_a_window_on_a_gpu(tiny_model, tiny_batch, monkeypatch):
    adapted = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"])  # a window of 3
    adapted.step(*tiny_batch(seed=1))
    sizes = _steps(adapted, monkeypatch)
    monkeypatch.setattr(warmup, "compiles_for_sizes", lambda adapted: True)
    made = adapted.warmup(*tiny_batch(4))
    wanted = {(*past, n) for past in ((), (4,), (4, 4)) for n in (1, 2, 3, 4)}
    assert set(sizes) == wanted
    assert made.steps == 12 + 4  # and predictions
    adapted.engine = (
        "graph"  # a captured step has room for every size; predictions are not captured
    )
    assert adapted.warmup(*tiny_batch(4)).steps == 3 * 2 + 4


def test_a_captured_step_and_where_nothing_is_compiled_take_one_partial_batch(
    tiny_model, tiny_batch, monkeypatch
):
    for make in (buffered, lambda adapted: adapted):
        with monkeypatch.context() as patch:
            adapted = make(fasttta.adapt(tiny_model(), "read"))
            adapted._step  # noqa: B018
            sizes = _steps(adapted, patch)
            assert adapted.warmup(*tiny_batch(4)).steps == 4
            assert {len(x) for x in sizes} == {1}
            if make is buffered:
                (plan,) = adapted._step.plans.values()
                assert plan.size == 4
            else:
                assert sizes == [(4,), (1,)]


def test_features_that_are_encoded_ahead_have_a_capture_of_their_own(tiny_model, tiny_batch):
    adapted = buffered(fasttta.adapt(tiny_model(), "read"))
    before = snapshot(adapted)
    adapted.warmup(*tiny_batch(2), encode_batch=5)
    assert sorted(plan.features is not None for plan in adapted._step.plans.values()) == [
        False, True,
    ]  # fmt: skip
    assert differing(before, adapted) == []


@pytest.mark.parametrize("method", ["source", "tpt", "c-tpt", "r-tpt", "a-tpt", "mta", "ttc"])
def test_images(method):
    adapted, twin = (adapt_clip(tiny_clip(), method) for _ in range(2))
    adapted.step(image(0))
    before, random = snapshot(adapted), torch.get_rng_state()
    assert adapted.warmup([image(1), image(2, 25, 30)]).steps == 3
    assert adapted.warmup(image(1)).steps == 2
    assert adapted.warmup(views=tiny_views()).steps == 2
    assert differing(before, adapted) == []
    assert torch.equal(random, torch.get_rng_state())
    results = [flat(x.step(image(3))) for x in (adapted, twin)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_as_many_images_as_are_computed_together(monkeypatch):
    monkeypatch.setattr(warmup, "compiles_for_sizes", lambda adapted: True)
    adapted = adapt_clip(tiny_clip(), "tpt", views=100)  # 256 views: two images
    assert adapted.warmup([image(i) for i in range(5)]).steps == 1 + 2 + 1
    adapted = adapt_clip(tiny_clip(), "tpt", views=4)
    assert adapted.warmup([image(i) for i in range(5)]).steps == 1 + 4 + 1


def test_captured_images_of_every_size_that_is_captured():
    adapted = buffered(adapt_clip(tiny_clip(), "tpt", views=64))  # four images together
    adapted.engine = "graph"
    before = snapshot(adapted)
    assert adapted.warmup([image(i) for i in range(4)]).steps == 1 + 3 + 1
    assert differing(before, adapted) == []
    (plans,) = adapted._captured.plans.values()
    assert set(plans) == {4, 1}


@pytest.mark.parametrize("loss", ["views", "entropy"])
def test_a_head_over_images(loss):
    options = {"classes": tiny_ids(), "loss": loss, "heads": 3}
    options |= {"views": 4} if loss == "views" else {}
    adapted = fasttta.adapt(tiny_clip(), "rada", **options)
    adapted.step([image(0), image(1)])
    before = snapshot(adapted)
    assert adapted.warmup([image(i) for i in range(3)]).steps == (2 if loss == "views" else 3)
    assert differing(before, adapted) == []


def test_what_was_made_is_reported(tiny_model, tiny_batch, monkeypatch):
    adapted = fasttta.adapt(tiny_model(), "read")
    step = adapted.__class__._step_on

    def compiling(self, *args, **options):
        with first_use.telling("kernel", "_tiles", "compiles", "compiled"):
            return step(self, *args, **options)

    monkeypatch.setattr(adapted.__class__, "_step_on", compiling)
    report = adapted.warmup(*tiny_batch(3))
    assert [x.kind for x in report.made if x.name == "_tiles"] == ["kernel", "kernel"]
    assert report.seconds >= sum(x.seconds for x in report.made)
    assert json.loads(json.dumps(report.as_dict()))["made"][-1]["name"] == "_tiles"
    assert str(report).splitlines()[-2].endswith(" s  _tiles")
    assert "3 runs" not in str(report)
    assert "4 runs in" in str(report)
    monkeypatch.undo()
    assert "nothing was left to build, compile or capture" in str(adapted.warmup(*tiny_batch(3)))


def test_it_warns_of_no_single_sample_and_the_stream_still_does(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.warmup(*tiny_batch(2))
    with pytest.warns(UserWarning, match="batch"):
        adapted.step(*tiny_batch(1))


def test_bad_input_is_refused(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read")
    adapted.step(*tiny_batch())
    before = snapshot(adapted)
    with pytest.raises(ValueError, match="video"):
        adapted.warmup(tiny_batch(2)[0], torch.zeros(2, 3, 4, 4))
    with pytest.raises(TypeError, match="needed 2 inputs"):
        adapted.warmup(tiny_batch(2)[0])
    with pytest.raises(TypeError, match="needed 2 inputs"):
        adapted.warmup()
    with pytest.raises(ValueError, match="encode_batch"):
        adapted.warmup(*tiny_batch(2), encode_batch=0)
    with adapted.source(), pytest.raises(RuntimeError, match="inside source"):
        adapted.warmup(*tiny_batch(2))
    assert differing(before, adapted) == []

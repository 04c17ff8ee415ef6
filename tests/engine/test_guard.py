"""guard=: adaptation that begins anew where the stream turns into another one."""

from __future__ import annotations

import copy

import pytest
from cases import METHODS, differing, same, snapshot, tiny_stats
from clips import tiny_clip, tiny_ids

import fasttta

WINDOW = 4


def guarded(model, method, **options):
    guard = fasttta.ShiftDetector(WINDOW, **options)
    return fasttta.adapt(model, method, guard=guard, **METHODS[method])


@pytest.mark.parametrize("name", [n for n in METHODS if n != "source"])
def test_begins_anew(tiny_model, tiny_batch, name, monkeypatch):
    """Behind the batch that shows the shift it is as a fresh one, bit for bit; not before."""
    from fasttta.engine.shift_detector import Guard

    monkeypatch.setattr(Guard, "_values", lambda self, result: {"x": next(values)})
    values = iter([1.0, 1.1, 0.9, 1.0, 1.05, 99.0, 1.0, 1.1])
    batches = [tiny_batch(seed=i) for i in range(8)]
    adapted, plain = guarded(tiny_model(), name), fasttta.adapt(tiny_model(), name, **METHODS[name])
    results = [adapted.step(*batch) for batch in batches]
    assert [bool(r.stats.pop("reset")) for r in results] == [i == 5 for i in range(8)]
    expected = [plain.step(*batch) for batch in batches[:6]]
    fresh = fasttta.adapt(tiny_model(), name, **METHODS[name])
    expected += [fresh.step(*batch) for batch in batches[6:]]
    assert all(same(a, b) for a, b in zip(results, expected, strict=True))
    values = iter([1.0, 1.1, 0.9, 1.0, 1.05, 99.0, 1.0, 1.1])
    adapted.reset()
    streamed = list(adapted.stream(batches))
    assert [bool(r.stats.pop("reset")) for r in streamed] == [i == 5 for i in range(8)]
    assert all(same(a, b) for a, b in zip(streamed, expected, strict=True))


def test_entropy_is_watched(tiny_model, tiny_batch):
    """Louder from one batch on, and less certain, which any method can tell."""
    batches = [tuple(x * (0.02 if i < 6 else 6) for x in tiny_batch(64, seed=i)) for i in range(8)]
    for name in ("source", "rada"):
        results = list(guarded(tiny_model(), name).stream(batches))
        assert [int(r.stats["reset"]) for r in results] == [0, 0, 0, 0, 0, 0, 1, 0], name


def test_discrepancies_are_watched(tiny_model, tiny_batch):
    """Of each modality: video alone goes astray."""
    batches = [tiny_batch(64, seed=i) for i in range(8)]
    batches[6:] = [(a, 0.02 * v) for a, v in batches[6:]]
    options = {**METHODS["brimpr"], "source_stats": tiny_stats(), "lr": 1e-6}
    adapted = fasttta.adapt(tiny_model(), "brimpr", guard=fasttta.ShiftDetector(WINDOW), **options)
    resets = [bool(adapted.step(*batch).stats["reset"]) for batch in batches]
    assert resets == [i == 6 for i in range(8)]


def test_what_is_watched_can_be_named(tiny_model, tiny_batch):
    options = METHODS["abpem"]
    for watch in ("attention_gap", ("total", "attention")):
        guard = fasttta.ShiftDetector(3, watch=watch)
        adapted = fasttta.adapt(tiny_model(), "abpem", guard=guard, **options)
        for i in range(3):
            adapted.step(*tiny_batch(seed=i))
        names = (watch,) if isinstance(watch, str) else watch
        assert tuple(adapted._state.current.guard) == names
        assert not guard.values  # its settings are used, not itself


@pytest.mark.parametrize("name", [n for n in METHODS if n != "source"])
def test_a_step_that_reports_nothing_of_the_name_is_undone(tiny_model, tiny_batch, name):
    guard = fasttta.ShiftDetector(watch="gap")
    adapted = fasttta.adapt(tiny_model(), name, guard=guard, **METHODS[name])
    before = snapshot(adapted)
    with pytest.raises(ValueError, match="watch='gap' is nothing .* it reports "):
        adapted.step(*tiny_batch())
    assert differing(before, adapted) == []


def test_saved_with_the_state(tiny_model, tiny_batch, tmp_path):
    batches = [tuple(x * (0.02 if i < 6 else 6) for x in tiny_batch(64, seed=i)) for i in range(8)]
    adapted = guarded(tiny_model(), "tent")
    for batch in batches[:5]:
        adapted.step(*batch)
    adapted.save(tmp_path)
    assert any(name.startswith("guard.") for name in snapshot(adapted))
    loaded = fasttta.load(tiny_model(), tmp_path)
    twin = copy.deepcopy(loaded)
    assert differing(adapted, loaded) == differing(adapted, twin) == []
    for batch in batches[5:]:
        expected = adapted.step(*batch)
        assert same(loaded.step(*batch), expected)
        assert same(twin.step(*batch), expected)
    loaded.reset()
    assert not loaded._state.current.guard


def test_reset_forgets_the_values(tiny_model, tiny_batch):
    adapted, fresh = guarded(tiny_model(), "tent"), guarded(tiny_model(), "tent")
    for i in range(3):
        adapted.step(*tiny_batch(seed=i))
    assert any(name.startswith("guard.") for name in snapshot(adapted))
    adapted.reset()
    assert differing(adapted, fresh) == []


def test_bad_guards(tiny_model):
    with pytest.raises(TypeError, match="guard must be a fasttta.ShiftDetector, found 5"):
        fasttta.adapt(tiny_model(), "tent", guard=5)
    for watch in ((), [3]):
        with pytest.raises(ValueError, match="needed names of stats or losses"):
            fasttta.ShiftDetector(watch=watch)
    for method in ("tpt", "rada"):
        with pytest.raises(ValueError, match="nothing to reset"):
            fasttta.adapt(tiny_clip(), method, classes=tiny_ids(), guard=fasttta.ShiftDetector())

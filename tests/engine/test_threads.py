"""One object in several threads takes turns; several objects on one model run side by side."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import METHODS, differing, same, snapshot
from clips import image, tiny_clip, tiny_ids

import fasttta
from fasttta.adapted.base import Lock
from fasttta.engine.step import Step


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Runs jobs at the same time, in a thread each; their results."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []
    gate = threading.Barrier(len(jobs))

    def run(i: int, job: Callable[[], Any]) -> None:
        try:
            gate.wait(30)
            results[i] = job()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(i, job), daemon=True) for i, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    assert not errors, errors
    return results


@pytest.mark.parametrize("name", ["read", "abpem", "tent"])
def test_no_step_is_lost(tiny_model, tiny_batch, name):
    """Threads that step on the same batch: as many steps in a row, in whatever order."""
    adapted = fasttta.adapt(tiny_model(), name, **METHODS[name])
    alone = copy.deepcopy(adapted)
    batch, steps = tiny_batch(), 12

    def work():
        for _ in range(steps):
            adapted.step(*batch)
            adapted.predict(*batch)

    together(*[work] * 3)
    for _ in range(3 * steps):
        alone.step(*batch)
    assert differing(alone, adapted) == []


def test_everything_at_once(tiny_model, tiny_batch, tmp_path):
    """Whatever the order, every prediction is the source's or of a state after whole steps, and
    every save is whole."""
    model = tiny_model()
    adapted = fasttta.adapt(model, "read", lr=1e-2)
    batch, count = tiny_batch(), 8
    twin, states, predictions = copy.deepcopy(adapted), [], []
    for _ in range(count + 1):
        states.append(snapshot(twin))
        predictions.append(twin.predict(*batch))
        twin.step(*batch)
    seen, handles = [], []

    def step():
        for _ in adapted.stream([batch] * count):
            pass

    def look():
        for _ in range(count):
            seen.append(adapted.predict(*batch))
            handles.append(snapshot(adapted))

    def save():
        for _ in range(3):
            adapted.save(tmp_path)
            handles.append(snapshot(fasttta.load(model, tmp_path)))
            handles.append(snapshot(copy.deepcopy(adapted)))

    source = []

    def leave():
        for _ in range(count):
            with adapted.source():
                source.append(adapted.predict(*batch))
                source.append(adapted.step(*batch).logits)

    together(step, look, save, leave)
    assert differing(states[count], adapted) == []
    assert len(seen) == count
    assert all(any(torch.equal(x, y) for y in predictions) for x in seen)
    assert all(any(differing(x, y) == [] for y in states) for x in handles)
    assert len(source) == 2 * count
    assert all(torch.equal(x, model(*batch)) for x in source)


def test_a_stream_holds_no_lock_between_batches(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read")
    stream = adapted.stream([tiny_batch(seed=s) for s in range(3)])
    next(stream)
    together(lambda: adapted.step(*tiny_batch(seed=9)))
    assert len(list(stream)) == 2


def test_others_wait_for_the_end_of_a_source_block(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-2)
    adapted.step(*tiny_batch())
    expected, results = adapted.predict(*tiny_batch()), []
    other = threading.Thread(target=lambda: results.append(adapted.predict(*tiny_batch())))
    with adapted.source():
        other.start()
        other.join(0.2)
        assert not results
    other.join(30)
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("name", ["tpt", "rada"])
def test_images_take_turns(name):
    options = {"tpt": {"views": 4, "select": 0.5}, "rada": {"heads": 3, "loss": "entropy"}}[name]
    adapted = fasttta.adapt(tiny_clip(), name, classes=tiny_ids(), **options)
    alone = copy.deepcopy(adapted)
    other = {n: x + 0.2 for n, x in adapted.tuned.items()}
    together(
        lambda: [adapted.step(image(1)) for _ in range(4)],
        lambda: [adapted.step(image(1)) for _ in range(4)],
    )
    for _ in range(8):
        result = alone.step(image(1))
    assert differing(alone, adapted) == []
    assert torch.equal(adapted.predict(image(2)), alone.predict(image(2)))
    together(lambda: adapted.load_tuned(other), lambda: adapted.step(image(1)), adapted.reset)
    assert result.logits.shape == (1, 6)


def test_a_step_that_fails_lets_the_next_thread_in(tiny_model, tiny_batch, monkeypatch):
    adapted = fasttta.adapt(tiny_model(), "read")
    with monkeypatch.context() as patch:
        patch.setattr(Step, "_adapt", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapted.step(*tiny_batch())
    together(lambda: adapted.step(*tiny_batch()))


def test_independent_objects_run_side_by_side(tiny_model, tiny_batch):
    """Two on one model, one of which waits inside a step for the other to finish its own."""
    model = tiny_model()
    first, second = (fasttta.adapt(model, "read", lr=1e-3) for _ in range(2))
    alone = copy.deepcopy(first)
    done = threading.Event()
    original = first._step.method.objective
    waited = []

    def objective(*args, **kwargs):
        waited.append(done.wait(30))
        return original(*args, **kwargs)

    object.__setattr__(first._step.method, "objective", objective)

    def work():
        result = second.step(*tiny_batch())
        done.set()
        return result

    a, b = together(lambda: first.step(*tiny_batch()), work)
    assert waited == [True]
    assert same(a, b)
    assert same(a, alone.step(*tiny_batch()))


def test_the_lock_is_copied_as_a_new_one():
    lock = Lock()
    with lock(), lock():
        for new in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):

            def enter(new=new):
                with new():
                    return True

            assert together(enter) == [True]

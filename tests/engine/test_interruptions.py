"""Ctrl-C at any line: the state is that of before or that of after, and everything goes on."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from dataclasses import dataclass
from typing import Any

import interruptions
import pytest
import torch
from cases import METHODS, buffered, differing, same, snapshot
from clips import image, tiny_clip, tiny_ids

import fasttta
from fasttta.engine.graph import GraphStep

FEW = 8  # lines of each action in the fast part
MANY = 80  # in the slow one; FASTTTA_EVERY_LINE=1: all (a step has 3,300; 20 minutes in all)
GUARDED = ("read", "abpem", "brimpr")


@dataclass
class Kind:
    """An adapted model, and what is done with it."""

    make: Any
    step: Any  # (adapted, seed) -> StepResult
    predict: Any  # adapted -> logits


def kinds(tiny_model, tiny_batch) -> dict[str, Kind]:
    def fusion(name, graph=False):
        def make():
            guard = fasttta.ShiftDetector(3, threshold=1.0) if name in GUARDED else None
            adapted = fasttta.adapt(tiny_model(), name, guard=guard, **METHODS[name])
            return buffered(adapted) if graph else adapted

        return Kind(
            make,
            lambda adapted, seed: adapted.step(*tiny_batch(seed=seed)),
            lambda adapted: adapted.predict(*tiny_batch(seed=99)),
        )

    def images(name, **options):
        return Kind(
            lambda: fasttta.adapt(tiny_clip(), name, classes=tiny_ids(), **options),
            lambda adapted, seed: adapted.step([image(seed), image(seed + 1)]),
            lambda adapted: adapted.predict(image(99)),
        )

    return {
        "read": fusion("read"),
        "abpem": fusion("abpem"),
        "abpem on buffers": fusion("abpem", graph=True),
        "eata": fusion("eata"),
        "sar": fusion("sar"),
        "brimpr": fusion("brimpr"),
        "tpt": images("tpt", views=4, select=0.5),
        "rada": images("rada", heads=3, views=4, select=0.5),
        "rada stream": images("rada", heads=3, loss="entropy"),
    }


def moved(tuned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x + 0.1 for name, x in tuned.items()}


def actions(kind: Kind, prepared, folder) -> dict[str, Any]:
    """What may be interrupted: name -> (adapted) -> nothing."""
    other = kind.make()
    kind.step(other, 50)
    state = other.state_dict()

    def rollback():
        adapted = copy.deepcopy(prepared)
        handle = adapted.checkpoint()
        kind.step(adapted, 60)
        return adapted, lambda: adapted.rollback(handle)

    def on_copy(action):
        def make():
            adapted = copy.deepcopy(prepared)
            return adapted, lambda: action(adapted)

        return make

    def source(adapted):
        with adapted.source():
            kind.predict(adapted)

    return {
        "step": on_copy(lambda adapted: kind.step(adapted, 7)),
        "reset": on_copy(lambda adapted: adapted.reset()),
        "load_tuned": on_copy(lambda adapted: adapted.load_tuned(moved(other.tuned))),
        "load_state_dict": on_copy(lambda adapted: adapted.load_state_dict(state)),
        "rollback": rollback,
        "save": on_copy(lambda adapted: adapted.save(folder)),
        "source": on_copy(source),
    }


def prepared(kind: Kind):
    adapted = kind.make()
    for seed in (1, 2, 3, 4):
        kind.step(adapted, seed)
    return adapted


def check(kind: Kind, make, lines, files=("",)) -> int:
    """Interrupts an action at each of the lines; how often it was interrupted."""
    adapted, act = make()
    before = snapshot(adapted)
    twins = [copy.deepcopy(adapted)]
    with contextlib.suppress(KeyboardInterrupt):
        interruptions.run(act)
    after = snapshot(adapted)
    twins.append(adapted)
    expected = [
        (twin_state, kind.predict(twin).clone(), kind.step(copy.deepcopy(twin), 8))
        for twin_state, twin in zip((before, after), twins, strict=True)
    ]
    interrupted = 0
    for line in lines:
        adapted, act = make()
        try:
            interruptions.run(act, {line}, files)
        except KeyboardInterrupt:
            interrupted += 1
        state = snapshot(adapted)
        matches = [x for x in expected if differing(x[0], state) == []]
        assert matches, f"line {line}: neither before nor after: {differing(before, state)}"
        assert torch.equal(elsewhere(lambda a=adapted: kind.predict(a)), matches[0][1]), line
        assert same(kind.step(adapted, 8), matches[0][2]), line
    return interrupted


def elsewhere(call):
    """What another thread gets: the lock must be free."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(20)
    assert results, "another thread waits for ever"
    return results[0]


NAMES = ("read", "abpem", "abpem on buffers", "eata", "sar", "brimpr", "tpt", "rada", "rada stream")
ACTIONS = ("step", "reset", "load_tuned", "load_state_dict", "rollback", "save", "source")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ["abpem", "tpt"])
def test_some_lines(tiny_model, tiny_batch, tmp_path, name, action):
    kind = kinds(tiny_model, tiny_batch)[name]
    make = actions(kind, prepared(kind), tmp_path)[action]
    _, act = make()
    count = interruptions.run(act)
    assert check(kind, make, interruptions.sample(count, FEW)) > FEW // 2


@pytest.mark.parametrize(
    ("action", "files"),
    [
        ("reset", ("state.py",)),
        ("source", ("adapted/base.py", "adapted/fusion.py", "interrupts.py")),
    ],
)
def test_every_line_that_puts_the_state(tiny_model, tiny_batch, tmp_path, action, files):
    kind = kinds(tiny_model, tiny_batch)["read"]
    make = actions(kind, prepared(kind), tmp_path)[action]
    _, act = make()
    count = interruptions.run(act, files=files)
    assert count > 30
    assert check(kind, make, range(1, count + 1), files) > count // 2


def test_a_step_on_buffers_that_ends_before_it_is_published(tiny_model, tiny_batch, monkeypatch):
    """The buffers are ahead of the state: the next step must not go on from them."""
    kind = kinds(tiny_model, tiny_batch)["abpem on buffers"]
    adapted = prepared(kind)
    twin = copy.deepcopy(adapted)
    with monkeypatch.context() as patch:
        patch.setattr(GraphStep, "_publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            kind.step(adapted, 7)
    assert differing(twin, adapted) == []
    for seed in (8, 9, 10):
        assert same(kind.step(adapted, seed), kind.step(twin, seed))


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_lines(tiny_model, tiny_batch, tmp_path, name, action):
    kind = kinds(tiny_model, tiny_batch)[name]
    make = actions(kind, prepared(kind), tmp_path)[action]
    _, act = make()
    count = interruptions.run(act)
    most = None if os.environ.get("FASTTTA_EVERY_LINE") else MANY
    lines = list(interruptions.sample(count, most, seed=1))
    assert check(kind, make, lines) > len(lines) // 2

"""Captures of episodes on images: what is captured and replayed, and what is done on failure.

Streams and graphs are fakes; tests/engine/test_cuda_images.py captures on a GPU.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from cases import same
from clips import METHODS, adapt, image, tiny_clip, tiny_ids
from fake_streams import FakeStreams

import fasttta
from fasttta.adapted import entry
from fasttta.engine.capture import CaptureError
from fasttta.engine.episode_graph import GraphEpisodes

EPISODES = [name for name in METHODS if name != "source"]


@pytest.fixture
def gpu(monkeypatch):
    return FakeStreams(monkeypatch)


@pytest.fixture(scope="module")
def model():
    """Nothing may change it."""
    return tiny_clip()


def captured(model, method, falls_back=False, **options):
    adapted = adapt(model, method, **options)
    parts = adapted._episodic, adapted._clip, adapted._prompts
    adapted._captured = GraphEpisodes(*parts, falls_back=falls_back)
    return adapted


def counts(gpu):
    """Captures and replays since the last call."""
    log = list(gpu.log)
    gpu.log.clear()
    return log.count("begin on s1"), log.count("replay")


@pytest.mark.parametrize("method", EPISODES)
def test_one_replay_for_a_group(gpu, model, method):
    """The text features and the episodes are a graph each; then only the latter is replayed."""
    adapted = captured(model, method)
    first = adapted.step([image(0), image(1)])
    assert counts(gpu) == (2, 2)
    assert same(first, adapt(model, method).step([image(0), image(1)]))
    adapted.step([image(0), image(1)])
    assert counts(gpu) == (0, 1)
    adapted.step(image(0))
    assert counts(gpu) == (0, 1)
    adapted.step([image(0)] * 3)
    assert counts(gpu) == (1, 1)
    assert gpu.made["s"] == gpu.made["pool"] == 1


def test_another_start_replays_the_text_features(gpu, model):
    adapted = captured(model, "tpt")
    adapted.step(image(0))
    counts(gpu)
    adapted.load_tuned({"prompt": adapted.tuned["prompt"] + 0.1})
    adapted.step(image(0))
    assert counts(gpu) == (0, 2)
    assert torch.equal(adapted._captured._prompt[0], adapted.tuned["prompt"])
    with adapted.source():
        adapted.step(image(0))
    assert counts(gpu) == (0, 0)
    adapted.step(image(0))
    assert counts(gpu) == (0, 2)
    adapted.step(image(0), trace=True)
    assert counts(gpu) == (0, 0)


class Failing:
    """The body of episodes; raises in run ``fails``: 0 to 2 warm up, 3 is captured."""

    def __init__(self, episodes, fails, error):
        self.body, self.fails, self.error, self.runs = episodes._body, fails, error, 0
        episodes._body = self

    def __call__(self, plan, seed):
        result = self.body(plan, seed)
        self.runs += 1
        if self.runs - 1 == self.fails:
            raise self.error
        return result


def test_a_failed_capture_keeps_nothing(gpu, model):
    adapted = captured(model, "a-tpt")
    body = Failing(adapted._captured, 3, RuntimeError("it waits for the device"))
    with pytest.raises(CaptureError, match='use engine="eager": it waits for the device'):
        adapted.step(image(0))
    assert [plans for plans in adapted._captured.plans.values() if plans] == []
    body.fails = -1
    assert same(adapted.step(image(0)), adapt(model, "a-tpt").step(image(0)))


@pytest.mark.parametrize("method", EPISODES)
def test_auto_falls_back_to_eager_episodes(gpu, model, method):
    """After one warning, which names the reason; the numbers are those of eager episodes."""
    adapted, eager = captured(model, method, falls_back=True), adapt(model, method)
    Failing(adapted._captured, 3, RuntimeError("it waits for the device"))
    with pytest.warns(RuntimeWarning, match="failed: it waits for the device"):
        assert same(adapted.step(image(0)), eager.step(image(0)))
    with warnings.catch_warnings(action="error"):
        assert same(adapted.step(image(1)), eager.step(image(1)))
        assert same(copy.deepcopy(adapted).step(image(1)), eager.step(image(1)))
    assert adapted._captured.plans == {}


@pytest.mark.parametrize("error", [RuntimeError("sizes"), torch.OutOfMemoryError("no memory")])
def test_auto_hides_no_other_error(gpu, model, error):
    adapted = captured(model, "tpt", falls_back=True)
    Failing(adapted._captured, 0, error)
    with pytest.raises(type(error)) as caught:
        adapted.step(image(0))
    assert caught.value is error


@pytest.mark.parametrize("method", [*EPISODES, "rada"])
def test_what_auto_covers(model, monkeypatch, method):
    """All of fasttta's methods, as tests/engine/test_cuda_images.py, and no class of a user."""
    seen = []
    monkeypatch.setattr(entry, "_engine", lambda *args: (seen.append(args), "eager")[1])
    options = METHODS.get(method, {"heads": 3})
    cls = fasttta.methods.by_name(method)

    @dataclass(frozen=True)
    class Mine(cls):
        pass

    for chosen in (cls(**options), Mine(**options)):
        fasttta.adapt(model, chosen, classes=tiny_ids())
    assert [covered for _, _, covered in seen] == [True, False]

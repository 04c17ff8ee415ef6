"""Samples side by side: the same results, errors and settings as one after the other."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch
from cases import METHODS

import fasttta
from fasttta.models import workers


def _in_a_new_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch):
    monkeypatch.setattr(workers, "_LEAST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    assert _in_a_new_thread(torch.get_num_threads) == 2
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch):
    """How many tasks each call of workers.run had."""
    found, run = [], workers.run

    def counting(tasks):
        found.append(len(tasks))
        return run(tasks)

    monkeypatch.setattr(workers, "run", counting)
    return found


def test_results_are_in_order_and_calls_have_one_thread():
    meet = threading.Barrier(2, timeout=60)  # passed only by two tasks at a time

    def task(i):
        if i < 2:
            meet.wait()
        return i, torch.get_num_threads()

    found = workers.run([lambda i=i: task(i) for i in range(7)])
    assert found == [(i, 1) for i in range(7)]
    assert workers.run([]) == []


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradients_are_recorded_as_in_the_caller(context):
    x = torch.ones(3, requires_grad=True)
    with context():
        right = (x * 2).requires_grad, (x * 2).is_inference()
        found = workers.run([lambda: x * 2] * 4)
    assert all((y.requires_grad, y.is_inference()) == right for y in found)


def test_an_error_is_raised_and_nothing_more_begins():
    begun = []

    def task(i):
        begun.append(i)
        if i == 1:
            raise KeyError("one")
        time.sleep(0.01)  # long enough for the other thread to see it

    with pytest.raises(KeyError, match="one"):
        workers.run([lambda i=i: task(i) for i in range(50)])
    assert len(begun) < 50
    begun.clear()
    assert workers.run([lambda: 5] * 3) == [5] * 3


def test_threads_that_begin_meanwhile_have_their_number():
    """A thread takes up the process's number of threads once, for good."""
    inside, seen = threading.Event(), threading.Event()

    def task():
        inside.set()
        assert seen.wait(60)

    caller = threading.Thread(target=workers.run, args=([task, task],))
    caller.start()
    assert inside.wait(60)
    try:
        deadline = time.monotonic() + 60  # each worker sets it for a moment
        while _in_a_new_thread(torch.get_num_threads) != 2:
            assert time.monotonic() < deadline
    finally:
        seen.set()
        caller.join()


def test_without_another_thread_the_caller_does_it_all(monkeypatch):
    start = threading.Thread.start

    def refused(thread):
        if thread._target is not torch.set_num_threads:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        assert workers.run([lambda i=i: i for i in range(5)]) == [0, 1, 2, 3, 4]


def test_within_each_other_and_from_several_threads():
    def nested():
        return workers.run([lambda i=i: (i, torch.get_num_threads()) for i in range(3)])

    assert workers.run([nested] * 3) == [[(i, 1) for i in range(3)]] * 3
    found = []
    callers = [threading.Thread(target=lambda: found.append(workers.run([nested] * 4)))
               for _ in range(4)]  # fmt: skip
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [[[(i, 1) for i in range(3)]] * 4] * 4


def test_what_belongs_to_the_calling_thread_stays_there(tiny_model, monkeypatch):
    model, tokens = tiny_model(), torch.zeros(4, 10, 12)
    suit = lambda x=tokens: workers.suit(x, (model,))  # noqa: E731
    assert suit()
    assert not suit(tokens[:1])
    assert not suit(tokens[:3])  # two rounds, one of them half empty
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_cores", lambda: 1)
        assert not suit()
    traced = []
    with warnings.catch_warnings(action="ignore"):  # on tracing as such
        torch.jit.trace(lambda x: traced.append(suit()) or x + 1, tokens, check_trace=False)
    assert traced == [False]
    assert not suit(tokens.to("meta"))
    assert not suit(torch.nn.Parameter(tokens))
    with torch.autocast("cpu"):
        assert not suit()
    with torch.profiler.profile():
        assert not suit()
    with torch.device("cpu"):
        assert not suit()
    hook = model.blocks_a[0].mlp.fc1.register_forward_hook(lambda *_: None)
    assert not suit()
    hook.remove()
    torch.set_num_threads(1)
    assert not suit()
    torch.set_num_threads(2)
    assert suit()


def _without(monkeypatch):
    monkeypatch.setattr(workers, "suit", lambda *_: False)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_encoding_and_fusing(tiny_model, tiny_batch, runs, monkeypatch, context):
    model, (audio, video) = tiny_model(), tiny_batch()
    kept = audio.clone(), video.clone()
    calls = [
        lambda: model.encode(audio, video),
        lambda: model(audio, video),
        lambda: model(audio, None, "audioonly"),
        lambda: model(None, video, "missingvideoonly"),
    ]
    with context():
        found = [call() for call in calls]
        assert runs == [10, 10, 5, 5, 5]  # samples of both; and the fusion's; of one
        _without(monkeypatch)
        for x, call in zip(found, calls, strict=True):
            assert torch.allclose(x, call(), atol=1e-6)
    assert torch.equal(audio, kept[0])
    assert torch.equal(video, kept[1])


def test_gradients_reach_the_encoders(tiny_model, tiny_batch, runs):
    """With gradients the encoders are one graph, and nothing changes in place."""
    model = tiny_model()
    model(*tiny_batch()).sum().backward()
    assert not runs
    assert all(x.grad is not None for x in model.blocks_a.parameters() if x.ndim > 1)


@pytest.mark.parametrize("method", ["source", "read", "abpem"])
def test_steps(tiny_model, tiny_batch, method, runs, monkeypatch):
    results = []
    for apart in (True, False):
        if not apart:
            runs.clear()
            _without(monkeypatch)
        adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
        results.append([adapted.step(*tiny_batch(seed=s)) for s in range(3)])
        assert bool(runs) == apart
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.logits, b.logits, atol=1e-5)
        assert torch.allclose(a.logits_before, b.logits_before, atol=1e-5)

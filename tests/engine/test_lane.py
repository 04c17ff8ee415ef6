"""Copies and encoding beside the steps of a GPU: which stream waits for which, on fake streams."""

from __future__ import annotations

import pytest
import torch
from fake_streams import FakeStreams, FakeTensor

from fasttta.engine import streaming
from fasttta.engine.streaming import Lane, Pipeline

GPU = torch.device("cuda:0")


@pytest.fixture
def gpu(monkeypatch):
    streaming._streams.cache_clear()
    yield FakeStreams(monkeypatch)
    streaming._streams.cache_clear()


def test_a_copy_waits_for_nothing(gpu):
    """s1 is the stream of the work ahead, s2 that of copies."""
    lane, x = Lane(GPU), FakeTensor.make(gpu, "x")
    made, done = lane.run(lambda: lane.bring(x))
    assert made.device == GPU
    lane.receive(done, made)
    assert gpu.log == [
        "s1 waits for main",
        "copy x on s2", "record e1 on s2", "s1 waits for e1", "x is used on s1",
        "record e2 on s1", "main waits for e2", "x is used on main",
    ]  # fmt: skip


def test_pinned_memory_of_the_caller(gpu):
    """The loader may refill it as soon as it is asked for the next batch."""
    lane = Lane(GPU)
    lane.bring(FakeTensor.make(gpu, "x", pinned=True))
    assert gpu.log[-1] == "the host waits for e1"
    gpu.log.clear()
    lane.bring(FakeTensor.make(gpu, "x"))
    assert not any(entry.startswith("the host") for entry in gpu.log)


def test_what_lies_on_the_device_is_not_copied(gpu):
    lane, x = Lane(GPU), FakeTensor.make(gpu, "x", GPU)
    assert lane.bring(x) is x
    assert gpu.log == ["x is used on s1"]
    gpu.log.clear()
    other = FakeTensor.make(gpu, "x", "cuda:1")
    assert lane.bring(other) is other  # the check of the batch refuses it
    assert gpu.log == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_copy_does_not_wait_for_the_step_before(gpu, size):
    lane = Lane(GPU)

    def step(batch, features):
        gpu.log.append(f"step {batch.named} on {gpu.current}")
        return batch.named

    def encode(group):
        gpu.log.append(f"encode on {gpu.current}")
        return [None] * len(group)

    batches = [FakeTensor.make(gpu, name) for name in "abcd"]
    pipeline = Pipeline(step, bring=lane.bring, encode=encode, samples=lambda batch: 1, size=size,
                        lane=lane)  # fmt: skip
    assert list(pipeline.results(iter(batches))) == list("abcd")
    assert [entry for entry in gpu.log if entry.startswith("s2 waits")] == []
    assert [entry for entry in gpu.log if entry.startswith("copy")] == [
        f"copy {name} on s2" for name in "abcd"
    ]
    # each step begins after the main stream was told to wait for what it uses
    for name in "abcd":
        at = gpu.log.index(f"step {name} on main")
        assert f"{name} is used on main" in gpu.log[:at]
        assert any(entry.startswith("main waits for e") for entry in gpu.log[:at])
    # and each encoding after the copies
    first = gpu.log.index("encode on s1")
    assert [entry for entry in gpu.log[:first] if entry.startswith("s1 waits for e")] == [
        f"s1 waits for e{i + 1}" for i in range(size)
    ]

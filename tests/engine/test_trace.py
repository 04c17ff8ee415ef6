"""NVTX ranges: all of a step's, and no cost without a profiler."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch

import fasttta
from fasttta import trace


@pytest.fixture
def ranges(monkeypatch):
    """Names of the ranges opened, in order."""
    opened = []

    @contextlib.contextmanager
    def record(name):
        opened.append(name)
        yield

    monkeypatch.setattr(trace, "span", record)
    return opened


def test_a_step_names_its_parts(tiny_model, tiny_batch, ranges):
    adapted = fasttta.adapt(tiny_model(), "abpem", k=3)
    adapted(*tiny_batch())
    assert ranges == [
        "encode", "objective", "fuse", "attention_bootstrap", "adaptation_head", "backward",
        "attention_bootstrap_backward", "update", "predict", "fuse",
    ]  # fmt: skip
    ranges.clear()
    adapted.predict(*tiny_batch())
    assert ranges == ["predict", "encode", "fuse"]


@pytest.fixture
def undecided(monkeypatch):
    """Nothing has asked for a range yet."""
    monkeypatch.setattr(trace, "span", trace._first)


def test_nothing_without_a_profiler(monkeypatch, undecided):
    """From the second call on, ranges are the standard library's empty context."""
    monkeypatch.setattr(trace, "opener", lambda: None)
    assert isinstance(trace.span("x"), contextlib.nullcontext)
    assert trace.span is contextlib.nullcontext


def test_the_first_call_decides(monkeypatch, undecided):
    """Also for those who have imported the function by name."""
    opened, asked = [], []

    def opener():
        asked.append(1)
        return lambda name: opened.append(name) or contextlib.nullcontext()

    monkeypatch.setattr(trace, "opener", opener)
    early = trace.span
    for open_range, name in ((early, "a"), (early, "b"), (trace.span, "c")):
        with open_range(name):
            pass
    assert opened == ["a", "b", "c"]
    assert len(asked) == 1


@pytest.mark.parametrize("attached", [False, True])
def test_the_nvtx_package_decides(monkeypatch, attached, undecided):
    nvtx = pytest.importorskip("nvtx")
    opened = []

    class DummyDomain:
        pass

    domain = object() if attached else DummyDomain()
    monkeypatch.setattr(nvtx, "get_domain", lambda name: domain)
    monkeypatch.setattr(
        nvtx, "annotate", lambda name, domain: opened.append(name) or contextlib.nullcontext()
    )
    with trace.span("encode"):
        pass
    assert opened == (["encode"] if attached else [])


def test_without_the_nvtx_package(monkeypatch):
    """torch's own binding where there is CUDA, nothing elsewhere."""
    monkeypatch.setitem(sys.modules, "nvtx", None)  # importing it fails
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert trace.opener() is (torch.cuda.nvtx.range if cuda else None)

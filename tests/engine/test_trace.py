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

    monkeypatch.setattr(trace, "_open", lambda: record)
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


def test_nothing_without_a_profiler(monkeypatch):
    monkeypatch.setattr(trace, "_open", lambda: None)
    assert isinstance(trace.span("x"), contextlib.nullcontext)


@pytest.mark.parametrize("attached", [False, True])
def test_the_nvtx_package_decides(monkeypatch, attached):
    nvtx = pytest.importorskip("nvtx")
    opened = []

    class DummyDomain:
        pass

    domain = object() if attached else DummyDomain()
    monkeypatch.setattr(nvtx, "get_domain", lambda name: domain)
    monkeypatch.setattr(
        nvtx, "annotate", lambda name, domain: opened.append(name) or contextlib.nullcontext()
    )
    trace._open.cache_clear()
    with trace.span("encode"):
        pass
    trace._open.cache_clear()
    assert opened == (["encode"] if attached else [])


def test_without_the_nvtx_package(monkeypatch):
    """torch's own binding where there is CUDA, nothing elsewhere."""
    monkeypatch.setitem(sys.modules, "nvtx", None)  # importing it fails
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        trace._open.cache_clear()
        assert trace._open() is (torch.cuda.nvtx.range if cuda else None)
    trace._open.cache_clear()

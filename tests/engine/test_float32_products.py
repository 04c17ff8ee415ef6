"""The switches of float32 products: inside a step both sets can be read and agree; after it they
are as the user had set them. They exist on every build, so no GPU is needed."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import threading

import pytest
import torch
from cases import same
from fusions import Joint, build

import fasttta
from fasttta.engine import float32_products as products
from fasttta.engine.float32_products import float32_products, put
from fasttta.engine.precision import resolve
from fasttta.engine.step import environment

B = torch.backends
NEW = {
    "cuda.matmul": B.cuda.matmul, "cudnn.conv": B.cudnn.conv, "cudnn.rnn": B.cudnn.rnn,
    "mkldnn.matmul": B.mkldnn.matmul, "mkldnn.conv": B.mkldnn.conv, "mkldnn.rnn": B.mkldnn.rnn,
    "cudnn": B.cudnn, "mkldnn": B.mkldnn, "all": B,
}  # fmt: skip


def _shown():
    """What a user reads, "error" where the two sets disagree."""
    values = {name: switch.fp32_precision for name, switch in NEW.items()}
    for name, read in LEGACY.items():
        try:
            values[name] = read()
        except RuntimeError:
            values[name] = "error"
    return values


LEGACY = {
    "get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "cudnn.allow_tf32": lambda: B.cudnn.allow_tf32,
    "cuda.matmul.allow_tf32": lambda: B.cuda.matmul.allow_tf32,
}


def _inherited():
    """What a user reads after each change of a parent, which shows where "none" is set."""
    shown = [_shown()]
    for backend, value in itertools.product(("generic", "cuda"), ("ieee", "tf32")):
        torch._C._set_fp32_precision_setter(backend, "all", value)
        shown.append(_shown())
    return shown


@pytest.fixture(autouse=True)
def as_before():
    kept = []
    products.take(kept)
    put(kept[0])
    yield
    assert not products._running
    assert not products._outside
    put(kept[0])


def _set(name, value):
    NEW[name].fp32_precision = value


OUTSIDE = {
    "defaults": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cublas": lambda: setattr(B.cuda.matmul, "allow_tf32", True),
    "cudnn off": lambda: setattr(B.cudnn, "allow_tf32", False),
    "new all": lambda: _set("all", "tf32"),
    "new cudnn": lambda: _set("cudnn", "tf32"),
    "new matmul, mixed": lambda: _set("cuda.matmul", "tf32"),
    "new conv, mixed": lambda: _set("cudnn.conv", "ieee"),
    "new rnn, mixed": lambda: _set("cudnn.rnn", "ieee"),
    "cudnn off, then conv": lambda: (setattr(B.cudnn, "allow_tf32", False),
                                     _set("cudnn.conv", "tf32"), _set("cudnn.rnn", "tf32")),
    "none": lambda: [_set(name, "none") for name in list(NEW)[:6]],
    "oneDNN in bf16": lambda: _set("mkldnn.matmul", "bf16"),
}  # fmt: skip


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("mode", ["ieee", "tf32"])
def test_readable_inside_and_put_back(outside, mode):
    start = _taken()
    put(start)
    OUTSIDE[outside]()
    before = _inherited()
    put(start)
    OUTSIDE[outside]()
    with contextlib.suppress(KeyError), float32_products(mode):
        inside = _shown()
        # a module that changes them for itself, or for good
        with B.cudnn.flags(enabled=True, allow_tf32=True):
            assert B.cudnn.allow_tf32 is True
        assert _shown()["cudnn.allow_tf32"] == (mode == "tf32")
        torch.set_float32_matmul_precision("medium")
        raise KeyError
    tf32 = mode == "tf32"
    assert [inside[n] for n in ("cuda.matmul", "cudnn.conv", "cudnn.rnn")] == [mode] * 3
    assert [inside[f"mkldnn.{n}"] for n in ("matmul", "conv", "rnn")] == ["ieee"] * 3
    assert inside["get_float32_matmul_precision"] == ("high" if tf32 else "highest")
    assert inside["cudnn.allow_tf32"] is inside["cuda.matmul.allow_tf32"] is tf32
    assert _inherited() == before


_AS_A_PROCESS_BEGINS = """
import torch
from torch.backends import cudnn, mkldnn
from fasttta.engine.float32_products import float32_products
{}
def shown():
    return [x.fp32_precision for x in (torch.backends, cudnn, cudnn.conv, cudnn.rnn, mkldnn.conv)]
before = shown()
with float32_products("ieee"):
    assert cudnn.allow_tf32 is False
assert shown() == before, (before, shown())
"""


@pytest.mark.parametrize(
    "outside",
    ["pass", 'torch.backends.fp32_precision = "ieee"', 'cudnn.fp32_precision = "ieee"',
     'torch.backends.fp32_precision = "bf16"',
     'torch.backends.fp32_precision = "ieee"; cudnn.conv.fp32_precision = "tf32"'],
)  # fmt: skip
def test_a_default_gives_way_to_its_parent_afterwards(outside):
    """Only a process that has set nothing has PyTorch's defaults."""
    subprocess.run([sys.executable, "-c", _AS_A_PROCESS_BEGINS.format(outside)], check=True)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_step_on_a_cpu_sets_what_is_not_as_pytorch_starts(outside, monkeypatch):
    native, calls = products._set, []
    OUTSIDE[outside]()
    before = _shown()
    monkeypatch.setattr(products, "_set", lambda *x: calls.append(x) or native(*x))
    device = torch.device("cpu")
    with environment(device, resolve("fp32", device, torch.float32), grad=False):
        inside = _shown()
    assert {inside[f"mkldnn.{n}"] for n in ("matmul", "conv", "rnn")} <= {"ieee", "none"}
    # the two that only the legacy switches tell from a new process
    untouched = outside in ("defaults", "cudnn off, then conv")
    assert (not calls) is untouched
    assert _shown() == before


def _taken():
    values = []
    products.take(values)
    return values[0]


def test_blocks_of_threads_end_in_any_order():
    """The first to begin is not the last to end; TF32 only while nobody asks for float32."""
    torch.set_float32_matmul_precision("high")
    before = _shown()
    begun, go_on = threading.Event(), threading.Event()

    def other():
        with float32_products("ieee"):
            begun.set()
            go_on.wait(10)

    thread = threading.Thread(target=other)
    with float32_products("tf32"):
        assert B.cuda.matmul.fp32_precision == "tf32"
        thread.start()
        begun.wait(10)
        assert B.cuda.matmul.fp32_precision == "ieee"
    assert B.cuda.matmul.fp32_precision == "ieee"
    go_on.set()
    thread.join()
    assert _shown() == before


def test_frozen_flags():
    """``disable_global_flags`` of PyTorch's tests forbids assignments, not steps."""
    B.disable_global_flags()
    try:
        with float32_products("ieee"):
            pass
    finally:
        # the name is not mangled: there is no class around it
        vars(B.m)["__allow_nonbracketed_mutation_flag"] = True


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_an_interrupt_at_any_switch_leaves_the_users(monkeypatch, done):
    """Ctrl-C comes before or after one of the calls that set a switch."""
    torch.set_float32_matmul_precision("medium")
    before, native, calls = _shown(), products._set, 0

    def counted(*args):
        nonlocal calls
        calls += 1
        if done:
            native(*args)
        if calls == interrupt:
            raise KeyboardInterrupt
        native(*args)

    monkeypatch.setattr(products, "_set", counted)
    interrupt = 0
    with float32_products("ieee"):
        pass
    assert calls == 7 + 9 + 9
    for interrupt in range(1, calls + 1):
        calls = 0
        with pytest.raises(KeyboardInterrupt), float32_products("ieee"):
            pass
        assert _shown() == before, interrupt
        assert not products._running


READS = {
    "cudnn.flags": lambda: B.cudnn.flags(enabled=True, benchmark=False),
    "backends.flags": lambda: B.flags(fp32_precision="ieee"),
    "mkldnn.flags": lambda: B.mkldnn.flags(enabled=True),
    **{name: lambda read=read: contextlib.nullcontext(read()) for name, read in LEGACY.items()},
}


class Reading(Joint):
    """A user's model that reads a switch in its forward."""

    spec = Joint.spec

    def forward(self, audio, video):
        with READS[self.reads]():
            return super().forward(audio, video)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("outside", ["high", "new rnn, mixed"])
def test_a_users_model_that_reads_them(reads, outside):
    plain, reading = build("joint"), build("joint")
    reading.__class__, reading.reads = Reading, reads
    options = {"spec": Joint.spec, "lr": 1e-3}
    OUTSIDE[outside]()
    before = _shown()
    a, b = (fasttta.adapt(model, "abpem", **options) for model in (plain, reading))
    expected = [a.step(*Joint.batch(4, seed)) for seed in range(2)]
    put(_taken())
    for x, seed in zip(expected, range(2), strict=True):
        assert same(b.step(*Joint.batch(4, seed)), x)
    assert _shown() == before

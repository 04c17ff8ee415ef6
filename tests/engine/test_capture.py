"""Warm-up and capture of a step: the order of waits, and whom an error is blamed on.

Streams and graphs are fakes that write down what is asked of them; tests/engine/test_cuda.py
captures on a GPU.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from cases import METHODS, differing, same, snapshot
from fake_streams import FakeStreams
from fusions import Joint, build

import fasttta
from fasttta.adapted import entry
from fasttta.engine.capture import Capture, CaptureError
from fasttta.engine.graph import GraphStep
from fasttta.ops import first_use


@pytest.fixture
def gpu(monkeypatch):
    return FakeStreams(monkeypatch)


class Body:
    """What is captured; raises ``error`` in run ``fails``: 0 to 2 warm up, 3 is captured."""

    def __init__(self, gpu, fails=None, error=None):
        self.gpu, self.fails, self.error = gpu, fails, error
        self.runs, self.collecting = [], []

    def __call__(self):
        self.runs.append(self.gpu.current)
        self.collecting.append(gc.isenabled())
        self.gpu.log.append("captured run" if self.gpu.capturing else "run")
        if len(self.runs) - 1 == self.fails:
            raise self.error
        return len(self.runs)


def test_in_order(gpu):
    capture = Capture(torch.device("cpu"))
    body = Body(gpu)
    graph, result = capture.record(body)
    assert result == 4
    assert body.runs == ["s1"] * 4
    assert gpu.log == [
        "s1 waits for main", "run", "run", "run", "main waits for s1",
        "workspaces dropped", "begin on s1", "captured run", "end", "workspaces dropped",
    ]  # fmt: skip
    assert gpu.current == "main"
    graph.replay()


def test_it_is_said_and_recorded(gpu, caplog):
    with caplog.at_level("INFO", "fasttta"), first_use.recording() as made:
        Capture(torch.device("cpu")).record(Body(gpu), "a step on [3, 5]")
        with pytest.raises(CaptureError):
            Capture(torch.device("cpu")).record(Body(gpu, 3, RuntimeError("no")), "another")
    assert [(x.kind, x.name) for x in made] == [("graph", "a step on [3, 5]")]
    (message,) = caplog.messages
    assert message.startswith("captured a step on [3, 5] in 0.")


def test_one_stream_and_one_pool(gpu):
    """A second graph re-uses the first one's memory only on the same stream."""
    capture = Capture(torch.device("cpu"))
    graphs = [capture.record(Body(gpu))[0] for _ in range(3)]
    assert {graph.stream.name for graph in graphs} == {"s1"}
    assert {graph.pool for graph in graphs} == {"pool1"}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [None, 3])
def test_no_garbage_is_collected_in_a_capture(gpu, monkeypatch, enabled, fails):
    calls = []
    monkeypatch.setattr(gc, "collect", lambda: calls.append(gpu.log[-1]))
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        body = Body(gpu, fails, RuntimeError("no"))
        if fails is None:
            Capture(torch.device("cpu")).record(body)
        else:
            with pytest.raises(CaptureError):
                Capture(torch.device("cpu")).record(body)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert calls == ["main waits for s1"]
    assert body.collecting == [enabled] * 3 + [False]


@pytest.mark.parametrize("error", [
    RuntimeError("sizes do not match"), torch.OutOfMemoryError("no memory"), ValueError("odd"),
    KeyboardInterrupt(),
], ids=lambda error: type(error).__name__)  # fmt: skip
@pytest.mark.parametrize("run", [0, 2])
def test_an_error_without_capture_is_raised_as_it_is(gpu, error, run):
    with pytest.raises(type(error)) as caught:
        Capture(torch.device("cpu")).record(Body(gpu, run, error))
    assert caught.value is error
    assert caught.value.__cause__ is None
    # what the side stream was given is over before anybody goes on
    assert gpu.log[-1] == "main waits for s1"
    assert gpu.current == "main"
    assert not any(entry.startswith("begin") for entry in gpu.log)


@pytest.mark.parametrize("ends", [None, RuntimeError("failed due to a previous error")])
def test_an_error_of_the_capture_gives_the_advice(gpu, ends):
    error = RuntimeError("operation not permitted when stream is capturing")
    gpu.end_error = ends
    capture = Capture(torch.device("cpu"))
    with pytest.raises(CaptureError, match='captured, use engine="eager": operation') as caught:
        capture.record(Body(gpu, 3, error))
    assert caught.value.__cause__ is error
    assert gpu.current == "main"
    assert gpu.log[-2:] == ["workspaces dropped", "left pool1"]
    gpu.end_error = None
    assert capture.record(Body(gpu))[1] == 4


@pytest.mark.parametrize("ends", [None, RuntimeError("failed due to a previous error")])
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("no memory"), TypeError("bug"), KeyboardInterrupt(),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_other_errors_under_capture_are_raised_as_they_are(gpu, error, ends):
    """Also where the end of the capture raises an error of its own."""
    gpu.end_error = ends
    with pytest.raises(type(error)) as caught:
        Capture(torch.device("cpu")).record(Body(gpu, 3, error))
    assert caught.value is error
    assert gpu.current == "main"


@pytest.mark.parametrize("which", ["begin_error", "end_error"])
def test_a_capture_that_cannot_begin_or_end(gpu, which):
    setattr(gpu, which, RuntimeError("broken"))
    with pytest.raises(CaptureError, match="broken"):
        Capture(torch.device("cpu")).record(Body(gpu))
    assert gpu.current == "main"


def _captured(tiny_model, method, **options):
    adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
    step = adapted._step
    parts = step.model, step.method, step.state, step.precision, step.device, False
    adapted._step = GraphStep(*parts, **options)
    return adapted


@pytest.mark.parametrize("run", [1, 3])
def test_a_step_that_fails_changes_nothing(gpu, tiny_model, tiny_batch, method, run):
    """What warm-up and capture have written is put back after the waits, and the next step runs."""
    adapted, batch = _captured(tiny_model, method), tiny_batch()
    before, plain = snapshot(adapted), adapted._step._body
    body = Body(gpu, run, RuntimeError("in the way"))

    def failing(plan):
        result = plain(plan)
        body()
        return result

    adapted._step._body = failing
    with pytest.raises(RuntimeError, match="in the way") as caught:
        adapted.step(*batch)
    assert isinstance(caught.value, CaptureError) == (run == 3)
    assert differing(before, adapted) == []
    del adapted._step._body
    assert adapted._step.plans == {}
    # replays are fakes: what a step does is tested without capture, in test_graph.py
    adapted.step(*batch)
    (plan,) = adapted._step.plans.values()
    assert plan.graph is not None


def test_what_is_put_back_waits_for_the_side_stream(gpu, tiny_model, tiny_batch):
    adapted = _captured(tiny_model, "read")
    state, step = adapted._state, adapted._step
    journal = state.journal

    def logged():
        restore = journal()
        return lambda: (gpu.log.append("restore"), restore())[1]

    state.journal = logged
    body = Body(gpu, 1, RuntimeError("in the way"))
    step._body = lambda plan: body()
    with pytest.raises(RuntimeError):
        adapted.step(*tiny_batch())
    assert gpu.log == ["s1 waits for main", "run", "run", "main waits for s1", "restore"]


class TestAuto:
    """``engine="auto"``: captured where tests on a GPU capture the same, else eager."""

    GPU = torch.device("cuda")

    @pytest.mark.parametrize(
        ("asked", "device", "covered", "engine"),
        [
            ("auto", GPU, True, "graph"), ("auto", GPU, False, "eager"),
            ("auto", torch.device("cpu"), True, "eager"), ("eager", GPU, True, "eager"),
            ("graph", GPU, False, "graph"),
        ],
    )  # fmt: skip
    def test_engine(self, asked, device, covered, engine):
        assert entry._engine(asked, device, covered) == engine

    def test_what_is_covered(self, tiny_model, monkeypatch, method):
        """All of fasttta's fusion methods, as tests/engine/test_cuda.py, and no class of a user."""
        seen = []
        monkeypatch.setattr(entry, "_engine", lambda *args: (seen.append(args), "eager")[1])
        fasttta.adapt(tiny_model(), method, **METHODS[method])
        assert seen[-1][2] is True
        assert method in fasttta.methods.names("fusion")

        @dataclass(frozen=True)
        class Mine(fasttta.methods.by_name(method)):
            pass

        options = {n: x for n, x in METHODS[method].items() if n != "source_stats"}
        resources = {n: x for n, x in METHODS[method].items() if n == "source_stats"}
        fasttta.adapt(tiny_model(), Mine(**options), **resources)
        assert seen[-1][2] is False

    def test_other_models_and_float8_are_not_covered(self, tiny_model, monkeypatch):
        seen = []
        monkeypatch.setattr(entry, "_engine", lambda *args: (seen.append(args), "eager")[1])
        fasttta.adapt(build("joint"), "tent", spec=Joint.spec)
        with pytest.raises(ValueError, match="multiples of 16"):  # after the engine is chosen
            fasttta.adapt(tiny_model(), "read", precision="fp8")
        assert [covered for _, _, covered in seen] == [False, False]

    def test_a_pickled_model_takes_the_engine_of_its_new_place(self, tiny_model):
        adapted = fasttta.adapt(tiny_model(), "read")
        adapted.engine = "graph"  # as "auto" is on a GPU
        assert pickle.loads(pickle.dumps(adapted)).engine == "eager"


def test_auto_falls_back_to_eager_steps(gpu, tiny_model, tiny_batch, method):
    """After one warning, which names the reason; the numbers are those of eager steps."""
    adapted = _captured(tiny_model, method, falls_back=True)
    eager = fasttta.adapt(tiny_model(), method, **METHODS[method])
    plain, body = adapted._step._body, Body(gpu, 3, RuntimeError("it waits for the device"))

    def failing(plan):
        result = plain(plan)
        body()
        return result

    adapted._step._body = failing
    batches = [tiny_batch(seed=s) for s in range(4)]
    with pytest.warns(RuntimeWarning, match="failed: it waits for the device"):
        results = [adapted.step(*batches[0])]
    with warnings.catch_warnings(action="error"):
        results += [adapted.step(*batch) for batch in batches[1:]]
        twin = copy.deepcopy(adapted)
        assert same(twin.step(*batches[0]), adapted.step(*batches[0]))
    for x, batch in zip(results, batches, strict=True):
        y = eager.step(*batch)
        assert torch.allclose(x.logits, y.logits, atol=1e-5)
        assert int(x.n_used) == int(y.n_used)
    assert gpu.log.count("begin on s1") == 1
    assert adapted._step.plans == {}


@pytest.mark.parametrize("error", [RuntimeError("sizes"), torch.OutOfMemoryError("no memory")])
def test_auto_hides_no_other_error(gpu, tiny_model, tiny_batch, error):
    adapted = _captured(tiny_model, "read", falls_back=True)
    body = Body(gpu, 0, error)
    adapted._step._body = lambda plan: body()
    with pytest.raises(type(error)) as caught:
        adapted.step(*tiny_batch())
    assert caught.value is error


def test_other_constants_are_captured_anew(gpu, tiny_model, tiny_batch):
    """A graph reads them where they lay: those of a loaded state lie elsewhere."""
    adapted = _captured(tiny_model, "brimpr")
    state = adapted.state_dict()
    adapted.step(*tiny_batch())
    adapted.step(*tiny_batch())
    adapted.reset()
    adapted.step(*tiny_batch())
    assert gpu.log.count("begin on s1") == 1
    adapted.load_state_dict(state)
    adapted.step(*tiny_batch())
    assert gpu.log.count("begin on s1") == 2
    (plan,) = adapted._step.plans.values()
    assert plan.constants is adapted._state.constants

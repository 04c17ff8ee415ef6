"""Operations of a step beside its forward and backward: their number does not grow with the
number of tuned tensors. Counted as PyTorch dispatches them, without views and allocations; on a GPU
each is a launch, or a few where it takes a list of tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from cases import METHODS, buffered, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

import fasttta

FREE = {"empty", "empty_like", "detach", "alias", "_unsafe_view", "view", "reshape"}


class Launches(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def launches(call):
    with Launches() as mode:
        call()
    return mode.names.total()


@pytest.fixture
def deep(tiny_model):
    """More tuned norms than any part of a step may take launches."""
    return lambda: tiny_model(depth=(6, 6, 3))


@pytest.mark.parametrize("method", ["tent", "eata", "sar"])
def test_what_keeps_and_restores_the_state(deep, tiny_batch, method):
    adapted = fasttta.adapt(deep(), method, **METHODS[method])
    adapted.step(*tiny_batch())
    state, step = adapted._state, adapted._step
    tuned = len(state.leaves)
    assert tuned > 45
    state.begin()
    assert launches(lambda: state.commit({})) == 1
    restore = state.journal()
    assert launches(state.journal) == 1
    assert launches(restore) == 1
    state.begin()
    assert launches(state.sync) == 1
    never = torch.zeros((), dtype=torch.bool)
    # a concatenation, a choice and a copy for each type, of tensors with a start and of those
    # that start at 0
    state.recover(never)
    assert launches(lambda: state.recover(never)) == 6
    grads = tuple(torch.ones_like(leaf) for leaf in state.leaves.values())
    result = step._objective(step._features(tiny_batch()), torch.ones(()), state.method)
    finite = launches(lambda: step._finite(result, torch.ones(()), grads))
    assert finite < 20


@pytest.mark.parametrize("method", ["tent", "eata", "sar"])
def test_an_eager_step_is_no_longer_than_a_captured_one(deep, tiny_batch, method):
    """Copies for the case that a step fails take one launch, not one for each tensor."""
    batch, counts = tiny_batch(), {}
    for engine in ("eager", "buffers"):
        adapted = fasttta.adapt(deep(), method, **METHODS[method])
        if engine == "buffers":
            buffered(adapted)
        else:
            adapted._step.host_checks = False
        adapted.step(*batch)
        counts[engine] = launches(lambda adapted=adapted: adapted.step(*batch))
    assert abs(counts["eager"] - counts["buffers"]) < 40, counts


def test_a_second_pass_takes_few_launches_for_its_perturbation(deep, tiny_batch):
    """Two forward and backward passes, and little else."""
    counts = {}
    for method in ("tent", "sar"):
        adapted = fasttta.adapt(deep(), method, **METHODS[method])
        adapted.step(*tiny_batch())
        counts[method] = launches(lambda adapted=adapted: adapted.step(*tiny_batch()))
    assert counts["sar"] < 2 * counts["tent"] + 40, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovery_is_exact(tiny_model, tiny_batch, dtype):
    """All tensors go back bit for bit, from infinity and NaN too, and none without the flag."""
    adapted = fasttta.adapt(tiny_model().to(dtype), "sar", **METHODS["sar"])
    fresh = snapshot(adapted)
    adapted.step(*tiny_batch(dtype=dtype))
    state = adapted._state
    before = {name: x.clone() for name, x in state._written().items()}
    state.recover(torch.tensor(False))
    assert all(torch.equal(x, before[name]) for name, x in state._written().items())
    with torch.no_grad():
        for i, x in enumerate(state._written().values()):
            x.view(-1)[0] = (torch.inf, torch.nan, -torch.inf)[i % 3]
    state.recover(torch.tensor(True))
    for name, x in state._written().items():
        assert torch.equal(x, fresh[name]), name


def test_recovery_follows_another_start(tiny_model, tiny_batch):
    """``load_tuned`` and ``load`` set the tensors that episodes begin with. Captured steps read
    them at the addresses of before."""
    adapted = fasttta.adapt(tiny_model(), "sar", **METHODS["sar"])
    adapted.step(*tiny_batch())
    state = adapted._state
    places = [x.data_ptr() for x in state._recovery._begin.values()]
    start = {name: x + 1 for name, x in state.start.items()}
    for values in (start, state.first.start):
        state.publish(replace(state.current, start=values))
        assert [x.data_ptr() for x in state._recovery._begin.values()] == places
        state.recover(torch.tensor(True))
        for name, x in state.leaves.items():
            assert torch.equal(x, values[name])


def test_the_ring_is_written_once_and_settled_once(tiny_model, tiny_batch):
    """Two passes over the tokens of a batch to write them, four to keep or replace them."""
    adapted = buffered(fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"]))
    adapted.step(*tiny_batch())
    step = adapted._step
    (plan,) = step.plans.values()
    tokens = step.encode(plan.inputs)
    with Launches() as mode:
        step._write(plan.state, tokens, plan.present, torch.tensor(True))
        step._settle(plan.state, plan.present)
    assert mode.names["index_select"] == 1  # the tokens that are kept
    assert mode.names["index_copy_"] == 4  # tokens and counts, twice

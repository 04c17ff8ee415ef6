"""Steps on static buffers, as a CUDA graph replays them, against eager steps on the same stream.

Without a GPU the buffers are run without capture; tests/engine/test_cuda.py captures.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, buffered, close, differing, same, snapshot, state_equal

import fasttta


def make(model, method, **options):
    return fasttta.adapt(model.double(), method, **{**METHODS[method], **options})


SIZES = (5, 5, 5, 5, 3, 5, 1, 5, 5, 2)


def test_same_as_eager_with_partial_batches(tiny_model, tiny_batch, method):
    eager, graph = make(tiny_model(), method), buffered(make(tiny_model(), method))
    for seed, size in enumerate(SIZES):
        batch = tiny_batch(size, seed=seed, dtype=torch.float64)
        close(graph.step(*batch), eager.step(*batch))
    for name, x in eager.tuned.items():
        assert torch.allclose(x, graph.tuned[name], rtol=1e-9, atol=1e-11)
    assert len(graph._step.plans) == 1


def test_larger_and_other_batches_are_captured_anew(tiny_model, tiny_batch, method):
    eager, graph = make(tiny_model(), method), buffered(make(tiny_model(), method))
    for seed, size in enumerate((2, 3, 7, 2, 7)):
        batch = tiny_batch(size, seed=seed, dtype=torch.float64)
        close(graph.step(*batch), eager.step(*batch))


@pytest.mark.parametrize("options", [{"steps": 2}, {"score_at": "before"}, {"score_at": "after"}])
def test_options(tiny_model, tiny_batch, method, options):
    if method == "source" and "steps" in options:
        pytest.skip("has no steps")
    eager, graph = (
        make(tiny_model(), method, **options),
        buffered(make(tiny_model(), method, **options)),
    )
    for seed in range(4):
        batch = tiny_batch(seed=seed, dtype=torch.float64)
        close(graph.step(*batch), eager.step(*batch))


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"heads": "each"}, {"pair": "query"}, {"balance": "softmax-sum"}, {"steps": 2},
        {"score_at": "before"}, {"attention_weight": 0.0}, {"balance_weight": 0.0},
        {"entropy_weight": 0.0, "balance_weight": 0.0, "attention_weight": 0.0},
    ],
)  # fmt: skip
def test_windows(tiny_model, tiny_batch, window, options):
    """Full batches, then partial and smaller ones, then full ones again."""
    options = {"window": window, **options}
    eager = make(tiny_model(), "abpem", **options)
    graph = buffered(make(tiny_model(), "abpem", **options))
    sizes = (5, 5, 3, 2, 1, 5, 4)
    for seed, size in enumerate(sizes):
        batch = tiny_batch(size, seed=seed, dtype=torch.float64)
        a, b = graph.step(*batch), eager.step(*batch)
        close(a, b)
        assert len(a.stats["attention_gap"]) == sum(sizes[max(0, seed + 1 - window) : seed + 1])
    for name, x in eager.tuned.items():
        assert torch.allclose(x, graph.tuned[name], rtol=1e-9, atol=1e-11), name
    assert len(graph._step.plans) == 1


def test_state_is_that_of_eager_steps(tiny_model, tiny_batch, tmp_path, method):
    """Saved, loaded, reset, traced and switched between engines in the middle of a stream."""
    eager, graph = make(tiny_model(), method), buffered(make(tiny_model(), method))
    fresh = make(tiny_model(), method)
    batches = [tiny_batch(seed=s, dtype=torch.float64) for s in range(9)]
    for batch in batches[:4]:
        eager.step(*batch)
        graph.step(*batch)
    a, b = snapshot(eager), snapshot(graph)
    assert a.keys() == b.keys() - {"method.place"}
    for name, x in a.items():
        assert x.shape == b[name].shape, name
        assert torch.allclose(x.double(), b[name].double(), rtol=1e-9, atol=1e-11), name
    graph.save(tmp_path)
    again = buffered(fasttta.load(tiny_model().double(), tmp_path))
    assert state_equal(again, graph)
    close(again.step(*batches[4]), graph.step(*batches[4]))
    assert state_equal(again, graph)
    eager.step(*batches[4])
    close(graph.step(*batches[5], trace=True), eager.step(*batches[5]))
    close(graph.step(*batches[6]), eager.step(*batches[6]))
    twin = copy.deepcopy(graph)
    expected = eager.step(*batches[7])
    close(twin.step(*batches[7]), expected)
    close(graph.step(*batches[7]), expected)
    graph.reset()
    assert state_equal(graph, fresh)
    close(graph.step(*batches[8]), fresh.step(*batches[8]))


def test_results_do_not_change_later(tiny_model, tiny_batch):
    graph = buffered(make(tiny_model(), "abpem"))
    first = graph.step(*tiny_batch(seed=0, dtype=torch.float64))
    kept = copy.deepcopy(first)
    for seed in range(1, 5):
        graph.step(*tiny_batch(seed=seed, dtype=torch.float64))
    assert same(first, kept)


def test_a_state_is_apart_from_the_buffers(tiny_model, tiny_batch, method):
    """What was the state stays as it was while later steps write to the buffers."""
    graph, eager = buffered(make(tiny_model(), method)), make(tiny_model(), method)
    batches = [tiny_batch(seed=s, dtype=torch.float64) for s in range(7)]
    for batch in batches[:3]:
        graph.step(*batch)
        eager.step(*batch)
    kept, before = graph.checkpoint(), snapshot(graph)
    for batch in batches[3:6]:
        graph.step(*batch)
    graph.rollback(kept)
    assert differing(before, graph) == []
    close(graph.step(*batches[6]), eager.step(*batches[6]))


def test_bad_batches_take_a_place_and_no_part(tiny_model, tiny_batch, method):
    eager, graph = make(tiny_model(), method), buffered(make(tiny_model(), method))
    eager._step.host_checks = False
    for seed in range(7):
        batch = tiny_batch(seed=seed, dtype=torch.float64)
        if seed in (2, 4):
            batch[0][1, 2, 3] = torch.nan
        a, b = graph.step(*batch), eager.step(*batch)
        assert int(a.n_used) == int(b.n_used)
        assert torch.allclose(a.logits, b.logits, rtol=1e-9, equal_nan=True)
        for name, x in eager.tuned.items():
            assert torch.allclose(x, graph.tuned[name], rtol=1e-9, atol=1e-11)


def test_a_queue_of_larger_batches(tiny_model, tiny_batch, tmp_path):
    """Smaller batches after a load, a copy, a trace or under given features still fit the queue."""
    sizes = (5, 3, 5)
    batches = [tiny_batch(n, seed=s, dtype=torch.float64) for s, n in enumerate(sizes)]
    eager = make(tiny_model(), "abpem")
    expected = [eager.step(*b) for b in batches]
    graph = buffered(make(tiny_model(), "abpem"))
    graph.step(*batches[0])
    graph.save(tmp_path)
    loaded = buffered(fasttta.load(tiny_model().double(), tmp_path))
    copied = copy.deepcopy(graph)
    streamed = copy.deepcopy(graph)
    for b, e in zip(batches[1:], expected[1:], strict=True):
        close(loaded.step(*b), e)
        close(copied.step(*b), e)
        (result,) = streamed.stream([b], encode_batch=9)
        close(result, e)
    traced = buffered(make(tiny_model(), "abpem"))
    close(traced.step(*batches[0], trace=True), expected[0])
    for b, e in zip(batches[1:], expected[1:], strict=True):
        close(traced.step(*b), e)


def test_a_partial_batch_after_a_bad_one(tiny_model, tiny_batch, method):
    """Rows that only fill the buffer do not keep what an earlier batch left there."""
    eager, graph = make(tiny_model(), method), buffered(make(tiny_model(), method))
    eager._step.host_checks = False
    for seed, size in enumerate((5, 5, 3)):
        batch = tiny_batch(size, seed=seed, dtype=torch.float64)
        if seed == 1:
            batch[0][4, 1, 1] = torch.nan
        a, b = graph.step(*batch), eager.step(*batch)
        assert int(a.n_used) == int(b.n_used)
    close(a, b)


def test_features_given(tiny_model, tiny_batch):
    eager, graph = make(tiny_model(), "abpem"), buffered(make(tiny_model(), "abpem"))
    batches = [tiny_batch(n, seed=n, dtype=torch.float64) for n in (4, 4, 2, 4)]
    for a, b in zip(graph.stream(batches, encode_batch=8), batches, strict=True):
        close(a, eager.step(*b))


def test_named_fusion_model():
    from fusions import Three, build

    model = build("three", dtype=torch.float64)
    options = {"spec": Three.spec, "k": 2, "window": 2}
    eager = fasttta.adapt(model, "abpem", **options)
    graph = buffered(fasttta.adapt(model, "abpem", **options))
    for seed in range(4):
        batch = Three.batch(3 if seed < 3 else 2, seed, torch.float64)
        close(graph.step(*batch), eager.step(*batch))


def test_graph_needs_a_gpu(tiny_model):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match='needs a model on a GPU.*use engine="eager"'):
        fasttta.adapt(tiny_model(), "read", engine="graph")

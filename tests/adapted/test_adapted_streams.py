"""Adapted.stream: any loader, failures in the middle, results that a caller may overwrite."""

from __future__ import annotations

import pytest
import torch
from cases import METHODS, flat, same, state_equal

import fasttta
from fasttta.engine.streaming import one_ahead


def test_results_are_fresh_tensors(tiny_model, tiny_batch, method):
    adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
    kept = [adapted.step(*tiny_batch(seed=s), trace=True) for s in range(2)]
    copies = [[x.clone() for x in flat(r)] for r in kept]
    for s in range(2, 5):
        for x in flat(adapted.step(*tiny_batch(seed=s))):
            assert not x.requires_grad
            assert not x.is_inference()
            x.zero_()
    fresh = fasttta.adapt(tiny_model(), method, **METHODS[method])
    for s in range(5):
        fresh.step(*tiny_batch(seed=s))
    assert state_equal(adapted, fresh)  # writing into results changes nothing
    for result, values in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(flat(result), values, strict=True))


@pytest.mark.filterwarnings("ignore:.*single sample")
def test_stream(tiny_model, tiny_batch, method):
    batches = [tiny_batch(n, seed=i) for i, n in enumerate((5, 5, 3, 1, 4))]
    a, b = (fasttta.adapt(tiny_model(), method, **METHODS[method]) for _ in range(2))
    expected = [a.step(*batch) for batch in batches]
    assert all(same(x, y) for x, y in zip(expected, b.stream(batches), strict=True))
    for size in (1, 4, 6, 100):
        b.reset()
        results = list(b.stream(iter(batches), encode_batch=size))
        assert len(results) == len(batches)
        for x, y in zip(expected, results, strict=True):
            assert torch.allclose(x.logits, y.logits, atol=1e-5)
    with pytest.raises(ValueError, match="encode_batch=0"):
        b.stream(batches, encode_batch=0)


def test_one_ahead():
    made, used = [], []

    def making(n, fails=False):
        for i in range(n):
            made.append(i)
            yield i
        if fails:
            raise OSError("disk gone")

    for n in range(4):
        made.clear()
        assert list(one_ahead(making(n))) == list(range(n))
        used.clear()
        with pytest.raises(OSError, match="disk gone"):
            used.extend(one_ahead(making(n, fails=True)))
        assert used == list(range(n))
    made.clear()
    items = one_ahead(making(3))
    assert [(next(items), list(made)) for _ in range(3)] == [
        (0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2]),
    ]  # fmt: skip


def test_a_loader_may_refill_its_batches(tiny_model, tiny_batch):
    batches = [tiny_batch(5, seed=i) for i in range(4)]

    def refilling():
        memory = [x.clone() for x in batches[0]]
        for batch in batches:
            for x, y in zip(memory, batch, strict=True):
                x.copy_(y)
            yield tuple(memory)

    a, b = (fasttta.adapt(tiny_model(), "read", lr=1e-3) for _ in range(2))
    for size in (None, 8):
        results = a.stream(refilling(), encode_batch=size)
        expected = b.stream(batches, encode_batch=size)
        assert all(same(x, y) for x, y in zip(results, expected, strict=True))


def test_stream_adapts_batch_by_batch(tiny_model, tiny_batch):
    """A stream that ends early has adapted only on what it gave out."""
    batches = [tiny_batch(5, seed=i) for i in range(4)]
    a, b = (fasttta.adapt(tiny_model(), "read", lr=1e-3) for _ in range(2))
    results = a.stream(batches, encode_batch=10)
    next(results)
    results.close()
    b.step(*batches[0])
    for name, x in a.tuned.items():
        assert torch.allclose(x, b.tuned[name], atol=1e-6)
    with pytest.raises(TypeError, match="needed 2 inputs"):
        list(a.stream([(*batches[0], torch.zeros(5))]))


@pytest.mark.parametrize("encode_batch", [None, 3, 100])
def test_what_came_before_a_failure_is_adapted_on(tiny_model, tiny_batch, encode_batch):
    def loader():
        yield tiny_batch(seed=0)
        yield tiny_batch(seed=1)
        raise OSError("disk gone")

    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    alone = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    results = []
    with pytest.raises(OSError, match="disk gone"):
        results.extend(adapted.stream(loader(), encode_batch))
    bad = (torch.full((5, 6, 8), torch.nan), tiny_batch()[1])
    with pytest.raises(ValueError, match="audio holds non-finite"):
        results.extend(adapted.stream([tiny_batch(seed=2), bad], encode_batch))
    for s in range(3):
        alone.step(*tiny_batch(seed=s))
    for name, x in adapted.tuned.items():
        assert torch.allclose(x, alone.tuned[name], atol=1e-6)

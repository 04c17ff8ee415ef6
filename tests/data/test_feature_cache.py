"""FeatureCache: the numbers of a stream with one, and what it finds again."""

from __future__ import annotations

import copy

import pytest
import torch
from caching import adapting, all_same, counting, shards
from cases import state_equal

import fasttta
from fasttta.data import FeatureCache

# the tiny model's features take 480 bytes a sample: three samples a shard
SHARD_MB = 0.0014
SIZES = (5, 3, 1, 4)


@pytest.fixture
def batches(tiny_batch):
    return [tiny_batch(n, seed=i) for i, n in enumerate(SIZES)]


@pytest.fixture
def read(tiny_model):
    """Makes a method, READ unless named, on the tiny model."""

    def make(method="read", model=None, **options):
        return adapting(model or tiny_model(), method, **options)

    return make


@pytest.mark.filterwarnings("ignore:.*single sample")
@pytest.mark.parametrize("encode_batch", [None, 4, 100])
@pytest.mark.parametrize("method", ["source", "read", "abpem"])
def test_numbers_are_those_without_a_cache(read, batches, tmp_path, method, encode_batch):
    plain, first, second = read(method), read(method), read(method)
    expected = list(plain.stream(batches, encode_batch))
    cache = FeatureCache(tmp_path, shard_mb=SHARD_MB)
    assert all_same(expected, list(first.stream(batches, encode_batch, cache)))
    taken = {None: [5, 3, 1, 4], 4: [4, 1, 4, 4], 100: [13]}[encode_batch]
    assert first.encoded == plain.encoded == taken
    assert (cache.hits, cache.misses) == (0, 13)
    # from memory, then from files alone
    for cache in (cache, FeatureCache(tmp_path)):  # noqa: B020
        second.reset()
        assert all_same(expected, list(second.stream(batches, encode_batch, cache)))
        assert second.encoded == []
        assert cache.hits == 13
        assert state_equal(plain, second)
    assert len(shards(tmp_path)) > 3


@pytest.mark.filterwarnings("ignore:.*single sample")
def test_methods_share_features(read, batches, tmp_path):
    """Also after the weights behind the encoders have been adapted."""
    list(read("abpem", window=1).stream(batches, cache=FeatureCache(tmp_path)))
    expected = list(read().stream(batches))
    for method in ("read", "source"):
        adapted = read(method)
        results = list(adapted.stream(batches, cache=FeatureCache(tmp_path)))
        again = list(adapted.stream(batches, cache=FeatureCache(tmp_path)))
        assert adapted.encoded == []
        assert len(again) == len(SIZES)
        if method == "read":
            assert all_same(expected, results)


@pytest.mark.parametrize("method", ["tent", "sar", "eata"])
def test_methods_that_tune_inside_the_encoders_ignore_it(read, tiny_batch, tmp_path, method):
    batches = [tiny_batch(seed=i) for i in range(2)]
    expected = list(read(method).stream(batches))
    assert all_same(expected, list(read(method).stream(batches, cache=FeatureCache(tmp_path))))
    assert shards(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*single sample")
def test_any_order_and_partial_hits(read, batches, tiny_batch, tmp_path):
    list(read().stream(batches, cache=FeatureCache(tmp_path, shard_mb=SHARD_MB)))
    joined = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    fresh = tiny_batch(2, seed=77)
    one = tuple(torch.cat((x[order[:6]], new, x[order[6:8]])) for x, new in zip(joined, fresh))  # noqa: B905
    rest = tuple(x[order[8:]] for x in joined)
    cache, adapted = FeatureCache(tmp_path), read()
    results = list(adapted.stream([one, rest], cache=cache))
    assert adapted.encoded == [2]
    assert (cache.hits, cache.misses) == (13, 2)
    for x, y in zip(read().stream([one, rest]), results, strict=True):
        assert torch.allclose(x.logits, y.logits, atol=1e-5)
    # together with encode_batch: those that are missing, that many at a time
    cache, adapted = FeatureCache(tmp_path), read()
    more = [tiny_batch(3, seed=s) for s in (80, 81, 82)]
    mixed = [tuple(torch.cat(parts) for parts in zip(one, new, strict=True)) for new in more]
    list(adapted.stream([*mixed, rest], encode_batch=30, cache=cache))
    assert adapted.encoded == [9]


def test_a_sample_twice_in_a_batch(read, tiny_batch, tmp_path):
    batch = tuple(torch.cat((x, x[:2])) for x in tiny_batch(3))
    cache = FeatureCache(tmp_path)
    expected = list(read().stream([batch]))
    assert all_same(expected, list(read().stream([batch], cache=cache)))
    again = read()
    assert all_same(expected, list(again.stream([batch], cache=FeatureCache(tmp_path))))
    assert again.encoded == []


def test_bf16_rounds_alike_in_every_run(read, tiny_batch, tmp_path):
    batches = [tiny_batch(seed=i) for i in range(3)]
    first = list(read().stream(batches, cache=FeatureCache(tmp_path / "half", dtype="bf16")))
    second = read()
    results = list(second.stream(batches, cache=FeatureCache(tmp_path / "half", dtype="bf16")))
    assert second.encoded == []
    assert all_same(first, results)
    expected = list(read().stream(batches, cache=FeatureCache(tmp_path / "full")))
    for x, y in zip(expected, results, strict=True):
        assert not torch.equal(x.logits_before, y.logits_before)
        assert torch.allclose(x.logits_before, y.logits_before, atol=0.05)
    for name, size in (("half", 2), ("full", 4)):
        (data,) = (p.read_bytes() for p in shards(tmp_path / name))
        assert len(data) - 8 - int.from_bytes(data[:8], "little") == 15 * 10 * 12 * size


def test_partial_hits_in_bf16(read, tiny_batch, tmp_path):
    """A sample's features do not depend on whether they were read or computed."""
    a, b = tiny_batch(4, seed=0), tiny_batch(4, seed=1)
    both = tuple(torch.cat(parts) for parts in zip(a, b, strict=True))
    adapted = fasttta.adapt(read()._hidden[0], "read")
    cache = FeatureCache(tmp_path, dtype="bf16")
    list(adapted.stream([a], cache=cache))
    adapted.reset()
    mixed = list(adapted.stream([both], cache=cache))
    adapted.reset()
    assert all_same(mixed, list(adapted.stream([both], cache=FeatureCache(tmp_path, "bf16"))))


def test_float64(read, tiny_model, tiny_batch, tmp_path):
    batch = tiny_batch(dtype=torch.float64)
    model = tiny_model().double()
    with pytest.raises(ValueError, match='dtype="fp32" would round.*dtype="fp64"'):
        read(model=model).stream([batch], cache=FeatureCache(tmp_path))
    expected = list(read(model=model).stream([batch]))
    for encoded in ([5], []):
        adapted = read(model=model)
        cache = FeatureCache(tmp_path, dtype="fp64")
        assert all_same(expected, list(adapted.stream([batch], cache=cache)))
        assert adapted.encoded == encoded


def test_non_finite_features_are_not_kept(tiny_batch, tiny_model, tmp_path):
    batch = tiny_batch(4)
    adapted = counting(fasttta.adapt(tiny_model(), "source"))
    encode = type(adapted._hidden[1]).encode

    def spoilt(*inputs):
        features = encode(*inputs).clone()
        features[1, 2, 3] = torch.nan
        features[3, 0, 0] = torch.inf
        return features

    type(adapted._hidden[1]).encode = staticmethod(spoilt)
    result = next(adapted.stream([batch], cache=FeatureCache(tmp_path)))
    assert torch.isfinite(result.logits).all(dim=1).tolist() == [True, False, True, False]
    fresh = counting(fasttta.adapt(tiny_model(), "source"))
    list(fresh.stream([batch], cache=FeatureCache(tmp_path)))
    assert fresh.encoded == [2]


def test_non_finite_input(read, tiny_batch, tmp_path):
    bad = (torch.full((5, 6, 8), torch.nan), tiny_batch()[1])
    results, cache = [], FeatureCache(tmp_path)
    with pytest.raises(ValueError, match="audio holds non-finite"):
        results.extend(read().stream([tiny_batch(), bad], encode_batch=8, cache=cache))
    assert len(results) == 1
    assert cache.misses == 5
    adapted = read()
    list(adapted.stream([tiny_batch()], cache=FeatureCache(tmp_path)))
    assert adapted.encoded == []  # what came before the error is on disk


def test_closed_stream_keeps_what_was_encoded(read, tiny_batch, tmp_path):
    batches = [tiny_batch(seed=i) for i in range(4)]
    stream = read().stream(iter(batches), cache=FeatureCache(tmp_path))
    next(stream), next(stream)
    assert shards(tmp_path) == []  # still in memory
    stream.close()
    adapted = read()
    list(adapted.stream(batches, cache=FeatureCache(tmp_path)))
    assert adapted.encoded == [5, 5]


def test_flush_and_context(read, tiny_batch, tmp_path):
    with FeatureCache(tmp_path) as cache:
        stream = read().stream([tiny_batch(seed=i) for i in range(3)], cache=cache)
        next(stream)
        cache.flush()
        assert len(shards(tmp_path)) == 1
        cache.flush()
        assert len(shards(tmp_path)) == 1
        next(stream)
    assert len(shards(tmp_path)) == 2


def test_failing_loader(read, tiny_batch, tmp_path):
    def loader():
        yield tiny_batch()
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(read().stream(loader(), cache=FeatureCache(tmp_path)))
    assert len(shards(tmp_path)) == 1


def test_streams_at_the_same_time(read, tiny_batch, tmp_path):
    """One cache, two models, batch by batch."""
    batches, cache = [tiny_batch(seed=i) for i in range(3)], FeatureCache(tmp_path)
    expected = [list(read(m).stream(batches)) for m in ("abpem", "read")]
    a, b = read("abpem"), read("read")
    pairs = list(zip(a.stream(batches, cache=cache), b.stream(batches, cache=cache), strict=True))
    assert all_same(expected[0], [x for x, _ in pairs])
    assert all_same(expected[1], [y for _, y in pairs])
    assert a.encoded == [5, 5, 5]
    assert b.encoded == []


def test_what_others_write_is_found(read, tiny_batch, tmp_path):
    """Also by a cache that has looked into the folder before."""
    mine, theirs = (FeatureCache(tmp_path, shard_mb=SHARD_MB) for _ in range(2))
    adapted = read()
    stream = adapted.stream([tiny_batch(seed=i) for i in range(3)], cache=mine)
    next(stream)
    list(read().stream([tiny_batch(seed=1)], cache=theirs))
    next(stream), next(stream)
    assert adapted.encoded == [5, 5]
    assert (mine.hits, mine.misses) == (5, 10)


def test_source_context(read, tiny_batch, tmp_path):
    batches, cache = [tiny_batch(seed=i) for i in range(3)], FeatureCache(tmp_path)
    adapted = read()
    list(adapted.stream(batches, cache=cache))
    tuned = adapted.tuned
    for given in (None, cache):
        adapted.encoded.clear()
        with adapted.source():
            results = list(adapted.stream(batches, encode_batch=8, cache=given))
        assert adapted.encoded == [5, 5, 5]  # once: nothing is encoded ahead
        for x, batch in zip(results, batches, strict=True):
            assert torch.equal(x.logits, adapted.unwrap()(*batch))
            assert int(x.n_used) == 0
    assert all(torch.equal(x, adapted.tuned[n]) for n, x in tuned.items())
    # features that are read afterwards are still the same model's
    adapted.reset()
    adapted.encoded.clear()
    assert all_same(list(adapted.stream(batches, cache=cache)), list(read().stream(batches)))
    assert adapted.encoded == []


def test_inference_mode(read, tiny_batch, tmp_path):
    expected, inference = list(read().stream([tiny_batch()])), []
    for _ in range(2):
        adapted = read()
        cls = type(adapted._hidden[1])  # of this one model
        fuse = cls.fuse_attention

        def fuse_attention(self, x, fuse=fuse):
            inference.append(x.is_inference())
            return fuse(self, x)

        cls.fuse_attention = fuse_attention
        with torch.inference_mode():
            results = list(adapted.stream([tiny_batch()], 8, FeatureCache(tmp_path)))
        assert all_same(expected, results)
    assert inference == [False] * 4


def test_copy_of_an_adapted_model(read, tiny_model, tiny_batch, tmp_path):
    adapted = fasttta.adapt(tiny_model(), "read")
    list(adapted.stream([tiny_batch()], cache=FeatureCache(tmp_path)))
    cache = FeatureCache(tmp_path)
    list(copy.deepcopy(adapted).stream([tiny_batch()], cache=cache))
    assert (cache.hits, cache.misses) == (5, 0)

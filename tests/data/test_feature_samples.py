"""FeatureCache: by what a sample is known."""

from __future__ import annotations

import pytest
import torch
from caching import adapting, all_same

from fasttta.data import Batch, FeatureCache
from fasttta.data.feature_keys import sample_keys


@pytest.fixture
def read(tiny_model):
    """Makes a method, READ unless named, on the tiny model."""

    def make(method="read", model=None, **options):
        return adapting(model or tiny_model(), method, **options)

    return make


def test_content_distinguishes_single_values(read, tiny_batch, tmp_path):
    audio, video = tiny_batch(1)
    list(read("source").stream([(audio, video)], cache=FeatureCache(tmp_path)))
    for part in (0, 1):
        for at in (0, 7, -1):
            changed = [audio.clone(), video.clone()]
            flat = changed[part].view(-1)
            flat[at] = torch.nextafter(flat[at], torch.tensor(9.0))
            adapted = read("source")
            list(adapted.stream([tuple(changed)], cache=FeatureCache(tmp_path)))
            assert adapted.encoded == [1], (part, at)


def test_keys():
    x = torch.arange(24.0).view(2, 3, 4)
    assert sample_keys((x,)) == sample_keys((x.flip(0),))[::-1]
    assert sample_keys((x,)) == sample_keys((x.transpose(1, 2).contiguous().transpose(1, 2),))
    variants = [
        (x,), (x.view(2, 4, 3),), (x.view(2, 12),), (x.double(),), (x.int(),), (x, x),
        (x.view(2, 2, 6)[:, :1], x.view(2, 2, 6)[:, 1:]), (x.new_zeros(2),), (x.new_zeros(2, 0),),
        (torch.zeros(2, 1),), (torch.zeros(2, 1, dtype=torch.bool),),
    ]  # fmt: skip
    assert len({sample_keys(v)[0] for v in variants}) == len(variants)
    ids = [None, ["1", "2"], [1, 2], ["1 ", "2"], ["", "2"]]
    assert len({sample_keys((x,), i)[0] for i in ids}) == len(ids)
    assert sample_keys((x,), [1, 2]) == sample_keys((x,), torch.tensor([1, 2]))


def test_batches_with_ids(read, tiny_batch, tmp_path):
    batch = tiny_batch(4)
    expected = list(read().stream([batch]))
    named = Batch(batch, ["a", "b", "c", 3])
    assert all_same(expected, list(read().stream([named])))  # ids are for the cache
    assert all_same(expected, list(read().stream([named], cache=FeatureCache(tmp_path))))
    shuffled = Batch([x.flip(0) for x in batch], [3, "c", "b", "a"])
    for loader, encoded in (
        ([named], []),
        ([shuffled], []),
        ([Batch(batch, ["a", "b", "c", 4])], [1]),
        ([batch], [4]),
        # the same ids for other content: under another corruption
        ([Batch(tiny_batch(4, seed=9), ["a", "b", "c", 3])], [4]),
    ):
        adapted = read()
        list(adapted.stream(loader, cache=FeatureCache(tmp_path)))
        assert adapted.encoded == encoded


def test_default_collation(read, tiny_batch, tmp_path):
    audio, video = tiny_batch(6)
    samples = [Batch((audio[i], video[i]), i) for i in range(6)]
    for encoded, shuffle in (([4, 2], False), ([], True)):
        loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=shuffle)
        adapted = read()
        assert len(list(adapted.stream(loader, cache=FeatureCache(tmp_path)))) == 2
        assert adapted.encoded == encoded


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["a"], ValueError, "ids has 1 entries for 4 samples"),
        ("abcd", TypeError, "ids must be a list"),
        (None, None, None),
        ([1, 2, 3, 4.5], TypeError, "strings or integers, found 4.5"),
        ([True, 2, 3, 4], TypeError, "strings or integers, found True"),
    ],
)
def test_bad_ids(read, tiny_batch, tmp_path, ids, error, message):
    loader = [Batch(tiny_batch(4), [1, 2, 3, 4]), Batch(tiny_batch(4, seed=2), ids)]
    adapted, results = read(), []
    if error is None:  # as without ids
        assert len(list(adapted.stream(loader, cache=FeatureCache(tmp_path)))) == 2
        return
    with pytest.raises(error, match=message):
        results.extend(adapted.stream(loader, encode_batch=8, cache=FeatureCache(tmp_path)))
    assert len(results) == 1

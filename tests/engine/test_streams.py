"""Streams that are left early, or that a bad batch ends: no batch is lost, none is used twice."""

from __future__ import annotations

import copy
from collections import deque

import clips
import pytest
import torch
from cases import METHODS, same

import fasttta
from fasttta.adapted.fusion import AdaptedFusion
from fasttta.data import Batch, FeatureCache
from fasttta.engine import streaming

SIZES = (5, 2, 4, 3, 5, 4)


class FakeLane:
    """Like a stream of a GPU, but on the CPU: what it brings are copies."""

    def bring(self, x):
        return x.clone()

    def run(self, make):
        return make(), None

    def receive(self, done, *tensors):
        pass


@pytest.fixture(params=["eager", "lane"])
def path(request, monkeypatch):
    """Both ways in which a stream runs ahead."""
    if request.param == "lane":
        monkeypatch.setattr(AdaptedFusion, "_lane", lambda self: FakeLane())
    return request.param


@pytest.fixture(autouse=True)
def nothing_left():
    streaming._READERS.clear()
    yield
    streaming._READERS.clear()


@pytest.fixture
def batches(tiny_batch):
    return [tiny_batch(n, seed=i) for i, n in enumerate(SIZES)]


@pytest.fixture
def read(tiny_model):
    return lambda method="read": fasttta.adapt(tiny_model(), method, **METHODS[method])


def _generator(batches):
    yield from batches


def _near(results, expected):
    assert len(results) == len(expected)
    for x, y in zip(results, expected, strict=True):
        assert torch.allclose(x.logits, y.logits, atol=1e-5)


LEAVES = {
    "break": lambda stream, n: [x for _, x in zip(range(n), stream, strict=False)],
    "close": lambda stream, n: ([next(stream) for _ in range(n)], stream.close())[0],
    "open": lambda stream, n: (_OPEN.append(stream), [next(stream) for _ in range(n)])[1],
}
_OPEN: list = []


@pytest.mark.parametrize("encode_batch", [None, 6, 100])
@pytest.mark.parametrize("leave", LEAVES)
def test_what_was_read_ahead_comes_next(path, read, batches, leave, encode_batch):
    expected = list(read().stream(batches))
    adapted, results = read(), []
    loader = _generator(batches) if encode_batch == 6 else iter(batches)
    while len(results) < len(batches):
        before = len(results)
        results += LEAVES[leave](adapted.stream(loader, encode_batch), 2)
        assert len(results) == min(before + 2, len(batches))
    _near(results, expected)
    assert list(adapted.stream(loader, encode_batch)) == []
    # streams that were left open have ended
    assert [list(stream) for stream in _OPEN] == [[] for _ in _OPEN]
    _OPEN.clear()


def test_without_encode_batch_nothing_is_read_ahead(read, batches):
    """Whoever goes on with the iterator itself finds the rest."""
    loader = iter(batches)
    for _ in read().stream(loader):
        break
    assert len(list(loader)) == len(batches) - 1
    assert streaming._READERS == {}


def test_an_error_of_the_consumer(path, read, batches):
    expected = list(read().stream(batches))
    adapted, loader, results = read(), iter(batches), []

    def consume():
        for result in adapted.stream(loader, 100):
            results.append(result)
            if len(results) == 3:
                raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        consume()
    results += adapted.stream(loader, 100)
    _near(results, expected)


@pytest.mark.parametrize("encode_batch", [None, 6, 100])
@pytest.mark.parametrize(
    "bad",
    [
        lambda audio, video: (audio[:, :3], video), lambda audio, video: (audio * torch.nan, video),
        lambda audio, video: (audio,), lambda audio, video: (audio.to_sparse(), video),
    ],
    ids=["shape", "nan", "number", "sparse"],
)  # fmt: skip
def test_a_bad_batch_raises_at_its_own_position(path, read, batches, bad, encode_batch):
    good = list(read().stream(batches[:2] + batches[3:]))
    loader = iter([*batches[:2], bad(*batches[2]), *batches[3:]])
    adapted, results = read(), []
    with pytest.raises((ValueError, TypeError)):
        results.extend(adapted.stream(loader, encode_batch))
    assert len(results) == 2
    results += adapted.stream(loader, encode_batch)
    _near(results, good)


@pytest.mark.parametrize("cached", [False, True])
def test_an_encoder_that_fails_on_one_batch(path, read, batches, tmp_path, cached):
    """Batches are encoded together; the error is of the batch that causes it."""
    good = list(read().stream(batches[:3] + batches[4:]))
    adapted = read()
    working = adapted._hidden[1]
    encode, poison = type(working).encode, batches[3][0][0, 0, 0].item()

    def failing(audio, video):
        if (audio[:, 0, 0] == poison).any():
            raise ValueError("this clip is cursed")
        return encode(working, audio, video)

    working.encode = failing
    loader, results = iter(batches), []
    cache = FeatureCache(tmp_path) if cached else None
    with pytest.raises(ValueError, match="cursed"):
        results.extend(adapted.stream(loader, 100, cache))
    assert len(results) == 3
    results += adapted.stream(loader, 100, cache)
    _near(results, good)


def test_an_interrupt_keeps_the_batch(path, read, batches, monkeypatch):
    """Unlike an error: the step was undone, and the batch comes again."""
    expected = list(read().stream(batches))
    adapted, loader, results = read(), iter(batches), []
    step, calls = type(adapted)._adapt, deque([False, False, True])

    def interrupted(self, *args, **kwargs):
        if calls and calls.popleft():
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(type(adapted), "_adapt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.extend(adapted.stream(loader, 6))
    assert len(results) == 2
    results += adapted.stream(loader, 6)
    _near(results, expected)


def test_another_model_goes_on(read, batches):
    first, second, loader = read(), read("abpem"), iter(batches)
    for _ in first.stream(loader, 100):
        break
    expected = list(read("abpem").stream(batches[1:], 100))
    results = list(second.stream(loader, 100))
    assert all(same(x, y) for x, y in zip(results, expected, strict=True))


def test_a_list_starts_anew(read, batches):
    adapted = read("source")
    for _ in adapted.stream(batches, 100):
        break
    _near(list(adapted.stream(batches, 100)), list(read("source").stream(batches)))
    assert streaming._READERS == {}


def test_what_is_kept_are_copies(path, read, tiny_batch):
    """A loader that refills its batch, and names."""
    audio, video = tiny_batch(4)
    values = [tiny_batch(4, seed=i) for i in range(5)]

    def refilled():
        for i, (a, v) in enumerate(values):
            audio.copy_(a), video.copy_(v)
            yield Batch((audio, video), [f"{i}-{j}" for j in range(4)])

    adapted, loader = read(), refilled()
    stream = adapted.stream(loader, 8)
    results = [next(stream)]
    stream.close()
    results += adapted.stream(loader, 8)
    _near(results, list(read().stream(values)))


def test_names_are_kept(read, batches, tmp_path):
    named = [Batch(x, [f"{i}-{j}" for j in range(len(x[0]))]) for i, x in enumerate(batches)]
    adapted, loader = read(), iter(named)
    stream = adapted.stream(loader, 100, FeatureCache(tmp_path))
    next(stream), stream.close()
    list(adapted.stream(loader, 100, FeatureCache(tmp_path)))
    cache = FeatureCache(tmp_path)
    list(read().stream(named, cache=cache))
    assert (cache.hits, cache.misses) == (sum(SIZES), 0)


def test_iterators_that_are_never_continued_are_given_up(read, batches):
    adapted = read("source")
    for _ in range(streaming._CLOSED + 3):
        for _ in adapted.stream(iter(batches), 100):
            break
    assert len(streaming._READERS) == streaming._CLOSED


def test_length(read, batches):
    adapted = read("source")
    stream = adapted.stream(batches, 100)
    assert len(stream) == len(batches)
    assert len(list(stream)) == len(batches)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches[0]), batch_size=2)
    assert len(adapted.stream(loader)) == len(list(adapted.stream(loader))) == 3
    with pytest.raises(TypeError, match="no len"):
        len(adapted.stream(iter(batches)))
    with pytest.raises(TypeError, match="loader must yield batches, found 3"):
        adapted.stream(3)


def test_a_copy_of_the_model_in_the_middle(read, batches):
    adapted = read()
    stream = adapted.stream(iter(batches), 100)
    next(stream)
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin.predict(*batches[0]), adapted.predict(*batches[0]))


@pytest.mark.parametrize("method", ["tpt", "rada"])
def test_images(method):
    clip = clips.tiny_clip()
    options = {"heads": 2, "views": 4} if method == "rada" else clips.METHODS[method]
    adapted = fasttta.adapt(clip, method, classes=clips.tiny_ids(), **options)
    images = [clips.image(i) for i in range(4)]
    expected = list(adapted.stream(images))
    assert len(adapted.stream(images)) == 4
    loader = iter([images[0], torch.full((3, 30, 30), 7.0), *images[1:]])
    results = []
    with pytest.raises(ValueError, match="pixels from 7 to 7"):
        results.extend(adapted.stream(loader))
    stream = adapted.stream(loader)
    results.append(next(stream))
    results += adapted.stream(loader)
    assert list(stream) == []
    _near(results, expected)

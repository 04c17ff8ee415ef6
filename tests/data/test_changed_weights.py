"""FeatureCache: features are encoded again once weights were changed in place."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from caching import adapting, all_same, shards

from fasttta.data import FeatureCache


@pytest.fixture
def read(tiny_model):
    """Makes a method, READ unless named, on the tiny model."""

    def make(method="read", model=None, **options):
        return adapting(model or tiny_model(), method, **options)

    return make


def _storage(weight):
    """The memory of a weight as floats, by a way that counts no change."""
    return torch.empty(0).set_(weight.untyped_storage()).view(-1)


def _ctypes(weight):
    address = weight.data_ptr() + 4 * 7
    value = ctypes.c_float.from_address(address)
    value.value += 1


def _another_process(weight):
    """Through memory that a fork shares."""
    weight.untyped_storage().share_memory_()
    child = os.fork()
    if child == 0:
        weight.detach().numpy()[1, 1] += 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def _swap(weight, i, j):
    rows = weight.data
    rows[[i, j]] = rows[[j, i]]


# ways to change the weight [48, 12] of an MLP, few of which count up its version
WRITES = {
    "an element in place": lambda w: w.detach().view(-1)[4].add_(1),
    "an element through data": lambda w: w.data[5, 3].add_(1e-3),
    "the last bit of an element": lambda w: w.data.view(torch.int32)[20, 11].bitwise_xor_(1),
    "a row through data": lambda w: w.data[31].mul_(2),
    "a column through data": lambda w: w.data[:, 7].zero_(),
    "the sign of a column": lambda w: w.data[:, 3].neg_(),
    "two rows swapped": lambda w: _swap(w, 2, 9),
    "an element through numpy": lambda w: w.detach().numpy().__setitem__((47, 11), 3.0),
    "a column through numpy": lambda w: w.detach().numpy()[:, 1].fill(0.5),
    "a byte of the storage": lambda w: w.untyped_storage().__setitem__(
        1001, w.untyped_storage()[1001] ^ 1
    ),
    "a view of the storage": lambda w: _storage(w)[100:103].fill_(0),
    "pruning through data": lambda w: w.data.masked_fill_(w.data.abs() < 0.05, 0),
    "memory by its address": _ctypes,
    "another process": _another_process,
}


@pytest.mark.parametrize("how", WRITES)
def test_weights_changed_in_place(read, tiny_model, tiny_batch, tmp_path, how):
    """The user's model goes on training, and the user means it: frozen weights are shared."""
    model, batch = tiny_model(), tiny_batch()
    adapted, cache = read(model=model, verify_model="never"), FeatureCache(tmp_path)
    list(adapted.stream([batch], cache=cache))
    weight = model.blocks_a[0].mlp.fc1.weight
    before = weight.detach().clone()
    WRITES[how](weight)
    assert not torch.equal(before, weight)
    adapted.reset()
    changed = list(adapted.stream([batch], cache=cache))
    assert adapted.encoded == [5, 5]
    assert all_same(changed, list(read(model=model).stream([batch])))
    # the old ones are found again
    weight.data.copy_(before)
    list(read(model=model).stream([batch], cache=cache))
    assert cache.hits == 5


@pytest.mark.parametrize("encode_batch", [None, 5])
def test_weights_changed_in_the_middle_of_a_stream(
    read, tiny_model, tiny_batch, tmp_path, encode_batch
):
    model, batches = tiny_model(), [tiny_batch(seed=i) for i in range(3)]
    list(read(model=model).stream(batches, cache=FeatureCache(tmp_path)))
    adapted, cache = read(model=model, verify_model="never"), FeatureCache(tmp_path)
    stream = adapted.stream(iter(batches), encode_batch, cache)
    next(stream)
    model.blocks_v[1].mlp.fc2.weight.data[0, 0] += 1
    next(stream)
    assert adapted.encoded == [5]
    assert (cache.hits, cache.misses) == (5, 5)
    # nor are new features kept under the old weights' name
    model.blocks_v[1].mlp.fc2.weight.data[0, 0] += 1
    next(stream), stream.close()
    assert adapted.encoded == [5, 5]
    fresh = read(model=model)
    list(fresh.stream(batches, cache=FeatureCache(tmp_path)))
    assert fresh.encoded == [5, 5]


def test_weights_changed_while_they_are_used(read, tiny_model, tiny_batch, tmp_path):
    """Features of neither the old nor the new weights are not kept."""
    model, batch = tiny_model(), tiny_batch()
    adapted = read(model=model)
    working = adapted._hidden[1]
    encode = type(working).encode

    def interrupted(*inputs):
        tokens = encode(*inputs)
        model.blocks_a[0].mlp.fc1.weight.data[0, 0] += 1
        return tokens

    type(working).encode = staticmethod(interrupted)
    with pytest.warns(RuntimeWarning, match=r"changed while .* not kept.*FeatureCache\(.*key="):
        list(adapted.stream([batch], cache=FeatureCache(tmp_path)))
    assert shards(tmp_path) == []

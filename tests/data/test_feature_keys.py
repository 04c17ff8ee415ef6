"""FeatureCache: features of another model are never used."""

from __future__ import annotations

import copy
import logging
import sys
import threading
import types
from dataclasses import dataclass
from functools import partial
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from caching import adapting, all_same, counting, shards
from fusions import HuggingFaceStyle, Joint
from torch import nn

import fasttta
from fasttta.data import FeatureCache
from fasttta.data.feature_keys import model_key


@pytest.fixture
def read(tiny_model):
    """Makes a method, READ unless named, on the tiny model."""

    def make(method="read", model=None, **options):
        return adapting(model or tiny_model(), method, **options)

    return make


def _other(kind, tiny_model):
    """An adapted model whose features differ from those of tiny_model() in fp32."""
    model, options = tiny_model(), {}
    with torch.no_grad():
        if kind == "one weight":
            model.blocks_v[1].mlp.fc2.weight[3, 5] += 1e-3
        elif kind == "heads":
            model.blocks_a[0].attn.heads = 4
        elif kind == "scale":
            model.blocks_a[0].attn.scale = 0.1
        elif kind == "epsilon":
            model.blocks_a[0].norm1.eps = 0.1
        elif kind == "precision":
            options["precision"] = "bf16"
        elif kind == "code":
            model.blocks_v[0].mlp = Doubled(model.blocks_v[0].mlp)
    return fasttta.adapt(model, "read", **options)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.fc1, self.fc2 = inner.fc1, inner.fc2

    def forward(self, x, add=None):
        return add + 2 * self.fc2(nn.functional.gelu(self.fc1(x)))


@pytest.mark.parametrize(
    "kind", ["one weight", "heads", "scale", "epsilon", "precision", "code", "storage"]
)
def test_features_of_another_model_are_not_used(read, tiny_model, tiny_batch, tmp_path, kind):
    batch = tiny_batch()
    list(read().stream([batch], cache=FeatureCache(tmp_path)))
    adapted = counting(_other(kind, tiny_model))
    cache = FeatureCache(tmp_path, dtype="bf16" if kind == "storage" else "fp32")
    list(adapted.stream([batch], cache=cache))
    assert adapted.encoded == [5]
    assert len(shards(tmp_path)) == 2  # the other one's are left where they are
    again = read()
    list(again.stream([batch], cache=FeatureCache(tmp_path)))
    assert again.encoded == []


def test_weights_behind_the_encoders_may_differ(read, tiny_model, tiny_batch, tmp_path):
    list(read().stream([tiny_batch()], cache=FeatureCache(tmp_path)))
    model = tiny_model()
    torch.nn.init.normal_(model.blocks_u[0].attn.qkv.weight)
    adapted = read(model=model)
    expected = list(read(model=model).stream([tiny_batch()]))
    assert all_same(expected, list(adapted.stream([tiny_batch()], cache=FeatureCache(tmp_path))))
    assert adapted.encoded == []


def test_a_forward_that_counts_its_calls(tmp_path):
    """Nothing can be kept, which is said once; under a key of the user's everything is."""

    class Counted(HuggingFaceStyle):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, *inputs):
            self.calls += 1
            return super().forward(*inputs)

    torch.manual_seed(0)
    model, batches = Counted().eval(), [HuggingFaceStyle.batch(3, seed=i) for i in range(3)]

    def stream(**options):
        cache = FeatureCache(tmp_path, **options)
        list(fasttta.adapt(model, "read", spec=HuggingFaceStyle.spec).stream(batches, cache=cache))
        return cache

    with pytest.warns(RuntimeWarning, match="count") as warned:
        stream()
    assert len(warned) == 1
    stream(key="counted")
    assert stream(key="counted").hits == 9


def test_every_weight_and_buffer_counts():
    """Of nested, tied and parametrised modules, whatever the layout; non-persistent buffers."""
    torch.manual_seed(0)
    model = Bare()
    model.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    model.tied = model.inner[2]
    model.register_buffer("table", torch.randn(5, 3).T, persistent=False)
    model.register_buffer("flags", torch.tensor([True, False, True]))
    model.register_buffer("rounded", torch.randn(3, 2).bfloat16())
    model.register_buffer("number", torch.tensor(3))
    model.plain, model.helper = [torch.randn(2)], Helper()
    tensors = [*model.parameters(), *model.buffers(), model.plain[0], model.helper.table]
    keys = {model_key(model, "fp32", "fp32")}
    for tensor in tensors:
        values = tensor.data
        for place in {(0,) * values.ndim, tuple(n - 1 for n in values.shape)}:
            before = values[place].clone()
            values[place] = ~before if before.dtype == torch.bool else before + 1
            keys.add(model_key(model, "fp32", "fp32"))
            values[place] = before
    assert len(tensors) == 18
    # the counters of batches and of nothing else are single values
    assert len(keys) == 1 + 2 * 18 - 2
    assert model_key(model, "fp32", "fp32") in keys


def test_layout_does_not_count_but_type_and_shape_do():
    def key(x):
        model = Bare()
        model.register_buffer("x", x)
        return model_key(model, "fp32", "fp32")

    x = torch.arange(24.0).view(2, 3, 4)
    same = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0), x.repeat(1, 1, 2)[:, :, :4]]
    same += [torch.cat((torch.zeros(1), x.flatten()))[1:].view(2, 3, 4)]
    assert {key(y) for y in same} == {key(x)}
    others = [x.view(3, 2, 4), x.double(), x.view(torch.int32), x[None], -x, x.flip(0)]
    assert len({key(y) for y in (x, *others)}) == 7


def test_values_that_cannot_be_read(tmp_path):
    model = Bare()
    model.register_buffer("x", torch.ones(3, device="meta"))
    kept = FeatureCache(tmp_path).of(model, "fp32")
    with pytest.raises(TypeError, match=r"holds no values; name the model.*FeatureCache\(.*key="):
        kept.features(["0"], (torch.ones(1, 2),), lambda inputs: inputs[0])


def test_named_model(read, tiny_model, tiny_batch, tmp_path):
    """The user's promise: weights are not read, precision and storage still count."""
    model, batch = tiny_model(), tiny_batch()
    list(read(model=model).stream([batch], cache=FeatureCache(tmp_path, key="v3")))
    model.blocks_a[0].mlp.fc1.weight.data.mul_(2)
    for encoded, key, precision, dtype in (
        ([], "v3", "fp32", "fp32"), ([5], "v4", "fp32", "fp32"), ([5], None, "fp32", "fp32"),
        ([5], "v3", "bf16", "fp32"), ([5], "v3", "fp32", "bf16"),
    ):  # fmt: skip
        adapted = read(model=model, precision=precision)
        list(adapted.stream([batch], cache=FeatureCache(tmp_path, dtype, key=key)))
        assert adapted.encoded == encoded, (key, precision, dtype)


@pytest.mark.parametrize(("key", "error"), [("", ValueError), (" ", ValueError), (3, TypeError)])
def test_names_that_cannot_be(tmp_path, key, error):
    with pytest.raises(error, match="key"):
        FeatureCache(tmp_path, key=key)


def test_memory_used_again_by_another_model(read, tiny_model, tiny_batch, tmp_path):
    """A key is of contents, not of addresses."""
    for i in range(6):
        model = tiny_model()
        with torch.no_grad():
            model.blocks_v[0].mlp.fc1.weight.view(-1)[4] += i
        adapted = read(model=model)
        list(adapted.stream([tiny_batch()], cache=FeatureCache(tmp_path)))
        assert adapted.encoded == [5]
        del adapted, model


def _front(model, audio, video):
    a = model.audio(audio.transpose(1, 2)).transpose(1, 2)
    v = model.video_norm(model.video(video).flatten(2).transpose(1, 2))
    return torch.cat((model.token.expand(len(a), -1, -1), a, v), dim=1)


def _front_too(model, audio, video):
    return 1.0 * _front(model, audio, video)


def _shifted(by):
    return lambda model, audio, video: _front(model, audio, video) + by - by


class Bare(nn.Module):
    """As much of a model as a key is made of."""

    def tunable(self, group):
        return {}


class Helper:
    """Holds a table of the model, and is no module."""

    def __init__(self):
        self.table, self.calls = torch.arange(4.0), 0


@dataclass
class Settings:
    width: float = 1.0


def _scaled(x, by=1):
    return 2 * x * by


def _scaled_otherwise(x, by=1):
    return 2 + x * by


def _with_default(value):
    """The same function with another default argument."""
    return FunctionType(_scaled.__code__, _scaled.__globals__, "_scaled", (value,))


def _edited(forward):
    """A module of a class that always has the same name, with one forward or another."""
    return type("Edited", (nn.Module,), {"forward": forward})()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2), (1, True), (1.0, 1), ("a", "b"), (None, 0), ([1, 2], [2, 1]), ([1], (1,)),
        ({"a": 1}, {"a": 2}), ({"a", "b"}, {"a", "c"}), (torch.float32, torch.float16),
        (torch.ones(3), torch.ones(3, 1)), ([torch.ones(3)], [torch.zeros(3)]),
        (np.ones(3), np.ones(4)), (np.float32(1), np.float32(2)),
        (Settings(), Settings(2.0)), (SimpleNamespace(a=1), SimpleNamespace(a=2)),
        ([nn.Linear(2, 2)], [nn.Linear(2, 2)]), (nn.ReLU, nn.GELU), ([nn.ReLU()], [nn.GELU()]),
        (_scaled, _scaled_otherwise), (_shifted(1), _shifted(2)), (_scaled, _with_default(2)),
        (partial(_scaled, by=1), partial(_scaled, by=2)),
        (
            lambda x: x.sin(),
            lambda x: x.cos(),  # on another line
        ),
    ],
)  # fmt: skip
def test_settings_are_part_of_a_key(one, other):
    def key(value):
        model = Bare()
        model.setting = value
        return model_key(model, "fp32", "fp32")

    assert key(one) == key(copy.deepcopy(one))
    assert key(one) != key(other)


def test_code_is_not_part_of_a_key():
    """As FeatureCache says: who edits a forward takes another folder, or names the model."""
    keys = set()
    for forward in (lambda self, x: x + 1, lambda self, x: x - 1):
        model = Bare()
        model.inner = _edited(forward)
        keys.add(model_key(model, "fp32", "fp32"))
    assert len(keys) == 1


def test_versions_of_packages_are_part_of_a_key(monkeypatch):
    """Of PyTorch, and of the package that a class of the model lies in."""
    keys = set()
    for version in (None, "1.0", "1.1"):
        module = types.ModuleType("of_the_user")
        module.__version__ = version
        monkeypatch.setitem(sys.modules, "of_the_user", module)
        model = Bare()
        model.inner = _edited(lambda self, x: x)
        type(model.inner).__module__ = "of_the_user.models"
        keys.add(model_key(model, "fp32", "fp32"))
    monkeypatch.setattr(torch, "__version__", "0.1")
    keys.add(model_key(model, "fp32", "fp32"))
    assert len(keys) == 4


def test_what_changes_by_itself_is_not():
    """Locks, loggers, generators; also where an object lies, and what it holds of itself."""

    def key():
        model = Bare()
        model.lock, model.random = threading.Lock(), torch.Generator()
        model.random.seed()
        model.logger = logging.getLogger("fasttta.test")
        model.logger.addHandler(logging.NullHandler())
        model.itself = [model, {"again": model}]
        return model_key(model, "fp32", "fp32")

    assert key() == key()


def test_precision_and_storage_are_part_of_a_key(tiny_model):
    """Also where the weights are the same: tf32 differs from fp32 in the products alone."""
    model = tiny_model().requires_grad_(False)
    kinds = [(p, d) for p in ("fp32", "tf32") for d in ("fp32", "bf16")]
    assert len({model_key(model, *kind) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_methods_have_one_key(tiny_model, tiny_batch, precision):
    """Those with frozen encoders, adapted or not; the model may be wrapped."""
    keys = set()
    for method in ("source", "read", "abpem"):
        adapted = adapting(nn.DataParallel(tiny_model()), method, precision=precision)
        for _ in range(2):
            keys.add(model_key(adapted._hidden[1], adapted.precision, "fp32"))
            list(adapted.stream([tiny_batch()]))
    assert len(keys) == 1


def _specified(cls, **spec):
    torch.manual_seed(0)
    spec = {f: getattr(cls.spec, f) for f in ("fusion", "spans", "qkv", "logits")} | spec
    return fasttta.adapt(cls().eval(), "abpem", k=3, spec=fasttta.ModelSpec(**spec))


@pytest.mark.parametrize("cls", [Joint, HuggingFaceStyle])
def test_specified_models(cls, tmp_path):
    batches = [cls.batch(4, seed=i) for i in range(3)]
    expected = list(_specified(cls).stream(batches))
    for encoded in ([4, 4, 4], []):
        adapted = counting(_specified(cls))
        results = list(adapted.stream(batches, cache=FeatureCache(tmp_path)))
        assert all_same(expected, results)
        assert adapted.encoded == encoded


def _back(model, x):
    return model.head(model.fusion(x + model.position)[:, 0])


def test_another_spec_is_another_model(tmp_path):
    pairs = [None, (_front, _back), (_front_too, _back), (_shifted(1.0), _back)]
    pairs += [(_shifted(2.0), _back), ("audio", "video_norm")]
    batch = Joint.batch(4)
    for encoded in ([4], []):
        for pair in pairs:
            adapted = counting(_specified(Joint, encode=pair))
            list(adapted.stream([batch], cache=FeatureCache(tmp_path)))
            # the modules that are named are those that are found: the same cut, another spec
            assert adapted.encoded == encoded, pair


def test_features_that_cannot_be_kept(tmp_path):
    pair = (lambda m, a, v: {"x": _front(m, a, v)}, lambda m, x: _back(m, x["x"]))
    adapted = fasttta.adapt(Joint().eval(), "source", spec=fasttta.ModelSpec(
        fusion=Joint.spec.fusion, spans=Joint.spec.spans, encode=pair))  # fmt: skip
    adapted._verified = True  # such a pair is refused before it comes to the cache
    with pytest.raises(TypeError, match="one floating point tensor.*found dict.*without cache"):
        list(adapted.stream([Joint.batch(4)], cache=FeatureCache(tmp_path)))

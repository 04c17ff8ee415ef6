"""Forwards of many kinds under a ModelSpec: the cut gives what the module's own forward gives."""

from __future__ import annotations

import pytest
import torch
from cases import same
from fusions import Joint, Packed, Three, build
from torch import nn

import fasttta
from fasttta import ModelSpec
from fasttta.engine.graph import GraphStep

LR = 1e-2
PAIR = ModelSpec("attn", {"a": (0, 4), "b": (4, 7)}, "qkv")


class Base(nn.Module):
    """Two inputs [B, 4, 5] and [B, 3, 6], joined and attended over; subclasses bend it."""

    def __init__(self, dim=8, heads=2):
        super().__init__()
        torch.manual_seed(0)
        self.ea, self.eb = nn.Linear(5, dim), nn.Linear(6, dim)
        self.norm = nn.LayerNorm(dim)
        self.attn = Packed(dim, heads)
        self.head = nn.Linear(dim, 4)

    def joined(self, a, b):
        return torch.cat((self.ea(a), self.eb(b)), dim=1)

    def forward(self, a, b):
        x = self.joined(a, b)
        return self.head((x + self.attn(self.norm(x))).mean(dim=1))

    spec = ModelSpec("attn", {"a": (0, 4), "b": (4, 7)}, "qkv")


def batch(n=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *s, generator=g, dtype=dtype) for s in ((4, 5), (3, 6)))


class Twice(Base):
    """One module used inside an encoder and again outside it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(self.ea, self.norm)

    def joined(self, a, b):
        return self.norm(torch.cat((self.inner(a), self.eb(b)), dim=1))


class Constants(Base):
    """A position embedding from a module, and an encoder that returns its token count."""

    class Counting(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            y = self.linear(x)
            return y, y.shape[:2], torch.tensor(0.5)

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(7, 8)
        self.counting = self.Counting(self.eb)

    def joined(self, a, b):
        y, (batch, tokens), factor = self.counting(b)
        x = torch.cat((self.ea(a), y.view(batch, tokens, -1) * factor), dim=1)
        return x + self.positions(torch.arange(7))


class Masked(Base):
    """Pools by a mask that an input carries: an empty sample divides 0 by 0."""

    def forward(self, a, b):
        x = self.joined(a, b)
        x = x + self.attn(self.norm(x))
        mask = (a[:, :, :1] > -10).to(x.dtype)
        return self.head((x[:, :4] * mask).sum(1) / mask.sum(1) * (a * a).sum((1, 2))[:, None])


class Writing(Base):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, a, b):
        self.calls.add_(1)
        return super().forward(a, b)


class Float(Base):
    """Sets a type itself."""

    def joined(self, a, b):
        return super().joined(a.float(), b.float())


class Weighted(Base):
    """An encoder with a weight-norm parametrisation."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.ea)


class Batched(Base):
    """BatchNorm and dropout, which do nothing random in evaluation."""

    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm1d(7), nn.Dropout(0.5)

    def joined(self, a, b):
        return self.drop(self.bn(super().joined(a, b)))


@pytest.mark.parametrize("cls", [Base, Twice, Constants, Masked, Writing, Float, Weighted, Batched])
@pytest.mark.parametrize("method", ["abpem", "tent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forwards(cls, method, dtype):
    model = cls().eval()
    if dtype == torch.float64:
        if cls is Float:
            pytest.skip("is in float32")
        model.double()
    options = {"k": 2, "window": 3} if method == "abpem" else {}
    if cls is Twice and method == "tent":
        with pytest.raises(ValueError, match="one tensor"):
            fasttta.adapt(model, method, spec=cls.spec)
        return
    adapted = fasttta.adapt(model, method, spec=cls.spec, lr=LR, **options)
    with torch.no_grad():
        own = model(*batch(dtype=dtype))
    calls = model.calls.clone() if cls is Writing else None
    for seed in range(3):
        inputs = batch(dtype=dtype, seed=seed)
        result = adapted.step(*inputs)
        if seed == 0:
            assert torch.allclose(result.logits_before, own, atol=1e-5)
        assert int(result.n_used) == (min(seed + 1, 3) * 3 if method == "abpem" else 3)
        merged = adapted.unwrap(merge=True)
        with torch.no_grad():
            assert torch.allclose(adapted.predict(*inputs), merged(*inputs), atol=1e-4)
        if method == "abpem":
            assert torch.equal(result.logits, adapted.predict(*inputs))
    if calls is not None:
        assert torch.equal(model.calls, calls)


@pytest.mark.parametrize("cls", [Base, Constants, Masked])
def test_captured_windows(cls):
    """Empty places and bad batches on static buffers are nothing that a forward cannot take."""
    model = cls().eval().double()
    options = {"spec": cls.spec, "k": 2, "window": 3, "lr": LR}
    eager, graph = (fasttta.adapt(model, "abpem", **options) for _ in range(2))
    eager._step.host_checks = False
    step = graph._step
    parts = step.model, step.method, step.state, step.precision, step.device
    graph._step = GraphStep(*parts, False, capture=False)
    for seed, size in enumerate((3, 3, 3, 3, 2, 3)):
        inputs = batch(size, seed, torch.float64)
        if seed == 1:
            inputs[0][size - 1, 0, 0] = torch.nan
        a, b = graph.step(*inputs), eager.step(*inputs)
        assert int(a.n_used) == int(b.n_used)
        assert torch.allclose(a.logits, b.logits, rtol=1e-8, equal_nan=True)


@pytest.mark.parametrize("name", ["joint", "three"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_predicts_with_the_updated_weights(name, autocast):
    """A cast of the tuned weights that outlives their update would repeat the old prediction."""
    cls = {"joint": Joint, "three": Three}[name]
    adapted = fasttta.adapt(build(name), "read", spec=cls.spec, precision="bf16", lr=0.3)
    inputs = cls.batch(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = [adapted.step(*inputs) for _ in range(2)]
        predicted = adapted.predict(*inputs)
    for result in results:
        assert not torch.equal(result.logits, result.logits_before)
    predicted = predicted[1] if isinstance(predicted, tuple) else predicted
    assert torch.equal(results[1].logits, predicted)
    assert torch.equal(results[1].logits_before, results[0].logits)


def test_token_ids_survive_low_precision():
    class Ids(Base):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(1000, 8)

        def forward(self, ids, b):
            x = torch.cat((self.words(ids), self.eb(b)), dim=1)
            x = x + self.attn(self.norm(x))
            return self.head(x[torch.arange(len(x)), (ids == 999).long().argmax(1)])

    model = Ids().eval()
    ids = torch.tensor([[1, 998, 999, 4], [999, 997, 3, 996]])
    b = batch(2)[1]
    adapted = fasttta.adapt(model, "read", spec=Ids.spec, precision="bf16")
    with torch.no_grad():
        assert (adapted.step(ids, b).logits_before - model(ids, b)).abs().max() < 0.05
    large = ids + 2**24
    leaf = fasttta.models.specified.kept_results.Leaf((4,), 0, torch.int64, slice(0, 8))
    assert torch.equal(leaf.unpack(leaf.pack(large, 2)).view(2, 4), large)
    assert torch.equal(leaf.unpack(leaf.pack(-large, 2)).view(2, 4), -large)


def test_sequence_first_attention_at_any_batch_size():
    """[T, B, D] is told from [B, T, D] once, also where the sizes are equal."""

    class First(Base):
        def forward(self, a, b):
            x = self.joined(a, b)
            y = self.attn(self.norm(x).transpose(0, 1)).transpose(0, 1)
            return self.head((x + y).mean(dim=1))

    class AttendFirst(Packed):
        def forward(self, x):
            qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 1, 3, 0, 4)
            out = nn.functional.scaled_dot_product_attention(*qkv)
            return self.proj(out.permute(2, 0, 1, 3).flatten(2))

    model = First().eval()
    model.attn = AttendFirst(8, 2)
    a, b = batch(7)
    gaps = [
        fasttta.adapt(model, "abpem", spec=PAIR, k=2, window=1).step(a[:n], b[:n])
        .stats["attention_gap"][:3]
        for n in (3, 6, 7)
    ]  # fmt: skip
    assert torch.allclose(gaps[0], gaps[1], rtol=1e-4)
    assert torch.allclose(gaps[0], gaps[2], rtol=1e-4)


def test_hooks_that_change_results_are_noticed():
    model = Base().eval()
    handle = model.ea.register_forward_hook(lambda _m, _i, out: out * 3)
    with pytest.raises(ValueError, match="forward hooks change results"):
        fasttta.adapt(model, "read", spec=Base.spec)(*batch())
    handle.remove()
    seen = []
    model.ea.register_forward_hook(lambda *_: seen.append(1))  # one that only looks on
    fasttta.adapt(model, "read", spec=Base.spec)(*batch())
    assert len(seen) == 1  # the comparison


def test_inputs_of_later_batches():
    class Optional(Base):
        def forward(self, a, b, c=None):
            x = super().forward(a, b)
            return x if c is None else x + self.head(c)

    a, b = batch()
    c = torch.randn(3, 8)
    adapted = fasttta.adapt(Optional().eval(), "read", spec=Base.spec)
    adapted(a, b)
    with pytest.raises(ValueError, match="found 3 inputs, the first batch had 2"):
        adapted(a, b, c)
    adapted = fasttta.adapt(Optional().eval(), "read", spec=Base.spec)
    adapted(a, b, c)
    with pytest.raises(ValueError, match="found 2 inputs, the first batch had 3"):
        adapted(a, b)


def _encode(model, a, b):
    a.mul_(2).div_(2)
    return model.joined(a, b)


def _fuse(model, x):
    x.add_(0.0)
    return model.head((x + model.attn(model.norm(x))).mean(dim=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"scale": 3.0}, "scores that attn"), ({"num_heads": 4}, "scores that attn"), ({}, None)],
)
def test_functions_are_checked_and_protected(options, words):
    model = Base().eval()
    spec = ModelSpec("attn", Base.spec.spans, "qkv", encode=(_encode, _fuse), **options)
    adapted = fasttta.adapt(model, "abpem", spec=spec, k=2, lr=LR)
    inputs = batch()
    kept = [x.clone() for x in inputs]
    if words:
        with pytest.raises(ValueError, match=words):
            adapted(*inputs)
        return
    plain = fasttta.adapt(model, "abpem", spec=Base.spec, k=2, lr=LR)
    for _ in range(3):
        assert same(adapted.step(*inputs), plain.step(*inputs))
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))


def test_a_state_of_another_spec_is_refused(tmp_path):
    model = Base().eval()
    adapted = fasttta.adapt(model, "abpem", spec=Base.spec, k=2)
    adapted(*batch())
    adapted.save(tmp_path)
    for other in (
        ModelSpec("attn", {"a": (0, 3), "b": (3, 7)}, "qkv"),
        ModelSpec("attn", Base.spec.spans, "qkv", encode="ea"),
    ):
        with pytest.raises(ValueError, match="its ModelSpec differ"):
            fasttta.load(model, tmp_path, spec=other)
    fasttta.load(model, tmp_path, spec=Base.spec)


def test_compiled_parts(tiny_model, tiny_batch):
    """A part that is compiled on the object runs the original's weights in a copy, or is undone."""
    model = tiny_model()
    model.blocks_u[0].compile(backend="eager")
    plain = fasttta.adapt(tiny_model(), "read", lr=LR)
    adapted = fasttta.adapt(model, "read", lr=LR)
    assert same(adapted.step(*tiny_batch()), plain.step(*tiny_batch()))
    model = Base().eval()
    model.attn = torch.compile(model.attn, backend="eager")
    with pytest.raises(ValueError, match="forward of attn is replaced on the object"):
        fasttta.adapt(model, "read", spec=Base.spec)


def test_rich_outputs_and_captured_steps():
    adapted = fasttta.adapt(build("three"), "read", spec=Three.spec)
    step = adapted._step
    parts = step.model, step.method, step.state, step.precision, step.device
    adapted._step = GraphStep(*parts, False, capture=False)
    assert adapted.step(*Three.batch(3)).logits.shape == (3, 4)
    with pytest.raises(ValueError, match="returns more; call adapted.step"):
        adapted(*Three.batch(3))


def test_the_cut_is_found_alike_every_time():
    widths = set()
    for _ in range(20):
        adapted = fasttta.adapt(build("joint"), "source", spec=Joint.spec)
        adapted(*Joint.batch(2))
        widths.add(adapted._hidden[1].encode(*Joint.batch(2)).shape[1])
    assert len(widths) == 1

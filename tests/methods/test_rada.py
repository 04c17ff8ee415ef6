"""RAda where golden vectors do not reach: the plain form, memory, episodes."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import same, state_equal
from heads import some_head
from places import SHARED
from torch import nn

import fasttta
import fasttta.commands.inspect
from fasttta.engine.graph import GraphStep
from fasttta.models import FeatureClassifier, RationalHead
from fasttta.ops import flat_attention

DTD = SHARED / "data" / "clip_vitb16_features" / "DescribableTextures"


def data(batch=4, classes=7, dim=12, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (
        3 * torch.randn(batch, dim, generator=generator, dtype=dtype),
        torch.randn(classes, dim, generator=generator, dtype=dtype),
    )


def plain_head(head, image, text, scale):
    """The head as published: every query for every class and image, all scores at once."""
    f, h = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    r = f.unsqueeze(1) * h
    s = scale.detach() * head.scale_multiplier
    b, k, d = r.shape

    def heads(x):
        return x.view(b, k, head.heads, d // head.heads).transpose(1, 2)

    queries = (
        head.q_proj1((s.sqrt() * f).unsqueeze(1).expand(b, k, d)),
        head.q_proj2((s.sqrt() * h).expand(b, k, d)),
        head.q_proj3(s * r),
    )
    keys, values = heads(head.k_proj(s * r)), heads(head.v_proj(s * r))
    total = 0
    for q in queries:
        scores = heads(q) @ keys.transpose(-2, -1) / (d // head.heads) ** 0.5
        flat = (scores.flatten(-2) / head.temperature).softmax(dim=-1)
        total = total + k * flat.view_as(scores) @ values / 3
    mask = (1 + head.out_proj(total.transpose(1, 2).reshape(b, k, d))).relu()
    return scale * (mask * r).sum(-1), mask


@pytest.mark.parametrize("rows", [128, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "scale_multiplier": 4.0}])
def test_against_the_plain_form(options, rows, monkeypatch):
    """Logits, mask and every gradient, whether the classes fill one block of rows or several."""
    monkeypatch.setattr(flat_attention, "ROWS", rows)
    head, (image, text) = some_head(**options), data()
    scale = torch.tensor(9.0, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (image, text, scale)]
    logits, mask = head(*inputs, return_mask=True)
    expected, expected_mask = plain_head(head, *inputs)
    assert torch.allclose(logits, expected, atol=1e-12)
    assert torch.allclose(mask, expected_mask, atol=1e-12)
    assert (mask == 0).any()
    assert (mask > 1.5).any()
    along = torch.randn(logits.shape, dtype=torch.float64)
    of = [*inputs, *head.parameters()]
    gradients = torch.autograd.grad((logits * along).sum() + mask.square().sum(), of)
    grads = torch.autograd.grad((expected * along).sum() + expected_mask.square().sum(), of)
    for x, y in zip(gradients, grads, strict=True):
        assert y.abs().max() > 1e-8
        assert torch.allclose(x, y, rtol=1e-8, atol=1e-10)


def test_no_pair_of_classes_is_stored():
    """What is kept for backward: nothing of K x K, and R once."""
    classes, dim, batch = 300, 64, 2
    head, (image, text) = some_head(dim, 4, dtype=torch.float32), data(batch, classes, dim)
    kept: dict[int, int] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = head(image.float(), text.float(), 20.0)
    assert max(kept.values()) <= batch * classes * dim
    # R; q3, k, v; two flat attentions and their sum; the mask; the classes and their queries; a
    # few numbers a class and head
    assert sum(kept.values()) < (8 + 0.7) * batch * classes * dim + 2 * classes * dim
    logits.sum().backward()


def test_fresh_head_changes_nothing():
    head = RationalHead(12, 3).double()
    image, text = data()
    assert {n: tuple(p.shape) for n, p in head.named_parameters()} == {
        f"{name}.{part}": shape
        for name in ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")
        for part, shape in (("weight", (12, 12)), ("bias", (12,)))
    }
    cosines = nn.functional.cosine_similarity(image.unsqueeze(1), text.unsqueeze(0), dim=-1)
    logits, mask = head(image, text, 100.0, bias=-3.0, return_mask=True)
    assert torch.allclose(logits, 100 * cosines - 3, atol=1e-12)
    assert torch.equal(mask, torch.ones(4, 7, 12, dtype=torch.float64))


def test_properties():
    """Classes and images may come in any order, features in any length."""
    head, (image, text) = some_head(), data()
    logits = head(image, text, 10.0)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert torch.allclose(head(image, text[order], 10.0), logits[:, order], atol=1e-12)
    assert torch.allclose(head(image[[2]], text, 10.0), logits[[2]], atol=1e-12)
    assert torch.allclose(head(5 * image, 0.1 * text, 10.0), logits, atol=1e-12)
    assert (head(image, text[:5], 10.0) - logits[:, :5]).abs().max() > 1e-3  # it sees them all


def test_bad_features():
    head, (image, text) = some_head(), data()
    zero = image.clone()
    zero[2] = 0
    for arguments, error, match in (
        ((image.float(), text, 1.0), TypeError, r"image is torch.float32 .* convert one: image"),
        ((image, text.half(), 1.0), TypeError, "text is torch.float16"),
        ((image[0], text, 1.0), ValueError, r"image must be \[B, D\] with D = 12, found \[12\]"),
        ((image, text[:, :5], 1.0), ValueError, "text must be"),
        ((image[:0], text, 1.0), ValueError, "image must be"),
        (([1], text, 1.0), TypeError, "image must be a tensor"),
        ((image, text[:1], 1.0), ValueError, "text has 1 class, needed at least 2"),
        ((zero, text, 1.0), ValueError, "row 2 of image is zero"),
        ((image, 0 * text, 1.0), ValueError, "row 0 of text is zero"),
        ((image, text, torch.ones(2)), ValueError, "scale must be one number"),
    ):
        with pytest.raises(error, match=match):
            head(*arguments)
    for arguments, match in (
        ((12, 5), "heads=5 does not divide dim=12"),
        ((0,), "dim=0"),
        ((12, 3, 0.0), "temperature=0.0"),
        ((12, 3, 1.0, -1), "scale_multiplier=-1"),
    ):
        with pytest.raises(ValueError, match=match):
            RationalHead(*arguments)


def classifier(dtype=torch.float32, seed=0):
    _, text = data(dtype=dtype)
    return FeatureClassifier(some_head(dtype=dtype, seed=seed), text, 10.0)


def views(seed=0, n=20, dtype=torch.float32):
    return data(n, seed=10 + seed, dtype=dtype)[0]


def mean_entropy(logits):
    """Entropy of the mean prediction."""
    p = logits.softmax(dim=-1).mean(dim=0)
    return -(p * p.log()).sum()


def test_methods_of_bare_features():
    assert fasttta.methods.names("features") == ["source", "rada"]
    model, x = classifier(), views()
    assert torch.equal(fasttta.adapt(model, "source")(x), model(x))


def test_episodes_begin_alike(tmp_path):
    model = classifier()
    adapted = fasttta.adapt(model, "rada", lr=1e-2)
    first = adapted.step(views(0))
    assert first.logits.shape == first.logits_before.shape == (1, 7)
    assert torch.equal(first.logits_before, model(views(0))[:1])
    assert not torch.allclose(first.logits, first.logits_before)
    adapted.step(views(1))
    assert same(adapted.step(views(0)), first)  # whatever came in between
    entropy = fasttta.functional.entropy(model(views(0)))
    assert first.stats["selected"].tolist() == entropy.argsort()[:2].tolist()
    assert int(first.n_used) == 2
    chosen = model(views(0))[first.stats["selected"]]
    expected = mean_entropy(chosen)
    assert torch.allclose(first.losses["entropy"], expected, atol=1e-6)
    adapted.save(tmp_path)
    assert same(fasttta.load(model, tmp_path).step(views(0)), first)
    assert adapted.predict(views(0)).shape == (20, 7)
    with adapted.source():
        assert torch.equal(adapted(views(0)), model(views(0)))
    merged = adapted.unwrap(merge=True)
    assert torch.equal(merged(views(0)), adapted.predict(views(0)))


def test_weights_can_be_given():
    """They are what every later episode begins with; until reset."""
    adapted = fasttta.adapt(classifier(), "rada")
    start = adapted.step(views(0))
    other = classifier(seed=5)
    adapted.load_tuned({n: p.detach() for n, p in other.head.named_parameters()})
    expected = fasttta.adapt(other, "rada").step(views(0))
    for _ in range(2):
        assert same(adapted.step(views(0)), expected)
    assert not torch.equal(expected.logits, start.logits)


def test_gradient_is_that_of_the_selected_views():
    model = classifier(torch.float64)
    x = views(0, dtype=torch.float64)
    result = fasttta.adapt(model, "rada", select=0.25).step(x, trace=True)
    entropy = fasttta.functional.entropy(model(x))
    loss = mean_entropy(model(x)[entropy.argsort()[:5]])
    grads = torch.autograd.grad(loss, list(model.head.parameters()))
    assert torch.allclose(result.losses["entropy"], loss)
    for (name, _), grad in zip(model.head.named_parameters(), grads, strict=True):
        assert torch.allclose(result.grads[name], grad, atol=1e-12), name


def test_selection_stays_over_steps():
    """Several steps on one image: the views that the first chose."""
    model, x = classifier(torch.float64), views(2, dtype=torch.float64)
    result = fasttta.adapt(model, "rada", steps=3, lr=5e-2).step(x)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.head.parameters(), lr=5e-2, weight_decay=0.01)
    chosen = fasttta.functional.entropy(model(x)).argsort()[:2]
    for _ in range(3):
        loss = mean_entropy(twin(x[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(result.logits, twin(x)[:1], atol=1e-9)


def test_of_equal_views_the_first_are_chosen():
    model, x = classifier(), views(0)
    equal = x[:1].repeat(len(x), 1)
    result = fasttta.adapt(model, "rada", select=0.2).step(equal)
    assert result.stats["selected"].tolist() == list(range(int(0.2 * len(x))))
    assert len(result.stats["selected"]) > 1
    # int(select * n), not the nearest integer
    assert len(fasttta.adapt(model, "rada", select=0.29).step(x[:10]).stats["selected"]) == 2


def test_stream_of_samples():
    model = classifier()
    adapted = fasttta.adapt(model, fasttta.methods.RAda.preset("stream"))
    first = adapted.step(views(0))
    assert torch.equal(first.logits, first.logits_before)
    expected = fasttta.functional.entropy(model(views(0))).mean()
    assert torch.allclose(first.losses["entropy"], expected)
    for _ in range(20):
        last = adapted.step(views(0))
    assert last.losses["entropy"] < first.losses["entropy"]  # it goes on learning
    adapted.reset()
    assert same(adapted.step(views(0)), first)


def test_views_in_portions(monkeypatch):
    """Many views of many classes: a few at a time where no gradient is needed."""
    joint = fasttta.adapt(classifier(torch.float64), "rada").step(views(0, dtype=torch.float64))
    monkeypatch.setattr("fasttta.models.rational.models._TOGETHER", 3 * 7 * 12)
    sizes, score = [], FeatureClassifier.scored
    monkeypatch.setattr(
        FeatureClassifier,
        "scored",
        lambda self, x, text: sizes.append(len(x)) or score(self, x, text),
    )
    result = fasttta.adapt(classifier(torch.float64), "rada").step(views(0, dtype=torch.float64))
    assert sizes == [3] * 6 + [2, 2, 1]  # 20 views, the selected ones, the original
    assert torch.allclose(result.logits, joint.logits, atol=1e-12)
    assert torch.equal(result.stats["selected"], joint.stats["selected"])


def test_only_the_last_projection():
    adapted = fasttta.adapt(classifier(), "rada", tune="out", lr=1e-2)
    assert list(adapted.tuned) == ["out_proj.weight", "out_proj.bias"]
    result = adapted.step(views(0), trace=True)
    full = fasttta.adapt(classifier(), "rada", lr=1e-2).step(views(0), trace=True)
    assert torch.equal(result.losses["entropy"], full.losses["entropy"])
    for name, grad in result.grads.items():
        assert torch.allclose(grad, full.grads[name], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"loss": "entropy"}, {"steps": 2, "select": 0.3}])
def test_static_buffers(options):
    eager, graph = (fasttta.adapt(classifier(torch.float64), "rada", **options) for _ in range(2))
    step = graph._step
    graph._step = GraphStep(
        step.model, step.method, step.state, step.precision, step.device, False, capture=False
    )
    for seed, n in enumerate((20, 20, 13, 20, 2)):
        x = views(seed, n, torch.float64)
        a, b = eager.step(x), graph.step(x)
        assert int(a.n_used) == int(b.n_used)
        assert torch.allclose(a.logits, b.logits, atol=1e-10)
        assert torch.allclose(a.losses["entropy"], b.losses["entropy"], atol=1e-12)


def test_bad_calls(tiny_model):
    model = classifier()
    adapted = fasttta.adapt(model, "rada")
    adapted.step(views(0))
    twin = copy.deepcopy(adapted)
    zero, nan = views(0), views(0)
    zero[3], nan[3, 1] = 0, torch.nan
    for x, error, match in (
        (zero, ValueError, "row 3 of image is zero"),
        (nan, ValueError, "features holds non-finite"),
        (views(0)[:, :5], ValueError, "D = 12"),
        (views(0)[:0], ValueError, "image must be"),
        (views(0).int(), TypeError, "floating point"),
        ("x", TypeError, "must be a tensor"),
    ):
        with pytest.raises(error, match=match):
            adapted.step(x)
        assert state_equal(adapted, twin)
    with pytest.raises(TypeError, match="is no fusion model"):
        fasttta.commands.inspect.describe(model)
    for method in ("tent", "abpem", "sar", "brimpr"):
        with pytest.raises(ValueError):  # noqa: PT011
            fasttta.adapt(model, method)
    assert fasttta.adapt(model, "source")(views(0)).shape == (20, 7)
    with pytest.raises(ValueError, match="heads=8 does not divide dim=12"):
        fasttta.adapt(tiny_model(), "rada")
    for options, match in (
        ({"loss": "none"}, "loss='none'"),
        ({"select": 0.0}, "select=0.0"),
        ({"select": 1.5}, "select=1.5: needed a share above 0 and at most 1"),
        ({"tune": "mask"}, "tune='mask'"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ):
        with pytest.raises(ValueError, match=match):
            fasttta.methods.RAda(**options)


@pytest.mark.skipif(not DTD.is_dir(), reason="the CLIP features are not here")
def test_real_features(monkeypatch):
    """24 textures: prototypes of 16 shots, and the head fine-tuned on the same shots."""
    from fasttta.demo import features

    monkeypatch.setattr(features, "adapt", lambda model, *args, **options: lambda x: model(x))
    accuracies = features.run(DTD, seeds=[0], epochs=[2], sizes=[3.0])
    assert accuracies["prototypes"][0] == pytest.approx(70.7, abs=0.2)
    assert accuracies["RAda, 2 epochs"][0] > 72.5
    assert accuracies["prototypes, shift 3.0"][0] < 65

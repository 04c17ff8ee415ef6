"""RAda on whole models: CLIP, from images to logits, and the classifier of a CAV-MAE."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, buffered, differing, same, snapshot
from clips import tiny_clip, tiny_ids, tiny_views
from heads import some_head
from lookalikes import HFCLIP, OpenCLIP

import fasttta
from fasttta.commands import inspect as inspection
from fasttta.engine.step import Step
from fasttta.models import RationalCAVMAE, RationalCLIP

OPTIONS = {"heads": 3, "views": 6, "select": 0.5, "lr": 1e-2}


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def adapt(model, **options):
    return fasttta.adapt(model, "rada", classes=tiny_ids(), **{**OPTIONS, **options})


def images(n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 24, 24, generator=generator)


def trained(adapted, seed=4):
    """Weights far from a fresh head's, set as the start."""
    adapted.load_tuned(dict(some_head(seed=seed, dtype=torch.float32).named_parameters()))
    return adapted


def test_fresh_head_is_zero_shot(clip):
    """Until the first update; and the user's model stays as it was."""
    before = copy.deepcopy(clip.state_dict())
    adapted = adapt(clip)
    zero_shot = copy.deepcopy(clip).set_classes(tiny_ids())(images())
    assert torch.allclose(adapted.predict(images()), zero_shot, atol=1e-5)
    result = adapted.step(images())
    assert torch.allclose(result.logits_before, zero_shot, atol=1e-5)
    assert (result.logits - zero_shot).abs().max() > 1e-3
    with adapted.source():
        assert torch.allclose(adapted(images()), zero_shot, atol=1e-5)
    assert clip.class_features is None
    assert all(torch.equal(x, before[n]) for n, x in clip.state_dict().items())
    assert adapted.unwrap() is clip


def test_views_are_those_of_features(clip):
    """An episode is that of the same views' features under a classifier of class texts."""
    adapted, views = trained(adapt(clip)), tiny_views()
    result = adapted.step(views=views, trace=True)
    model = adapted._hidden[1]
    classifier = fasttta.models.FeatureClassifier(
        some_head(seed=4, dtype=torch.float32), model.text, model.scale
    )
    features = clip.encode_image(views.augmix)
    expected = fasttta.adapt(classifier, "rada", select=0.5, lr=1e-2).step(features, trace=True)
    assert same(result, expected)
    assert result.stats["selected"].shape == (3,)
    for name, grad in expected.grads.items():
        assert torch.equal(result.grads[name], grad)


def test_every_image_is_an_episode(clip, tmp_path):
    adapted = trained(adapt(clip, seed=3))
    one = adapted.step(images()[1])
    adapted.step(images(seed=5))
    assert same(adapted.step(images()[1]), one)  # nothing is carried over
    batch = adapted.step(images(), trace=True)
    assert batch.logits.shape == (3, 6)
    assert batch.stats["selected"].shape == (3, 3)
    assert batch.grads["out_proj.bias"].shape == (3, 12)
    assert torch.equal(batch.logits[[1]], one.logits)
    assert int(batch.n_used) == 9
    listed = adapted.step([torch.rand(3, 30, 41), images()[1]])
    assert torch.equal(listed.logits[[1]], one.logits)
    results = list(adapted.stream([images()[1], tiny_views(), (images()[1],)]))
    assert same(results[0], one)
    assert same(results[2], one)
    adapted.save(tmp_path)
    loaded = fasttta.load(clip, tmp_path)
    assert same(loaded.step(images()[1]), one)
    assert same(copy.deepcopy(loaded).step(images()[1]), one)
    adapted.reset()
    loaded.reset()
    fresh = adapt(clip, seed=3).step(images()[1])
    assert same(adapted.step(images()[1]), fresh)
    assert same(loaded.step(images()[1]), fresh)
    other = tiny_clip(seed=7)
    with pytest.raises(ValueError, match="saved for another model"):
        fasttta.load(other, tmp_path)


def test_stream_of_images(clip):
    """Batches build on each other, and their mean entropy falls."""
    adapted = adapt(clip, loss="entropy", lr=3e-3)
    assert adapted.options.score_at == "before"
    first = adapted.step(images(8))
    entropy = fasttta.functional.entropy(first.logits).mean()
    assert torch.allclose(first.losses["entropy"], entropy)
    for _ in range(10):
        last = adapted.step(images(8))
    assert last.losses["entropy"] < first.losses["entropy"]
    merged = adapted.unwrap(merge=True)
    assert isinstance(merged, RationalCLIP)
    assert torch.allclose(merged(images()), adapted.predict(images()), atol=1e-6)
    # which can be adapted itself, from these weights
    again = fasttta.adapt(merged, "rada", **OPTIONS)
    assert torch.allclose(again.step(images()).logits_before, merged(images()), atol=1e-5)
    assert fasttta.adapt(merged, "source")(images()).shape == (3, 6)
    adapted.reset()
    assert same(adapted.step(images(8)), first)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_precisions(clip, precision):
    result = adapt(clip, precision=precision).step(images(1))
    expected = adapt(clip).step(images(1))
    dtype = torch.float64 if precision == "fp64" else torch.float32
    assert result.logits.dtype == dtype
    atol = 1e-4 if precision == "fp64" else 0.5
    assert torch.allclose(result.logits_before.float(), expected.logits_before, atol=atol)


def test_converted_clips(tmp_path):
    """Other libraries' modules: compared with their own forward, shared, given back."""
    for theirs in (OpenCLIP(), HFCLIP()):
        adapted = adapt(theirs)
        first = adapted.step(images(2))
        assert adapted.unwrap() is theirs
        adapted.save(tmp_path)
        assert same(fasttta.load(theirs, tmp_path).step(images(2)), first)

    class Patched(OpenCLIP):
        def encode_image(self, x):
            return super().encode_image(x).flip(1)

    with pytest.raises(ValueError, match="is something in its forward patched"):
        adapt(Patched()).step(images(1))


@pytest.mark.parametrize("where", ["image", "step"])
def test_a_refused_image_undoes_those_before_it(clip, monkeypatch, where):
    """An episode's state is that of the image stepped last; so these are three different ones."""
    adapted, twin = trained(adapt(clip)), trained(adapt(clip))
    for each in (adapted, twin):
        each.step(images(1, seed=1))
    before = snapshot(adapted)
    other = images(2, seed=2)
    stepped = adapt(clip)
    trained(stepped).step(other[:1])
    assert {name.split(".")[0] for name in differing(before, stepped)} >= {"tuned", "adam"}
    if where == "image":
        with pytest.raises(ValueError, match="image 1: "):
            adapted.step([other[0], 9 * other[1]])
    else:
        run, calls = Step.__call__, []

        def dies(self, *inputs, **options):
            calls.append(inputs)
            if len(calls) == 2:
                running = adapted._state._written()  # the state follows when the step is done
                assert any(not torch.equal(before[name], x) for name, x in running.items())
                raise KeyboardInterrupt
            return run(self, *inputs, **options)

        monkeypatch.setattr(Step, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            adapted.step(other)
        monkeypatch.undo()
    assert differing(before, adapted) == []
    assert same(adapted.step(other), twin.step(other))


def test_several_images_are_as_many_episodes(clip):
    """Logits below each other, losses their mean, samples their sum, the rest with a leading B."""
    adapted = trained(adapt(clip))
    several = adapted.step(images(3), trace=True)
    each = [adapted.step(image, trace=True) for image in images(3)]
    assert torch.equal(several.logits, torch.cat([r.logits for r in each]))
    assert torch.equal(several.logits_before, torch.cat([r.logits_before for r in each]))
    assert int(several.n_used) == sum(int(r.n_used) for r in each) > int(each[0].n_used)
    for name, value in several.losses.items():
        assert torch.allclose(value, torch.stack([r.losses[name] for r in each]).mean()), name
    for group in ("stats", "grads", "trace"):
        for name, value in getattr(several, group).items():
            expected = torch.stack([getattr(r, group)[name] for r in each])
            assert torch.equal(value, expected), name
    assert not torch.equal(each[0].logits, each[1].logits)


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"tune": "out", "lr": 1e-3}])
def test_views_on_static_buffers(clip, options):
    """As captured steps run: one for each image, and another for another number of views."""
    eager, graph = adapt(clip, **options), buffered(adapt(clip, **options))
    for x in (images(1), images(3), images(2, seed=1)[1]):
        assert same(graph.step(x), eager.step(x))
    for n in (6, 3, 6):
        assert same(graph.step(views=tiny_views(n)), eager.step(views=tiny_views(n)))
    assert len(graph._step.plans) == 2
    graph.reset()
    eager.reset()
    assert same(graph.step(images(1), trace=True), eager.step(images(1), trace=True))


def test_bad_images(clip):
    adapted = trained(adapt(clip))
    adapted.step(images(1))
    before = snapshot(adapted)
    for call, error, match in (
        (lambda: adapted.step(), TypeError, "found both or neither"),
        (lambda: adapted.step(images(), views=tiny_views()), TypeError, "found both or neither"),
        (lambda: adapted.step(views=images()), TypeError, "views must be fasttta.data.Views"),
        (lambda: adapted.step([]), ValueError, "images is an empty list"),
        (lambda: adapted.step([images()[0], 9 * images()[1]]), ValueError, "image 1: "),
        (lambda: adapted.step(images()[0, 0]), ValueError, "image 0: "),
        (lambda: adapted.step(views=tiny_views(size=16)), ValueError, "views are 16 pixels"),
        (lambda: adapted.predict("x"), TypeError, "image 0: "),
    ):
        with pytest.raises(error, match=match):
            call()
        assert differing(before, adapted) == []
    stream = adapt(clip, loss="entropy")
    with pytest.raises(TypeError, match='views= are for loss="views"'):
        stream.step(views=tiny_views())
    for options, match in (
        ({"heads": 5}, "heads=5 does not divide dim=12"),
        ({"classes": tiny_ids(1)}, "text has 1 class, needed at least 2"),
        ({"classes": None}, "vision-language models need class names"),
        ({"engine": "graph"}, "graph"),
        ({"views": 0}, "views=0"),
        ({"prompt": " "}, "prompt=' '"),
        ({"guard": fasttta.ShiftDetector()}, "guard: 'rada' begins every image anew"),
    ):
        with pytest.raises(ValueError, match=match):
            fasttta.adapt(clip, "rada", **{"classes": tiny_ids(), **OPTIONS, **options})
    with pytest.raises(ValueError, match="no classes are set"):
        tiny_clip().rational()
    merged = adapted.unwrap(merge=True)
    for method in ("rada", "source"):
        with pytest.raises(ValueError, match="this model has its own"):
            fasttta.adapt(merged, method, classes=tiny_ids())
    with pytest.raises(ValueError, match="temperature=9.0: the model's own head has 1.0"):
        fasttta.adapt(merged, "rada", temperature=9.0)
    assert fasttta.adapt(merged, "rada").options.heads == merged.head.heads
    with pytest.raises(ValueError, match="cache: views are made anew"):
        adapted.stream([images()], cache=object())


def test_inspect_knows_it(clip, tmp_path):
    wide = tiny_clip()  # heads=8 divides 16, not 12
    wide.visual.proj = torch.nn.Parameter(torch.randn(24, 16))
    wide.text_projection = torch.nn.Parameter(torch.randn(20, 16))
    entry = inspection.describe(wide)["methods"]["rada"]
    adapted = fasttta.adapt(wide, "rada", classes=tiny_ids())
    assert entry["names"] == list(adapted.tuned)
    assert entry["tuned"] == 6 * (16 * 16 + 16)
    saved = adapted._saved()
    written = sum(x.nbytes for n, x in saved.items() if n not in ("random", "classes"))
    assert entry["delta_bytes"] == written
    assert wide.class_features is None
    text = inspection.table_clip(inspection.describe(wide))
    assert "1,632" in text
    assert "q_proj1.weight [16, 16]; a head of six" in text


def test_linear_classifier(tiny_model, tiny_batch):
    """A fresh head is the model's classifier; another weighs the terms of its products."""
    model = tiny_model().double()
    batch = tiny_batch(dtype=torch.float64)
    fresh = model.rational(heads=3)
    assert isinstance(fresh, RationalCAVMAE)
    assert torch.allclose(fresh(*batch), model(*batch), atol=1e-12)
    fresh.head.load_state_dict(some_head().state_dict())
    x = fresh.encode(*batch)
    _, mask = fresh.head(x, fresh.text, fresh.scale, return_mask=True)
    linear = model.mlp_head[1]
    expected = (mask * x.unsqueeze(1) * linear.weight).sum(dim=-1) + linear.bias
    assert torch.allclose(fresh(*batch), expected, atol=1e-12)
    assert (expected - model(*batch)).abs().max() > 0.1


def test_audio_visual_stream(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "rada", **METHODS["rada"])
    assert (adapted.options.loss, adapted.options.score_at) == ("entropy", "before")
    results = [adapted.step(*tiny_batch(seed=s % 2)) for s in range(20)]
    assert torch.allclose(results[0].logits, tiny_model()(*tiny_batch(seed=0)), atol=1e-5)
    assert results[18].losses["entropy"] < results[0].losses["entropy"]
    merged = adapted.unwrap(merge=True)
    assert torch.allclose(merged(*tiny_batch()), adapted.predict(*tiny_batch()), atol=1e-6)
    again = fasttta.adapt(merged, "rada")
    assert torch.allclose(again.predict(*tiny_batch()), merged(*tiny_batch()), atol=1e-6)
    # a batch as the views of one clip
    views = fasttta.adapt(tiny_model(), "rada", heads=3, loss="views", select=0.4)
    assert views.step(*tiny_batch()).logits.shape == (1, 7)


def test_features_are_kept(tiny_model, tiny_batch, tmp_path):
    """The cache serves steps with another head: what it depends on is in front of the head."""
    batches = [tiny_batch(seed=s) for s in range(3)]
    plain = [fasttta.adapt(tiny_model(), "rada", **METHODS["rada"])]
    expected = [plain[0].step(*batch) for batch in batches]
    cache = fasttta.data.FeatureCache(tmp_path)
    for seed in (0, 0, 1):
        adapted = fasttta.adapt(tiny_model(), "rada", **METHODS["rada"], seed=seed)
        results = list(adapted.stream(batches, cache=cache))
        for a, b in zip(results, expected, strict=True):
            assert seed or same(a, b)
    encoded = adapted._step.encode
    adapted._step.encode = lambda inputs: pytest.fail("encoded again")
    list(adapted.stream(batches, cache=fasttta.data.FeatureCache(tmp_path)))
    adapted._step.encode = encoded


def test_models_without_class_vectors(tiny_model):
    from fusions import Three, build

    with pytest.raises(ValueError, match="RAda needs class vectors .*found SpecifiedModel"):
        fasttta.adapt(build("three"), "rada", spec=Three.spec)
    with pytest.raises(ValueError, match="heads=8 does not divide dim=12"):
        fasttta.adapt(tiny_model(), "rada")

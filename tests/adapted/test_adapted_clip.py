"""CLIP with methods for single images: calls, independence of images, state, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from clips import (
    METHODS,
    NOISE,
    TUNING,
    adapt,
    image,
    same,
    tiny_clip,
    tiny_ids,
    tiny_views,
)

import fasttta
from fasttta import methods
from fasttta.data import Views
from fasttta.methods.options import option_names


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def model():
    """Nothing may change it."""
    return tiny_clip()


def test_names():
    assert methods.names("vision-language") == [*METHODS, "rada"]  # which test_rada_models has
    assert set(methods.names()) == {*METHODS, *methods.names("fusion")}
    for name in METHODS:
        assert methods.by_name(name).name == name
        assert {"steps", "score_at", "lr"} <= set(option_names(methods.by_name(name)))
    a = methods.ATPT(32, 0.2, 1e-3, 0.02, "a pet photo of a", 5, "paper", "top")
    assert (a.views, a.select, a.lr, a.rollout, a.mask, a.tuned_length) == (
        32, 0.2, 1e-3, "paper", "top", 5,
    )  # fmt: skip
    assert methods.ATPT.preset("code").ensemble == "similarity"
    paper = methods.ATPT.preset("paper")
    assert (paper.rollout, paper.mask, paper.base_view, paper.tv_map) == (
        "paper", "top", "flip", "pixel",
    )  # fmt: skip
    assert methods.TPT(prompt="a satellite-map photo_of a").tuned_length == 5
    assert fasttta.adapt(tiny_clip(), classes=tiny_ids(), views=4, select=0.5).method == "a-tpt"


def test_one_image_a_batch_and_a_list(model, method):
    adapted = adapt(model, method)
    one = adapted.step(image(0))
    assert one.logits.shape == one.logits_before.shape == (1, 6)
    assert torch.equal(adapted(image(0)), one.logits)
    batch = adapted.step(torch.stack([image(0), image(1)]))
    listed = adapted.step([image(0), image(1, 60, 25)])
    assert batch.logits.shape == listed.logits.shape == (2, 6)
    for name, x in one.stats.items():
        assert batch.stats[name].shape == listed.stats[name].shape == (2, *x.shape), name
        assert torch.allclose(batch.stats[name][0].double(), x.double(), **NOISE), name
        assert torch.allclose(listed.stats[name][0].double(), x.double(), **NOISE), name
    for result, used in ((one, 1), (batch, 2), (listed, 2)):
        assert result.n_used.item() == (0 if method == "source" else used)
        assert result.n_used.dtype == torch.int64
        assert all(x.ndim == 0 and x.isfinite() for x in result.losses.values())
    assert adapted.step(torch.stack([image(0)])).logits.shape == (1, 6)
    assert all(x.shape[0] == 1 for x in adapted.step(image(0)[None]).stats.values())


def test_stats(model):
    result = adapt(model, "a-tpt").step(image(0), trace=True)
    shapes = {
        "attention": (8, 3, 3), "region": (8, 24, 24), "selected": (2,), "tv": (8,),
        "weights": (8,), "prompt": (4, 20),
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in result.stats.items()} == shapes
    assert result.stats["region"].dtype == torch.uint8
    assert result.logits.exp().sum().item() == pytest.approx(1, abs=1e-6)
    selected = result.stats["selected"]
    assert (result.stats["weights"] > 0).nonzero()[:, 0].tolist() == sorted(selected.tolist())
    assert torch.equal(result.trace["entropy"].argsort()[:2], selected)
    assert result.grads["prompt"].shape == (4, 20)
    start = adapt(model, "a-tpt").tuned["prompt"]
    moved = (result.stats["prompt"] - start * (1 - 5e-3 * 0.01)).abs()
    assert moved.max().item() == pytest.approx(5e-3, rel=1e-2)  # AdamW's first step
    assert result.grads is not None
    assert adapt(model, "a-tpt").step(image(0)).grads is None


def test_order_and_company_do_not_matter(model, method):
    """The same results bit for bit one after the other, up to float noise together."""
    a, b = image(3), image(4, 50, 28)
    forward, backward = adapt(model, method), adapt(model, method)
    first = [forward.step(a), forward.step(b)]
    second = [backward.step(b), backward.step(a)][::-1]
    for x, y in zip(first, second, strict=True):
        same(x, y)
    together = adapt(model, method).step([a, b])
    logits = torch.cat([x.logits for x in first])
    assert torch.allclose(together.logits, logits, **NOISE)
    assert torch.equal(together.logits.argmax(1), logits.argmax(1))


def test_many_images_are_taken_in_turns(model, method, monkeypatch):
    pictures = [image(i) for i in range(5)]
    together = adapt(model, method).step(pictures, trace=True)
    from fasttta.adapted import images

    monkeypatch.setattr(images, "_VIEWS", 16)
    parts = adapt(model, method).step(pictures, trace=True)
    same(together, parts, **NOISE)
    assert together.trace.keys() == parts.trace.keys()


def test_images_of_every_kind(model):
    from PIL import Image

    adapted = adapt(model, "tpt")
    levels = (image(0) * 255).byte().permute(1, 2, 0)
    kinds = [Image.fromarray(levels.numpy()), levels, levels.permute(2, 0, 1).float() / 255]
    logits = [adapted(kind) for kind in kinds]
    assert torch.allclose(logits[0], logits[1])
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
    assert torch.allclose(adapted(kinds), torch.cat(logits), atol=1e-4)


def test_given_views(model, method):
    """What is made of an image here, given as views."""
    from fasttta.views import make_views

    adapted = adapt(model, method)
    options = adapted.options
    views = make_views(
        image(0), getattr(options, "view_count", 1), generator=torch.Generator().manual_seed(0),
        resolution=24, augment=getattr(options, "augmented", False),
    )  # fmt: skip
    same(adapted.step(image(0)), adapted.step(views=views))
    assert adapted(views=views).shape == (1, 6)
    assert torch.equal(adapted.predict(views=views), adapted.predict(image(0)))


def test_given_regions_replace_attention(model):
    """With regions from outside, attention is computed only where an ensemble needs it."""
    views = tiny_views(8, region=True)
    result = adapt(model, "a-tpt", ensemble="similarity").step(views=views, trace=True)
    assert torch.equal(result.stats["region"], views.region)
    assert "attention" not in result.stats
    assert "tv" in adapt(model, "a-tpt").step(views=views).stats
    share = torch.where(views.region == 2, 0.8, torch.where(views.region == 0, 0.2, 0.0))
    share = torch.where(views.region == 1, views.weight.float()[:, None, None], share)[:, None]
    expected = share * views.base + (1 - share) * views.mix
    assert (result.trace["pixels"][1:] - expected[1:]).abs().max() < 1e-6
    assert torch.equal(result.trace["pixels"][0], views.base[0])


def test_without_augmentation_views_are_encoded_once(model, monkeypatch):
    """The attention pass has their features already; nothing else changes."""
    views = tiny_views(8)
    copied = Views(views.base, views.base.clone(), views.weight)
    alike = Views(views.base, views.base, views.weight)
    for precision in ("fp32", "fp64"):
        adapted = adapt(model, "a-tpt", precision=precision, augment=False)
        expected = adapted.step(views=copied)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "encode_image", None)
            same(adapted.step(views=alike), expected, rtol=0, atol=1e-4)
            assert adapted(image(0)).isfinite().all()


def test_without_augmentation_views_are_plain(model):
    views = tiny_views(8)
    plain = Views(views.base, views.base.clone(), views.weight)
    pixels = adapt(model, "a-tpt").step(views=plain, trace=True).trace["pixels"]
    assert (pixels - plain.base).abs().max() < 2e-7
    unmixed = adapt(model, "a-tpt", high=0.0, low=0.0).step(views=views, trace=True)
    assert torch.allclose(unmixed.trace["pixels"], views.augmix, atol=1e-6)


def test_seed(model):
    a, b, c = (adapt(model, "r-tpt", seed=seed).step(image(0)) for seed in (0, 0, 1))
    same(a, b)
    assert not torch.equal(a.logits, c.logits)
    a, b, c = (adapt(model, "ttc", seed=seed).step(image(0)) for seed in (0, 0, 1))
    same(a, b)
    assert not torch.equal(a.stats["perturbation"], c.stats["perturbation"])


def test_ttc(model):
    eps = 4 / 255
    pixels = torch.stack([image(i, 24, 24) for i in range(3)])
    for threshold in (1e-6, 1e6):
        result = adapt(model, "ttc", threshold=threshold).step(pixels)
        delta = result.stats["perturbation"]
        assert delta.shape == pixels.shape
        assert delta.abs().max() <= eps + 1e-7
        assert (pixels + delta).min() >= -1e-7
        assert (pixels + delta).max() <= 1 + 1e-7
    noise = torch.zeros(1, 3, 24, 24)
    still = adapt(model, "ttc", threshold=1e-6).step(pixels, noise=noise)
    assert not still.stats["perturbation"].any()
    assert torch.allclose(still.logits, still.logits_before)
    with pytest.raises(ValueError, match="noise must be"):
        adapt(model, "ttc").step(pixels, noise=noise[..., :3])
    with pytest.raises(TypeError, match="noise= is for 'ttc', the method is 'tpt'"):
        adapt(model, "tpt").step(pixels, noise=noise)


def test_each_image_has_its_noise(model, monkeypatch):
    """Also where images are computed in several groups."""
    pixels = torch.stack([image(i, 24, 24) for i in range(3)])
    generator = torch.Generator().manual_seed(0)
    noise = (2 * torch.rand(3, 3, 24, 24, generator=generator) - 1) * 4 / 255
    alone = [adapt(model, "ttc").step(x, noise=n[None]) for x, n in zip(pixels, noise, strict=True)]
    expected = torch.stack([r.stats["perturbation"] for r in alone])
    from fasttta.adapted import images

    for together in (256, 2, 1):
        monkeypatch.setattr(images, "_VIEWS", together)
        result = adapt(model, "ttc").step(pixels, noise=noise)
        # float noise decides about the sign of a gradient near 0
        off = (result.stats["perturbation"] - expected).abs() > 1e-6
        assert off.float().mean() < 1e-2
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_score_before(model):
    for name in TUNING:
        result = adapt(model, name, score_at="before").step(image(0))
        after = adapt(model, name).step(image(0))
        assert not torch.equal(result.logits, after.logits)
        assert torch.equal(result.stats["prompt"], after.stats["prompt"])
    anchor = adapt(model, "tpt", score_at="before")(image(0))
    assert torch.allclose(anchor, adapt(model, "source")(image(0)), **NOISE)


def test_several_steps_keep_the_first_selection(model):
    one, three = (adapt(model, "a-tpt", steps=n).step(image(0), trace=True) for n in (1, 3))
    assert torch.equal(one.stats["selected"], three.stats["selected"])
    assert torch.equal(one.grads["prompt"], three.grads["prompt"])
    assert torch.equal(one.losses["total"], three.losses["total"])
    assert not torch.allclose(one.stats["prompt"], three.stats["prompt"])
    together = adapt(model, "a-tpt", steps=3).step([image(1), image(0)])
    assert torch.allclose(together.stats["prompt"][1], three.stats["prompt"], atol=1e-5)


def test_tv_loss(model):
    result = adapt(model, "a-tpt", tv_loss=True).step(image(0), trace=True)
    selected, tv = result.stats["selected"], result.stats["tv"]
    weights = (-tv[selected]).softmax(0)
    expected = (weights * result.trace["entropy"][selected]).sum()
    assert torch.allclose(result.losses["total"], expected, rtol=1e-5)


@pytest.mark.parametrize("rollout", ["code", "paper", "gar"])
def test_resnet(rollout):
    model = tiny_clip(resnet=True)
    adapted = fasttta.adapt(
        model, "a-tpt", classes=tiny_ids(), views=4, select=0.5, rollout=rollout
    )
    result = adapted.step(image(0, 70, 90))
    assert result.stats["attention"].shape == (4, 2, 2)
    assert result.logits.isfinite().all()


def test_state_is_untouched_by_steps(model, method):
    adapted = adapt(model, method)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    before, first = adapted.tuned, adapted.step(image(0))
    adapted.step([image(1), image(2)])
    assert all(torch.equal(x, adapted.tuned[name]) for name, x in before.items())
    assert before.keys() == ({"prompt"} if method in TUNING else set())
    same(adapted.step(image(0)), first)
    adapted.reset()
    same(adapted.step(image(0)), first)
    same(copy.deepcopy(adapted).step(image(0)), first)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in weights.items())
    adapted.train()
    same(adapted.step(image(0)), first)
    with torch.inference_mode():
        same(adapted.step(image(0)), first)
    with torch.no_grad():
        same(adapted.step(image(0)), first)


def test_save_and_load(model, method, tmp_path):
    adapted = adapt(model, method, seed=3)
    if method in TUNING:
        adapted.load_tuned({"prompt": adapted.tuned["prompt"] + 0.1})
    adapted.save(tmp_path)
    again = fasttta.load(model, tmp_path)
    assert again.options == adapted.options
    assert (again.seed, again.precision) == (3, adapted.precision)
    same(again.step(image(0)), adapted.step(image(0)))
    with pytest.raises(ValueError, match="another model"):
        fasttta.load(tiny_clip(seed=7), tmp_path)


def test_a_prompt_to_start_from(model):
    adapted, fresh = adapt(model, "tpt"), adapt(model, "tpt")
    prompt = adapted.tuned["prompt"] + 0.3
    adapted.load_tuned({"prompt": prompt})
    assert torch.equal(adapted.tuned["prompt"], prompt)
    assert not torch.equal(adapted.predict(image(0)), fresh.predict(image(0)))
    with adapted.source():
        assert torch.equal(adapted.predict(image(0)), fresh.predict(image(0)))
        assert torch.equal(adapted(image(0)), fresh.predict(image(0)))
    assert torch.equal(adapted.tuned["prompt"], prompt)
    logits = adapted.predict(image(0))
    assert adapted.unwrap() is model
    merged = adapted.unwrap(merge=True)
    anchor = image(0, 24, 24)[None]
    assert torch.allclose(merged(anchor), adapted.predict(image(0, 24, 24)), atol=1e-5)
    assert model.class_features is None
    adapted.reset()
    assert torch.equal(adapted.predict(image(0)), fresh.predict(image(0)))
    assert not torch.equal(adapted.predict(image(0)), logits)
    for bad, error, match in (
        ({"prompts": prompt}, ValueError, "'prompts' is not tuned; tuned: prompt"),
        ({"prompt": prompt[:2]}, ValueError, r"shape \(2, 20\), needed \(4, 20\)"),
        ({"prompt": prompt * torch.nan}, ValueError, "non-finite"),
        ({"prompt": [1]}, TypeError, "found list"),
    ):
        with pytest.raises(error, match=match):
            adapted.load_tuned(bad)
    with pytest.raises(ValueError, match="nothing by this method"):
        adapt(model, "mta").load_tuned({"prompt": prompt})


def test_stream(model, method):
    adapted = adapt(model, method)
    results = list(adapted.stream([image(0), [image(1), image(2)], (image(0),), tiny_views(8)]))
    assert [len(r.logits) for r in results] == [1, 2, 1, 1]
    same(results[0], results[2])
    same(results[0], adapted.step(image(0)))


def test_predict_is_zero_shot(model, method):
    adapted = adapt(model, method)
    pixels = torch.stack([image(0, 24, 24), image(1, 24, 24)])
    expected = copy.copy(model).set_classes(tiny_ids())(pixels)
    logits = adapted.predict(pixels)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert torch.allclose(adapted.step(pixels).logits_before, expected, atol=1e-4)
    assert isinstance(adapted, fasttta.Adapted)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_precision(model, method, precision):
    # one of the views' masks may flip in bf16: views without masks
    options = {"high": 0.0, "low": 0.0, "ensemble": "mean"} if method == "a-tpt" else {}
    exact = adapt(model, method, **options).step(image(0))
    result = adapt(model, method, precision=precision, **options).step(image(0))
    assert result.logits.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    # MTA's weights and TTC's signs amplify the rounding of bf16
    tolerance = 1e-3 if precision == "fp64" else 5 if method in ("mta", "ttc") else 0.5
    assert (result.logits - exact.logits).abs().max() < tolerance
    if method in TUNING:
        assert result.stats["prompt"].dtype == result.logits.dtype

"""Results do not depend on ``torch.set_default_dtype``, bit for bit."""

from __future__ import annotations

import contextlib

import clips
import pytest
import torch
from cases import METHODS, flat
from fusions import FUSIONS, build

import fasttta
from fasttta import functional as F
from fasttta.data import attack, cavmae_audio, cavmae_frame, fbank
from fasttta.demo import digits
from fasttta.demo.clip import scenes
from fasttta.views import make_views

DEFAULTS = (torch.float64, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def _default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _same_under_all(make):
    """Tensors that ``make`` gives, the same whatever the default is."""
    expected = [x.detach().clone() for x in make()]
    assert expected
    for dtype in DEFAULTS:
        with _default(dtype):
            values = list(make())
        for i, (x, y) in enumerate(zip(values, expected, strict=True)):
            assert x.dtype == y.dtype, (i, dtype)
            assert torch.allclose(x, y, rtol=0, atol=0, equal_nan=True), (i, dtype)


def _all(results):
    for result in results:
        yield from flat(result)
        for group in (result.grads or {}, result.trace or {}):
            yield from (group[name] for name in sorted(group))


def _random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def test_fusion_methods(tiny_model, tiny_batch, method):
    model = tiny_model()

    def make():
        adapted = fasttta.adapt(model, method, **METHODS[method])
        results = [adapted.step(*tiny_batch(seed=i), trace=True) for i in range(2)]
        results += adapted.stream([tiny_batch(seed=i) for i in range(2, 4)], 8)
        yield from _all(results)
        yield adapted.predict(*tiny_batch(seed=5))
        yield from (x for _, x in sorted(adapted.tuned.items()))

    _same_under_all(make)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_specified_models(name):
    model, batch = build(name), FUSIONS[name].batch(4)

    def make():
        for method, options in (("source", {}), ("eata", {}), ("abpem", {"k": 3, "window": 2})):
            adapted = fasttta.adapt(model, method, spec=FUSIONS[name].spec, **options)
            yield from _all([adapted.step(*batch), adapted.step(*batch)])

    _same_under_all(make)


@pytest.mark.parametrize("method", [*clips.METHODS, "rada", "rada stream"])
def test_images(method):
    clip, ids = clips.tiny_clip(), clips.tiny_ids()
    images = [clips.image(0), clips.image(1), (clips.image(2) * 255).byte().permute(1, 2, 0)]

    def make():
        options = clips.METHODS.get(method, {"heads": 2, "views": 6})
        if method == "rada stream":
            options = {"heads": 2, "loss": "entropy"}
        adapted = fasttta.adapt(clip, method.split()[0], classes=ids, **options)
        yield from _all(adapted.step(image, trace=True) for image in images)
        yield adapted.predict(images)

    _same_under_all(make)


def test_statistics(tiny_model, tiny_batch):
    model, batches = tiny_model(), [tiny_batch(seed=i) for i in range(3)]

    def make():
        stats = fasttta.collect_stats(model, batches, n=15)
        for name in ("scores", "scores_per_head", "audio", "video", "joint"):
            yield from getattr(stats, name)
        fisher = fasttta.collect_fisher(model, batches, n=15)
        yield from (fisher[name] for name in sorted(fisher))

    _same_under_all(make)


def test_data():
    wave = _random(2, 4000).clamp(-1, 1) / 2
    image = clips.image(0)
    levels = (image * 255).byte().permute(1, 2, 0)

    def make():
        yield from (fbank(wave, 16000), cavmae_audio(wave, 16000, frames=30))
        yield from (cavmae_frame(image, size=24), cavmae_frame(levels, size=24))
        for pixels in (image, levels):
            for options in ({"augment": True}, {"base_view": "flip"}):
                generator = torch.Generator().manual_seed(3)
                views = make_views(pixels, 5, generator=generator, resolution=24, **options)
                yield from (views.base, views.mix, views.weight, views.augmix)
        attacked = attack.pgd(
            lambda x: x.mean((2, 3)), image[None], "pseudo", steps=2,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        yield from (attacked.pixels, attacked.logits)

    _same_under_all(make)


def test_functional():
    q, k, z, maps = (
        _random(2, 3, 7, 4),
        _random(2, 3, 7, 4, seed=1),
        _random(4, 9),
        _random(5, 6, 6),
    )

    def make():
        for backend in (None, "reference"):
            for heads in ("mean", "each"):
                yield from F.score_moments(q, k, (4, 3), None, heads, backend=backend)
                yield F.attention_bootstrap(q, k, (4, 3), None, heads, backend=backend)
            yield F.entropy(z, backend=backend)
            yield F.principal_entropy(z, 3, backend=backend)
            for form in ("mean", "softmax-sum"):
                yield F.balance_entropy(z, form, backend=backend)
            yield from F.adaptation_head(z, 3, backend=backend)
            yield F.total_variation(maps, backend=backend)
        yield from (F.marginal_entropy(z), F.reliability_weights(F.total_variation(maps)))

    _same_under_all(make)


def test_loaded_models(tiny_model):
    states = {name: x.clone() for name, x in tiny_model().state_dict().items()}

    def make():
        model = fasttta.models.CAVMAE.from_checkpoint(states, num_heads=3)
        yield from model.parameters()
        yield from model.rational(heads=3).parameters()

    _same_under_all(make)


@pytest.mark.parametrize(
    "name", ["gaussian", "fog", "occlusion", "impulse", "blur", "white", "babble", "reverb", "hum"]
)
def test_demo_streams(name):
    _same_under_all(lambda: [x for batch in digits.stream(name, samples=32) for x in batch])


def test_demo_models_and_scenes():
    def make():
        data = digits.load_data()
        yield from (data.images, data.audio)
        yield from digits.load_model().parameters()
        yield from scenes.load_clip().parameters()
        yield from scenes.test_scenes(3, seed=0)

    _same_under_all(make)

"""Hooks, subclasses and patches: what the owner's model computes, or a refusal that names them."""

from __future__ import annotations

import sys

import pytest
import torch
from clips import tiny_clip, tiny_ids, tiny_views
from fusions import FUSIONS, HuggingFaceStyle, Three, build, logits_of
from lookalikes import HFCLIP, OpenCLIP
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from user_modules import CAVMAEFT, user_module

import fasttta
from fasttta.models import CAVMAE


def ramp(x):
    """Something added that no later LayerNorm takes out again."""
    return x + torch.linspace(0, 2, x.shape[-1], dtype=x.dtype)


def louder(_module, _inputs, output):
    return (ramp(output[0]), *output[1:]) if isinstance(output, tuple) else ramp(output)


def shifted(_module, inputs):
    return (ramp(inputs[0]), *inputs[1:])


def scaled(_module, args, kwargs):
    return (ramp(args[0]), *args[1:]), kwargs


def steeper(_module, gradients, _outputs):
    return tuple(3 * g if g is not None else g for g in gradients)


KINDS = {
    "forward": lambda m: m.register_forward_hook(louder),
    "pre": lambda m: m.register_forward_pre_hook(shifted),
    "pre with kwargs": lambda m: m.register_forward_pre_hook(scaled, with_kwargs=True),
    "forward with kwargs": lambda m: m.register_forward_hook(
        lambda m, args, kwargs, out: louder(m, args, out), with_kwargs=True
    ),
}  # fmt: skip
#: model -> layers on the way of the logits: in an encoder, in the fusion, behind it
PLACES = {
    "joint": ("video_norm", "fusion.layers.0.linear1", "fusion.layers.0.norm2", "head"),
    "three": ("audio_encoder.inner", "attn.proj", "head"),
    "hugging-face": ("pixels", "text_encoder.0.mlp.0", "layers.0.output", "classifier"),
    "user": ("blocks_a.0.mlp.fc1", "blocks_u.0.attn.proj", "blocks_u.0.norm1", "mlp_head.1"),
    "own": ("patch_embed_a", "blocks_v.1.norm1", "blocks_u.0.mlp.fc2", "mlp_head.1"),
}
CASES = [(name, place) for name, places in PLACES.items() for place in places]


def made(name, tiny_model):
    if name in FUSIONS:
        return build(name), FUSIONS[name].batch(4), {"spec": FUSIONS[name].spec}
    g = torch.Generator().manual_seed(1)
    batch = torch.randn(4, 6, 8, generator=g), torch.randn(4, 3, 6, 6, generator=g)
    model = tiny_model()
    return (user_module("cav-mae", model, 3) if name == "user" else model), batch, {}


def own_logits(model, batch):
    arguments = (*batch, "multimodal") if isinstance(model, CAVMAEFT) else batch
    with torch.no_grad():
        return logits_of(model(*(x.clone() if torch.is_tensor(x) else x for x in arguments)))


def right_or_refused(adapted, model, batch, words):
    """A step gives the owner's logits, or an error with these words; then nothing is changed."""
    before = {name: x.clone() for name, x in adapted.tuned.items()}
    expected = own_logits(model, batch)
    try:
        logits = adapted.step(*batch).logits_before
    except ValueError as error:
        text = str(error)
    else:
        return torch.allclose(logits, expected, atol=1e-5), ""
    same = all(torch.equal(before[name], x) for name, x in adapted.tuned.items())
    return same and all(word in text for word in words), text


@pytest.mark.parametrize(("name", "place"), CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["read", "tent"])
def test_hooks_registered_before(name, place, kind, method, tiny_model):
    model, batch, options = made(name, tiny_model)
    plain = own_logits(model, batch)
    KINDS[kind](model.get_submodule(place))
    assert not torch.allclose(own_logits(model, batch), plain, atol=1e-4)  # it does change results
    adapted = fasttta.adapt(model, method, **options)
    good, text = right_or_refused(adapted, model, batch, ("Hooks are registered on", place))
    assert good, text


@pytest.mark.parametrize("name", list(PLACES))
def test_hooks_that_look_on(name, tiny_model):
    model, batch, options = made(name, tiny_model)
    seen = []
    for place in PLACES[name]:
        model.get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
        model.get_submodule(place).register_full_backward_hook(lambda *_: seen.append(1))
    plain = fasttta.adapt(made(name, tiny_model)[0], "read", **options)
    adapted = fasttta.adapt(model, "read", **options)
    for _ in range(3):
        assert torch.equal(adapted.step(*batch).logits, plain.step(*batch).logits)
    assert len(seen) <= 2 * len(PLACES[name])  # the comparison on the first batch


@pytest.mark.parametrize("name", list(PLACES))
@pytest.mark.parametrize("method", ["read", "tent", "source"])
def test_backward_hooks(name, method, tiny_model):
    model, batch, options = made(name, tiny_model)
    model.get_submodule(PLACES[name][-1]).register_full_backward_hook(steeper)
    adapted = fasttta.adapt(model, method, **options)
    if method == "source":
        assert torch.isfinite(adapted.step(*batch).logits).all()
        return
    with pytest.raises(ValueError, match="backward hooks change gradients"):
        adapted.step(*batch)


@pytest.mark.parametrize("name", list(PLACES))
def test_global_hooks(name, tiny_model):
    model, batch, options = made(name, tiny_model)
    handle = register_module_forward_hook(
        lambda m, _i, out: ramp(out) if isinstance(m, (nn.LayerNorm, nn.Conv1d)) else None
    )
    try:
        adapted = fasttta.adapt(model, "read", **options)
        good, text = right_or_refused(adapted, model, batch, ("every module (global hooks)",))
    finally:
        handle.remove()
    assert good, text


# -- classes and patches


@pytest.mark.parametrize("name", ["user", "own"])
@pytest.mark.parametrize("place", ["blocks_u.0.attn", "blocks_a.0.norm1", "blocks_u.0.mlp",
                                   "blocks_v.0", "mlp_head.1", ""])  # fmt: skip
@pytest.mark.parametrize("how", ["forward", "__call__"])
def test_subclasses(name, place, how, tiny_model):
    model, batch, options = made(name, tiny_model)
    module = model.get_submodule(place)
    plain = own_logits(model, batch)
    parent = type(module)

    def louder_call(self, *args, **kwargs):
        out = getattr(parent, how)(self, *args, **kwargs)
        return louder(None, None, out)

    module.__class__ = type("Louder", (parent,), {how: louder_call})
    assert not torch.allclose(own_logits(model, batch), plain, atol=1e-4)
    adapted = fasttta.adapt(model, "read", **options)
    good, text = right_or_refused(adapted, model, batch, ("own forward differs",))
    assert good, text


def test_replaced_layers(tiny_model):
    class AlwaysDropout(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=True)

    for replacement in (nn.ReLU(), AlwaysDropout(), nn.Identity()):
        model, batch, _ = made("user", tiny_model)
        model.blocks_u[0].mlp.act = replacement
        with pytest.raises(ValueError, match="its own forward differs"):
            fasttta.adapt(model, "read")(*batch)
    model, batch, _ = made("user", tiny_model)
    expected = own_logits(model, batch)
    model.blocks_u[0].mlp.act = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    model.train()  # dropout is off in what adapts, as in model.eval()
    assert torch.allclose(
        fasttta.adapt(model, "read").step(*batch).logits_before, expected, atol=1e-5
    )


def test_a_patched_forward(tiny_model):
    for name in ("user", "own", "three"):
        model, batch, options = made(name, tiny_model)
        module = model.get_submodule(PLACES[name][1])
        plain = module.forward
        module.forward = lambda *args, plain=plain, **kwargs: 2 * plain(*args, **kwargs)
        with pytest.raises(ValueError, match="is replaced on the object|its own forward|fails"):
            fasttta.adapt(model, "read", **options)(*batch)


def test_wrappers_with_hooks(tiny_model):
    for name in ("own", "three"):
        model, _, options = made(name, tiny_model)
        wrapper = nn.DataParallel(model)
        wrapper.register_forward_hook(louder)
        with pytest.raises(ValueError, match="hooks are registered on the DataParallel"):
            fasttta.adapt(wrapper, "read", **options)

    class Louder(nn.DataParallel):
        def forward(self, *args):
            return 2 * super().forward(*args)

    with pytest.raises(TypeError, match="is not a model that fasttta knows"):
        fasttta.adapt(Louder(tiny_model()), "read")


# -- CLIP


CLIPS = {"hf": HFCLIP, "open": OpenCLIP, "own": tiny_clip}
TOWERS = {
    "hf": ("vision_model.post_layernorm", "text_model.encoder.layers.1.mlp.fc1"),
    "open": ("visual.ln_post", "transformer.resblocks.0.ln_1"),
    "own": ("visual.ln_post", "transformer.resblocks.0.ln_1"),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("tower", [0, 1])
@pytest.mark.parametrize("method", ["tpt", "source", "rada"])
def test_hooks_on_clips(name, tower, method):
    def add(_module, _inputs, output):
        return output + torch.linspace(0, 3, output.shape[-1])

    options = {"views": 6, "select": 0.5} if method == "tpt" else {}
    options |= {"heads": 2, "loss": "entropy"} if method == "rada" else {}
    inputs = {"images": tiny_views().base[:2]}
    model = CLIPS[name]()
    model.get_submodule(TOWERS[name][tower]).register_forward_hook(add)
    adapted = fasttta.adapt(model, method, classes=tiny_ids(), **options)
    for call in (adapted.step, adapted.predict):
        with pytest.raises(ValueError, match="Hooks are registered on .*remove"):
            call(**inputs)
    seen = []
    model = CLIPS[name]()
    model.get_submodule(TOWERS[name][tower]).register_forward_hook(lambda *_: seen.append(1))
    assert fasttta.adapt(model, method, classes=tiny_ids(), **options)(**inputs).isfinite().all()
    assert len(seen) <= 2
    model.get_submodule(TOWERS[name][tower]).register_full_backward_hook(steeper)
    with pytest.raises(ValueError, match="has backward hooks"):
        fasttta.adapt(model, method, classes=tiny_ids(), **options)(**inputs)


# -- hooks that belong to the model


class Recording(Three):
    """Its head reads what hooks recorded: of a method, a closure, a partial function."""

    def __init__(self, how):
        super().__init__()
        self.features, self.once = {}, None
        if how == "method":
            self.audio_encoder.register_forward_hook(self.record)
        elif how == "inside":  # of a module whose result could be kept without calling this one
            self.audio_encoder.inner.register_forward_hook(self.record)
        elif how == "closure":

            def keep(_module, _inputs, output):
                self.features["audio"] = output

            self.audio_encoder.register_forward_hook(keep)
        elif how == "attribute":
            self.audio_encoder.register_forward_hook(lambda _m, _i, out: setattr(self, "once", out))
        self.extra = nn.Linear(12, 4)

    def record(self, _module, _inputs, output):
        self.features["audio"] = output

    def forward(self, audio, video, depth):
        pooled, logits = super().forward(audio, video, depth)
        recorded = self.once if self.once is not None else self.features["audio"]
        return pooled, logits + self.extra(recorded.mean(1))


@pytest.mark.parametrize("how", ["method", "inside", "closure", "attribute"])
@pytest.mark.parametrize("used", [False, True])
def test_hooks_of_the_model_itself(how, used):
    """Recorded by the model for its own forward; an earlier batch left a stale record."""
    torch.manual_seed(0)
    model, batch = Recording(how).eval(), Three.batch(3)
    with torch.no_grad():
        if used:
            model(*Three.batch(1, seed=9))
        expected = Recording.forward(model, *(x.clone() for x in batch))[1]
    adapted = fasttta.adapt(model, "read", spec=Three.spec, lr=1e-2)
    kept = model.once, dict(model.features)
    result = adapted.step(*batch)
    assert torch.allclose(result.logits_before, expected, atol=1e-5)
    assert model.once is kept[0]
    assert model.features.keys() == kept[1].keys()
    assert all(model.features[n] is x for n, x in kept[1].items())


class Capturing(nn.Module):
    """transformers 5: hooks that record are installed on the first call that asks for them."""

    collected: list | None = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = build("hugging-face")
        self.mix = nn.Linear(12, 5)

    def forward(self, ids, pixels):
        if not getattr(self, "_output_capturing_hooks_installed", False):
            for layer in self.inner.layers:
                layer.register_forward_hook(self.capture)
            self._output_capturing_hooks_installed = True
        Capturing.collected = []
        out = self.inner(ids, pixels)
        states, Capturing.collected = Capturing.collected, None
        return {"logits": out.logits + self.mix(torch.stack(states).mean((0, 2))), "states": states}

    @staticmethod
    def capture(_module, _inputs, output):
        if Capturing.collected is not None:
            Capturing.collected.append(output[0])


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("method", ["source", "read", "abpem", "tent"])
def test_captured_outputs(used, method):
    model, batch = Capturing().eval(), HuggingFaceStyle.batch(3)
    if used:
        model(*batch)
    spec = fasttta.ModelSpec("inner.layers.1.attention", HuggingFaceStyle.spec.spans)
    adapted = fasttta.adapt(model, method, spec=spec, **({"k": 2} if method == "abpem" else {}))
    with torch.no_grad():
        expected = model(*batch)
    before = adapted.predict(*batch)
    assert torch.allclose(before["logits"], expected["logits"], atol=1e-5)
    assert len(before["states"]) == 2
    assert all(torch.allclose(a, b, atol=1e-5)
               for a, b in zip(before["states"], expected["states"], strict=True))  # fmt: skip
    adapted.step(*batch)
    with torch.no_grad():
        merged = adapted.unwrap(merge=True)(*batch)
    after = adapted.predict(*batch)
    assert torch.allclose(after["logits"], merged["logits"], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5)
               for a, b in zip(after["states"], merged["states"], strict=True))  # fmt: skip


def test_hidden_states_of_transformers():
    sys.modules.setdefault("torchvision", None)
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.m, self.h = transformers.ViTModel(config), nn.Linear(64, 5)

        def forward(self, pixels):
            states = self.m(pixels, output_hidden_states=True).hidden_states
            return self.h(torch.stack(states).mean(0)[:, 0])

    model, pixels = Weighted().eval(), torch.randn(4, 3, 32, 32)
    expected = model(pixels)
    spec = fasttta.ModelSpec("m.layers.1.attention", {"image": (1, 17)})
    for method in ("source", "read", "tent"):
        adapted = fasttta.adapt(model, method, spec=spec)
        assert torch.allclose(adapted.step(pixels).logits_before, expected, atol=1e-6)


def test_native_classes_are_not_compared(tiny_model, tiny_batch, monkeypatch):
    """A model of fasttta's own without hooks is what runs: no second pass on the first batch."""
    calls, plain = [], CAVMAE.encode
    monkeypatch.setattr(CAVMAE, "encode", lambda s, a, v: calls.append(1) or plain(s, a, v))
    fasttta.adapt(tiny_model(), "read")(*tiny_batch())
    assert calls == [1]

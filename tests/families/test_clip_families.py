"""Other packages' CLIPs: told by structure, converted, checked against their own outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from clips import EOT, tiny_clip, tiny_ids, tiny_views
from lookalikes import HFCLIP, CustomTextCLIP, OpenCLIP
from torch import nn

import fasttta
from fasttta.families import recognise
from fasttta.models.clip.model import MEAN, STD

MAKERS = {
    "hf": HFCLIP,
    "hf4-gelu": lambda: HFCLIP("gelu", version=4, eos=EOT, eps=1e-6),
    "open": OpenCLIP,
    "openai": lambda: OpenCLIP("quick_gelu"),
    "custom": CustomTextCLIP,
}


def own_logits(module, pixels, ids):
    visual = getattr(module, "visual", None)
    mean, std = (
        torch.tensor(getattr(visual, f"image_{what}", default))[:, None, None]
        for what, default in (("mean", MEAN), ("std", STD))
    )
    x, full = ((pixels - mean) / std).to(next(module.parameters()).dtype), F.pad(ids, (0, 2))
    if isinstance(module, HFCLIP):
        image, text = module.get_image_features(x), module.get_text_features(ids)
        image, text = (y if isinstance(y, torch.Tensor) else y.pooler_output for y in (image, text))
    else:
        image, text = module.encode_image(x), module.encode_text(full)
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return module.logit_scale.exp() * image @ text.T


@pytest.mark.parametrize("name", MAKERS)
def test_their_own_outputs(name):
    module, views, ids = MAKERS[name](), tiny_views(), tiny_ids()
    before = {key: x.clone() for key, x in module.state_dict().items()}
    adapted = fasttta.adapt(module, classes=ids, views=6, select=0.5)
    assert adapted.method == "a-tpt"
    result = adapted.step(views=views)
    assert result.logits.isfinite().all()
    expected = own_logits(module, views.base, ids)
    assert (adapted.predict(views=views) - expected[:1]).abs().max() < 1e-5 * expected.abs().max()
    assert (result.logits_before - expected[:1]).abs().max() < 1e-5 * expected.abs().max()
    assert all(torch.equal(x, before[key]) for key, x in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert adapted.unwrap() is module
    merged = adapted.unwrap(merge=True)
    assert torch.allclose(merged(views.base[:1]), expected[:1], atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_are_shared(name):
    module = MAKERS[name]()
    memory = {x.untyped_storage().data_ptr() for x in module.state_dict().values()}
    clip = recognise(module).model
    copied = {
        key for key, x in clip.state_dict().items() if x.untyped_storage().data_ptr() not in memory
    }
    packed = {key for key in clip.state_dict() if ".in_proj_" in key}
    assert copied == (packed if name.startswith("hf") else set())


def test_wrapped():
    module, views = OpenCLIP(), tiny_views()
    plain = fasttta.adapt(module, "tpt", classes=tiny_ids(), views=6, select=0.5)
    expected = plain(views=views)
    wrapped = [nn.DataParallel(module)]
    wrapped.append(torch.compile(module))
    for model in wrapped:
        adapted = fasttta.adapt(model, "tpt", classes=tiny_ids(), views=6, select=0.5)
        assert torch.equal(adapted(views=views), expected)
        assert adapted.unwrap() is model
    adapted_clip = fasttta.adapt(
        nn.DataParallel(tiny_clip()), "tpt", classes=tiny_ids(), views=6, select=0.5
    )
    assert adapted_clip(views=views).isfinite().all()


def test_half_precision():
    module = OpenCLIP("quick_gelu")
    expected = own_logits(module, tiny_views().base[:1], tiny_ids())
    adapted = fasttta.adapt(module.bfloat16(), "source", classes=tiny_ids(), precision="fp32")
    logits = adapted(views=tiny_views())
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 1


def test_save_and_load(tmp_path):
    module, views = HFCLIP(), tiny_views()
    adapted = fasttta.adapt(module, "r-tpt", classes=tiny_ids(), views=6, select=0.5)
    adapted.save(tmp_path)
    assert torch.equal(fasttta.load(module, tmp_path)(views=views), adapted(views=views))
    with pytest.raises(ValueError, match="another model"):
        fasttta.load(HFCLIP(seed=1), tmp_path)


def test_what_computes_otherwise_is_refused():
    """Found on the first image, and again on the next as nothing was learnt from the first."""

    def louder(module, inputs, output):
        return output * 1.5

    class Patched(OpenCLIP):
        def encode_image(self, x):
            return super().encode_image(x.flip(-1))

    class Failing(OpenCLIP):
        def encode_text(self, ids):
            raise RuntimeError("no such thing")

    class Other(OpenCLIP):
        def encode_text(self, ids):
            return super().encode_text(ids.flip(1))

    for model, match in (
        (Patched(), "its own normalised image features differ"),
        (Other(), "its own normalised text features differ"),
        (Failing(), "its own forward fails: no such thing"),
    ):
        adapted = fasttta.adapt(model, "tpt", classes=tiny_ids(), views=6, select=0.5)
        for _ in range(2):
            with pytest.raises(ValueError, match=match):
                adapted(views=tiny_views())
    hooked = OpenCLIP()
    hooked.visual.register_forward_hook(louder)  # hooks stay with the user's module
    assert fasttta.adapt(hooked, "source", classes=tiny_ids())(views=tiny_views()).isfinite().all()


def test_what_cannot_be_converted():
    with_scale = OpenCLIP()
    with_scale.visual.transformer.resblocks[0].ls_1 = nn.Module()
    with_scale.visual.transformer.resblocks[0].ls_1.gamma = nn.Parameter(torch.ones(24))
    relu = OpenCLIP()
    relu.transformer.resblocks[0].mlp.gelu = nn.ReLU()
    unlike = OpenCLIP("gelu")
    for block in unlike.visual.transformer.resblocks:
        block.mlp.gelu = type("QuickGELU", (nn.Module,), {})()
    biased = CustomTextCLIP()
    biased.logit_bias = nn.Parameter(torch.zeros(()))
    pooled = CustomTextCLIP()
    pooled.text.pool_type = "last"
    strange = HFCLIP()
    strange.text_model.encoder.layers[0].extra = nn.Parameter(torch.zeros(2))
    for model, match in (
        (with_scale, "unknown keys: visual.transformer.resblocks.0.ls_1.gamma"),
        (relu, "activations ReLU, gelu"),
        (unlike, "activations gelu, quick_gelu: needed"),
        (biased, "unknown keys: logit_bias"),
        (pooled, "pooled by 'last'"),
        (strange, "unknown keys: text_model.encoder.layers.0.extra"),
    ):
        with pytest.raises(ValueError, match=match):
            fasttta.adapt(model, classes=tiny_ids())


def test_neither_is_anything_else(tiny_model):
    assert recognise(tiny_model()).name == "fasttta.models.CAVMAE"
    for other in (nn.Linear(2, 2), "clip"):
        with pytest.raises(TypeError):
            recognise(other)
    with pytest.raises(TypeError, match="not a model that fasttta knows"):
        fasttta.adapt(nn.Linear(2, 2), classes=None)


def test_deepcopy():
    module, views = HFCLIP(), tiny_views()
    adapted = fasttta.adapt(module, "tpt", classes=tiny_ids(), views=6, select=0.5)
    assert torch.equal(copy.deepcopy(adapted)(views=views), adapted(views=views))


@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 2), ("gelu", EOT)])
def test_transformers(activation, eos):
    """The real CLIPModel, where the package is installed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 3,
            "num_attention_heads": 2, "vocab_size": 100, "max_position_embeddings": 16,
            "hidden_act": activation, "eos_token_id": eos, "bos_token_id": 98,
        },
        vision_config={
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 3, "image_size": 24, "patch_size": 8, "hidden_act": activation,
        },
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.CLIPModel(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    adapted = fasttta.adapt(module, classes=tiny_ids(), views=6, select=0.5)
    views = tiny_views()
    assert adapted(views=views).isfinite().all()
    normalised = adapted._family.model._normalised(views.base[:1])
    expected = module(pixel_values=normalised, input_ids=tiny_ids()).logits_per_image
    assert (adapted.predict(views=views) - expected).abs().max() < 1e-5

"""fasttta.models.CLIP: checkpoints, image towers, attention."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from clips import tiny_clip, tiny_ids, tiny_views
from safetensors.torch import save_file
from torch import nn

from fasttta import functional
from fasttta.methods import view_ensemble
from fasttta.models import CLIP
from fasttta.models.clip import vision_transformer
from fasttta.models.clip.checkpoint import infer_clip_sizes, read_clip_state


def sized(resnet=False):
    """A CLIP of OpenAI's conventions, 64 channels a head, as state dict."""
    vision = {"resolution": 32, "patch": 8, "dim": 128, "depth": 2, "heads": 2, "hidden": 96}
    if resnet:
        vision = {"resolution": 64, "width": 2, "layers": (1, 1, 2, 1), "heads": 1}
    text = {
        "dim": 64, "depth": 1, "heads": 1, "hidden": 70, "context_length": 9, "vocabulary": 100,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIP(10, vision, text)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


class Holder(nn.Module):
    """Tensors by their dotted names and nothing else, for a TorchScript archive."""

    def __init__(self, state):
        super().__init__()
        groups = {}
        for name, x in state.items():
            head, _, rest = name.partition(".")
            if rest:
                groups.setdefault(head, {})[rest] = x
            else:
                self.register_buffer(head, x)
        for head, part in groups.items():
            self.add_module(head, Holder(part))

    def forward(self):
        return 0


@pytest.mark.parametrize("resnet", [False, True])
def test_checkpoints(tmp_path, resnet):
    """A TorchScript archive in half precision with the integers of the published ones, files of
    a state dict, a state dict; names with and without module."""
    model = sized(resnet)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    half = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    extra = {"input_resolution": 32, "context_length": 9, "vocab_size": 100}
    extra = {name: torch.tensor(value) for name, value in extra.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Holder(half | extra)).save(str(tmp_path / "clip.pt"))
    torch.save({"state_dict": {f"module.{n}": x for n, x in state.items()}}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    pixels, ids = torch.rand(2, 3, model.resolution, model.resolution), tiny_ids(3, 2, 9)
    for source, tolerance in (
        (tmp_path / "clip.pt", 5e-2), (str(tmp_path / "a.pth"), 1e-6),
        (tmp_path / "a.safetensors", 1e-6), (state, 1e-6),
    ):  # fmt: skip
        loaded = CLIP.from_checkpoint(source)
        assert not loaded.training
        assert loaded.encode_image(pixels).dtype == torch.float32
        for a, b in (
            (loaded.encode_image(pixels), model.encode_image(pixels)),
            (loaded.encode_text(ids), model.encode_text(ids)),
        ):
            assert (a - b).abs().max() <= tolerance * b.abs().max()
    loaded.positional_embedding.data.zero_()
    assert state["positional_embedding"].any(), "a mapping's tensors are copied"
    wide = {name: x.double() for name, x in state.items() if x.is_floating_point()}
    assert CLIP.from_checkpoint(wide).visual.conv1.weight.dtype == torch.float64


def test_bad_checkpoints(tmp_path):
    state = sized().state_dict()
    text = "a" * 100
    (tmp_path / "broken.pt").write_text(text)
    for changes, match in (
        ({"ln_final.bias": None}, "1 missing keys: ln_final.bias"),
        ({"strange": torch.zeros(1)}, "1 unknown keys: strange"),
        ({"ln_final.bias": torch.zeros(3)}, r"ln_final.bias \(3,\), needed \(64,\)"),
        (
            {"visual.positional_embedding": torch.zeros(8, 128)},
            "8 positions, needed 1 \\+ a square",
        ),
        ({"text_projection": None}, "not a CLIP checkpoint in OpenAI's names: text_projection"),
        ({"ln_final.bias": torch.zeros(64).int()}, "floating point weights, found ln_final.bias"),
        ({"ln_final.bias": "x"}, "named tensors, found ln_final.bias"),
    ):
        changed = {n: x for n, x in {**state, **changes}.items() if x is not None}
        with pytest.raises(ValueError, match=match):
            CLIP.from_checkpoint(changed)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        CLIP.from_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="broken.pt"):
        CLIP.from_checkpoint(tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="needed a state dict"):
        read_clip_state({})
    with pytest.raises(ValueError, match="activation='relu' is unknown"):
        CLIP(4, {}, {}, "relu")
    assert infer_clip_sizes(state)["vision"]["heads"] == 2


@pytest.mark.parametrize("resnet", [False, True])
def test_images(resnet):
    model = tiny_clip(resnet=resnet).double()
    size = model.resolution
    pixels = torch.rand(37, 3, size, size, dtype=torch.float64)  # more than one pass takes
    features = model.encode_image(pixels)
    assert features.shape == (37, 12)
    lone = torch.cat([model.encode_image(x[None]) for x in pixels])
    assert (features - lone).abs().max() < 1e-12
    with pytest.raises(ValueError, match="no classes are set"):
        model(pixels)
    logits = model.set_classes(tiny_ids())(pixels)
    text = F.normalize(model.encode_text(tiny_ids()), dim=-1)
    expected = model.logit_scale.exp() * F.normalize(features, dim=-1) @ text.T
    assert (logits - expected).abs().max() < 1e-11
    few = pixels[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x[:1])[:, :2], few[:1], fast_mode=True)


def test_vision_transformer_is_the_plain_one():
    """Every block on every token, softmax written out."""
    model = tiny_clip().double()
    pixels = torch.rand(2, 3, 24, 24, dtype=torch.float64)
    v, mean, std = model.visual, torch.tensor(model.mean), torch.tensor(model.std)
    x = (pixels - mean[:, None, None].double()) / std[:, None, None].double()
    x = F.conv2d(x, v.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat((v.class_embedding.expand(2, 1, -1), x), 1) + v.positional_embedding
    x = v.ln_pre(x)
    for block in v.transformer.resblocks:
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, value = (y.view(2, 10, 3, 8).transpose(1, 2) for y in qkv.chunk(3, -1))
        y = ((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + block.attn.out_proj(y)
        y = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))
    expected = v.ln_post(x[:, 0]) @ v.proj
    assert (model.encode_image(pixels) - expected).abs().max() < 1e-6  # mean, std in float32 there


def test_bad_pixels():
    model, pixels = tiny_clip(), torch.rand(2, 3, 24, 24)
    nan = pixels.clone()
    nan[1, 0, 3, 3] = torch.nan
    for bad, error, match in (
        (pixels * 4 - 2, ValueError, r"needed \[0, 1\]: it looks like normalised input"),
        (pixels * 255, ValueError, "normalised"),
        (nan, ValueError, "non-finite"),
        (pixels[0], ValueError, r"must be \[N, 3, 24, 24\], found \[3, 24, 24\]"),
        (pixels[..., :20], ValueError, r"found \[2, 3, 24, 20\]"),
        (pixels[:0], ValueError, "found"),
        ((pixels * 255).byte(), TypeError, "floating point"),
        (pixels.to("meta"), ValueError, "on meta, the model on cpu"),
        (None, TypeError, "found NoneType"),
    ):
        with pytest.raises(error, match=match):
            model.encode_image(bad)


def _by_autograd(model, pixels, text, which):
    """The definitions, one view at a time and through all of autograd, in float64."""
    rows = []
    for x in pixels:
        x = model._normalised(x[None])
        v, tokens, probabilities = model.visual, [], []
        t = v.embed(x).requires_grad_()
        for block in v.transformer.resblocks:
            tokens.append(t)
            q, k, value = map(block.attn.split, block.attn.project(block.ln_1(t)))
            p = (q @ k.transpose(-1, -2) * block.attn.scale).softmax(-1)
            probabilities.append(p)
            t = t + block.attn.combine(p @ value)
            t = t + block.mlp(block.ln_2(t))
        f = v.finish(t[:, 0])
        score = (model.logit_scale.exp() * F.normalize(f, dim=-1) @ text.T).max()
        if which == "gar":
            grads = torch.autograd.grad(score, probabilities)
            product = torch.eye(t.shape[1], dtype=t.dtype)
            for p, g in zip(probabilities, grads, strict=True):
                product = (torch.eye(t.shape[1]) + (p * g).clamp_min(0).mean(1)[0]) @ product
            rows.append(product[0, 1:])
            continue
        grads = torch.autograd.grad(score, tokens[-2:])
        layers = []
        for token, g, p in zip(tokens[-2:], grads, probabilities[-2:], strict=True):
            w = (token * g).sum(-1)[0].clamp_min(0)
            w = w / (w.sum() + (1e-8 if which == "code" else 0))
            a = p.mean(1)[0] * w + torch.eye(t.shape[1])
            layers.append(a / (a.sum(1, keepdim=True) + 1e-8) if which == "code" else a)
        mean = (layers[0] + layers[1]) / 2
        if which == "code":
            mean = (0.5 * layers[0] + layers[1]) / (1.5 + 1e-8)
            mean = mean / (mean.sum(1, keepdim=True) + 1e-8)
        rows.append((layers[1] @ mean)[0, 1:])
    return torch.stack(rows)


@pytest.mark.parametrize("which", vision_transformer.ROLLOUTS)
def test_attention_against_autograd(which):
    model = tiny_clip(seed=4).double()
    pixels = tiny_views(19, seed=5, dtype=torch.float64).base
    text = F.normalize(model.encode_text(tiny_ids()), dim=-1)
    maps = model.attention_maps(pixels, text, which)
    expected = _by_autograd(model, pixels, text, which).detach()
    assert (maps.rows - expected).abs().max() < 1e-8
    assert maps.grid.shape == (19, 3, 3)
    assert maps.grid.min() >= 0
    assert maps.grid.max() <= 1
    assert (maps.features - model.encode_image(pixels)).abs().max() < 1e-12
    single = tiny_clip(seed=4)
    in_float32 = single.attention_maps(pixels.float(), text.float(), which)
    assert (in_float32.rows - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not in_float32.rows.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layernorm_closed_form():
    """<x, dS/dx> in float32 against float64: where autograd has digits left at all, it has few."""
    torch.manual_seed(0)
    x, grad, weight = (
        torch.randn(3, 7, 64).double(),
        torch.randn(3, 7, 64).double(),
        torch.randn(64),
    )
    leaf = x.clone().requires_grad_()
    y = F.layer_norm(leaf, (64,), weight.double(), None, 1e-5)
    (expected,) = torch.autograd.grad(y, leaf, grad)
    inner = (x * expected).sum(-1)
    product = vision_transformer.layernorm_inner(x, 1e-5, weight.double(), grad)
    assert (product - inner).abs().max() < 1e-9 * inner.abs().max() + 1e-13
    backward = vision_transformer.layernorm_backward(x, 1e-5, weight.double(), grad)
    assert (backward - expected).abs().max() < 1e-12
    single = vision_transformer.layernorm_inner(x.float(), 1e-5, weight, grad.float())
    assert (single - inner).abs().max() < 1e-5 * inner.abs().max()


def test_grad_cam():
    model = tiny_clip(resnet=True).double()
    pixels = torch.rand(5, 3, 64, 64, dtype=torch.float64)
    text = F.normalize(model.encode_text(tiny_ids()), dim=-1)
    attention = model.attention_maps(pixels, text)
    maps = model.visual.features(model._normalised(pixels)).requires_grad_()
    features = model.visual.attnpool(maps)
    logits = model.logit_scale.exp() * F.normalize(features, dim=-1) @ text.T
    (grad,) = torch.autograd.grad(logits.max(1).values.sum(), maps)
    cam = (grad.mean((2, 3), keepdim=True) * maps).sum(1).clamp_min(0)
    assert (attention.rows - cam.flatten(1)).abs().max() < 1e-12
    assert attention.grid.shape == (5, 2, 2)


def test_attention_errors():
    model = tiny_clip()
    pixels, text = torch.rand(1, 3, 24, 24), F.normalize(torch.randn(3, 12), dim=-1)
    with pytest.raises(ValueError, match="rollout='x' is unknown"):
        model.attention_maps(pixels, text, "x")
    with pytest.raises(ValueError, match="at least two blocks"):
        tiny_clip(vision={"depth": 1}).attention_maps(pixels, text)


def test_even_maps_and_lone_views():
    assert not vision_transformer.normalise_map(torch.ones(2, 9)).any()
    assert view_ensemble.similarity_weights(torch.ones(1, 1, 4), 20, 0.01).item() == 1
    equal = F.normalize(torch.ones(1, 5, 4), dim=-1)
    weights = view_ensemble.similarity_weights(equal, 20, 0.01)
    assert torch.allclose(weights, torch.full((1, 5), 0.2))
    assert functional.entropy(torch.zeros(3, 1)).tolist() == [0, 0, 0]
    assert functional.marginal_entropy(torch.tensor([[[1e4, -1e4]]])).item() == 0


def test_a_view_is_no_neighbour_of_its_own():
    """Also where the product with itself rounds to below 1; a pattern gives the official rule."""
    torch.manual_seed(0)
    features = F.normalize(torch.randn(1, 30, 12), dim=-1)
    exact = features.double()
    similarity = exact @ exact.transpose(1, 2) - 10 * torch.eye(30)
    expected = (similarity.topk(20, -1).values.mean(-1) / 0.01).softmax(-1)
    weights = view_ensemble.similarity_weights(features, 20, 0.01)
    assert (weights - expected).abs().max() < 1e-4
    kept = [i % 3 != 0 for i in range(30)]
    similarity = exact @ exact.transpose(1, 2)
    similarity = similarity.masked_fill(torch.diag(torch.tensor(kept)), -torch.inf)
    expected = (similarity.topk(20, -1).values.mean(-1) / 0.01).softmax(-1)
    weights = view_ensemble.similarity_weights(features, 20, 0.01, kept)
    assert (weights - expected).abs().max() < 1e-4

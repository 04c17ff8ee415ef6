"""Fine-tuning RAda's head, and whole models with it: frozen encoders, and through them."""

from __future__ import annotations

import copy

import pytest
import torch
from clips import tiny_clip, tiny_ids
from torch import nn

import fasttta
from fasttta.models import RationalHead

OPTIONS = {"epochs": 3, "batch": 4, "lr": 3e-3, "encoder_lr": 1e-3}


def task(seed=0, n=40):
    """Noisy features of 7 classes, their labels, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(7, 12, generator=generator)
    labels = torch.arange(n) % 7
    return text[labels] + 0.9 * torch.randn(n, 12, generator=generator), labels, text


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_finetune(optimizer):
    features, labels, text = task()
    torch.manual_seed(0)
    head = RationalHead(12, 3)
    before = copy.deepcopy(head.state_dict())
    lr = {"adam": 5e-3, "sgd": 0.1}[optimizer]
    options = {"scale": 10.0, "batch": 8, "epochs": 6, "optimizer": optimizer, "lr": lr}
    tuned = fasttta.finetune(head, features, labels, text, **options)
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())
    losses = [
        nn.functional.cross_entropy(h(features, text, 10.0), labels).item() for h in (head, tuned)
    ]
    assert losses[1] < 0.9 * losses[0]
    again = fasttta.finetune(head, features, labels, text, **options)
    other = fasttta.finetune(head, features, labels, text, **options, seed=1)
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in tuned.state_dict().items())
    assert not torch.equal(other.out_proj.weight, tuned.out_proj.weight)
    with torch.inference_mode():
        inside = fasttta.finetune(head, features, labels, text, **options)
    assert torch.equal(inside.out_proj.weight, tuned.out_proj.weight)


@pytest.mark.parametrize("penalty", ["mse", "linf"])
def test_penalty_holds_the_mask(penalty):
    features, labels, text = task()
    torch.manual_seed(0)
    head, away = RationalHead(12, 3), []
    for alpha in (0.0, 30.0):
        tuned = fasttta.finetune(head, features, labels, text, scale=10.0, epochs=6, lr=5e-3,
                                 penalty=penalty, alpha=alpha, batch=8)  # fmt: skip
        _, mask = tuned(features, text, 10.0, return_mask=True)
        away.append((mask - 1).square().mean())
    assert away[1] < 0.5 * away[0]


def test_bad_fine_tuning():
    features, labels, text = task()
    head = RationalHead(12, 3)
    for changes, match in (
        ({"optimizer": "lion"}, "optimizer='lion' is unknown; known: 'adam', 'sgd'"),
        ({"penalty": "l1"}, "penalty='l1'"),
        ({"objective": "mse"}, "objective='mse'"),
        ({"lr": 0}, "lr=0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch": 0}, "batch=0"),
        ({"labels": labels[:5]}, r"labels must be a tensor \[40\]"),
        ({"labels": labels + 1}, "labels must lie in 0 to 6"),
        ({"labels": labels.float()}, "labels must be integers"),
        ({"features": features[0]}, "features must be a tensor"),
        ({"features": features * torch.nan}, "the loss is not finite"),
    ):
        arguments = {"features": features, "labels": labels, "text": text, **changes}
        with pytest.raises(ValueError, match=match):
            fasttta.finetune(head, **arguments)
    tuning = fasttta.FineTuning(head, text, scale=10.0)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="labels must lie"):
        tuning.step(features, labels + 1)
    with pytest.raises(ValueError, match="labels are empty"):
        tuning.step(features[:0], labels[:0])
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())


def test_text_is_trained_whatever_the_mode():
    features, labels, text = task()
    head = RationalHead(12, 3)
    raw = nn.Parameter(text.clone())
    tuning = fasttta.FineTuning(head, lambda: 1.0 * raw, scale=10.0, also=[raw], lr=0.1)
    for mode in (torch.no_grad, torch.inference_mode):
        before = raw.detach().clone()
        with mode():
            tuning.step(features, labels)
        assert not torch.equal(raw, before)


def rational_clip(**options):
    return tiny_clip(**options).set_classes(tiny_ids()).rational(heads=3)


def images(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 24, 24, generator=generator), torch.arange(n) % 6


def loss(model, inputs, labels):
    return nn.functional.cross_entropy(model(*inputs), labels).item()


def changed(a, b):
    """Names of parameters that differ."""
    theirs = dict(b.named_parameters())
    return {n for n, p in a.named_parameters() if not torch.equal(p, theirs[n])}


def test_frozen_encoders():
    """The same as on features that were computed before."""
    model, (x, labels) = rational_clip(), images()
    before = copy.deepcopy(model.state_dict())
    tuned = fasttta.finetune(model, x, labels, **OPTIONS)
    head = fasttta.finetune(
        model.head, model.encode(x), labels, model.text, scale=model.scale,
        epochs=3, batch=4, lr=3e-3,
    )  # fmt: skip
    for name, parameter in head.named_parameters():
        assert torch.allclose(tuned.head.get_parameter(name), parameter, atol=1e-5), name
    assert changed(tuned, model) == {f"head.{n}" for n, _ in model.head.named_parameters()}
    mine, theirs = tuned.model.visual.proj, model.model.visual.proj
    assert mine.data_ptr() == theirs.data_ptr()  # one memory,
    assert mine is not theirs  # but flags, gradients and conversions of one's own
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert loss(tuned, (x,), labels) < loss(model, (x,), labels)
    assert not any(p.requires_grad for p in tuned.parameters())


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("resnet", [False, True])
def test_through_the_towers(words, resnet):
    if resnet and words:
        pytest.skip("the text tower is the same")
    model, (x, labels) = rational_clip(resnet=resnet), images()
    x = nn.functional.interpolate(x, (64, 64)) if resnet else x
    before = copy.deepcopy(model.state_dict())
    classes = {"classes": tiny_ids()} if words else {}
    tuned = fasttta.finetune(model, x, labels, encoders=True, **classes, **OPTIONS)
    expected = {n for n, _ in model.named_parameters() if n.startswith(("head.", "model.visual."))}
    if words:
        expected |= {
            n for n, _ in model.named_parameters()
            if n.startswith(("model.transformer.", "model.ln_final.", "model.text_projection"))
        }  # fmt: skip
    assert changed(tuned, model) == expected
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(tuned.text, model.text) == (not words)
    assert loss(tuned, (x,), labels) < 0.9 * loss(model, (x,), labels)
    if words:
        own = copy.deepcopy(tuned.model).set_classes(tiny_ids()).class_features
        assert torch.allclose(own, tuned.text, atol=1e-6)
    # and it adapts
    adapted = fasttta.adapt(tuned, "rada", views=4, select=0.5)
    assert torch.allclose(adapted.step(x[:2]).logits_before, tuned(x[:2]), atol=1e-4)


def test_first_step_is_that_of_autograd():
    """SGD without momentum's history: every tensor moves along its gradient."""
    model, (x, labels) = rational_clip(), images(4)
    model.head.load_state_dict(RationalHead(12, 3).state_dict())
    nn.init.normal_(model.head.out_proj.weight, std=0.3)
    tuned = fasttta.finetune(
        model, x, labels, encoders=True, optimizer="sgd", weight_decay=0.0, epochs=1, batch=4,
        lr=1e-3, encoder_lr=1e-1,
    )  # fmt: skip
    twin = copy.deepcopy(model).requires_grad_(True)
    nn.functional.cross_entropy(twin(x), labels).backward()
    for name, share in (("head.v_proj.weight", 1), ("model.visual.proj", 100),
                        ("model.visual.conv1.weight", 100)):  # fmt: skip
        # the first epoch is at 1e-5
        expected = model.get_parameter(name) - 1e-5 * share * twin.get_parameter(name).grad
        moved = (tuned.get_parameter(name) - model.get_parameter(name)).abs().max()
        off = (tuned.get_parameter(name) - expected).abs().max()
        assert off < 0.02 * moved, name


@pytest.mark.parametrize("encoders", [False, True])
def test_audio_visual(tiny_model, tiny_batch, encoders):
    model, batch = tiny_model().requires_grad_(True).rational(heads=3), tiny_batch(14)
    flags = [p.requires_grad for p in model.parameters()]
    assert any(flags)
    labels = torch.arange(14) % 7
    tuned = fasttta.finetune(model, batch, labels, encoders=encoders, **OPTIONS)
    names = changed(tuned, model)
    assert {n.split(".")[0] for n in names} == ({"head", "model"} if encoders else {"head"})
    if encoders:
        for part in ("patch_embed_a.proj", "blocks_v.1.attn.qkv", "blocks_u.0.norm1", "norm",
                     "mlp_head.0"):  # fmt: skip
            assert f"model.{part}.weight" in names
        assert "model.pos_embed_a" in names
    assert "model.mlp_head.1.weight" not in names
    tuned.double()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    tuned.float()
    assert loss(tuned, batch, labels) < loss(model, batch, labels)


def test_bad_arguments(tiny_model, tiny_batch):
    model, (x, labels) = rational_clip(), images()
    head = RationalHead(12, 3)
    for arguments, options, error, match in (
        ((model, x, labels, model.text), {}, ValueError, "text: RationalCLIP has its own"),
        ((model, x, labels), {"scale": 3.0}, ValueError, "scale: RationalCLIP has its own"),
        ((model, x, labels), {"bias": 1.0, "also": ()}, ValueError, "bias, also: RationalCLIP has"),
        ((model, (x, x), labels), {}, ValueError, r"features must be \(images\), found 2"),
        ((model, 9 * x, labels), {}, ValueError, r"needed \[0, 1\]"),
        ((model, x, labels[:3]), {}, ValueError, r"labels must be a tensor \[12\]"),
        ((model, x, labels + 9), {}, ValueError, "labels must lie in 0 to 5"),
        ((model, x, labels), {"classes": tiny_ids()}, ValueError, "classes: only of a CLIP whose"),
        ((model, x, labels), {"encoders": True, "classes": tiny_ids(3)}, ValueError, "needed 6"),
        ((model, x, labels), {"encoders": True, "encoder_lr": -1}, ValueError, "also_lr=-1"),
        ((head, x, labels), {"encoders": True}, ValueError, "a head alone has none"),
        ((head, x, labels), {}, ValueError, "text=None: a head alone needs class features"),
        ((tiny_clip(), x, labels), {}, TypeError, "model must be a RationalHead or a model with"),
    ):
        with pytest.raises(error, match=match):
            fasttta.finetune(*arguments, **options)
    classifier = fasttta.models.FeatureClassifier(head, model.text)
    with pytest.raises(ValueError, match="its features are given"):
        fasttta.finetune(classifier, model.encode(x), labels, encoders=True)

"""Parametrised, pruned and adapter layers: refused where they are tuned, right where frozen."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from fusions import FUSIONS, HuggingFaceStyle, Joint, Three, build
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from user_modules import Lora

import fasttta


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


WRAPS = {
    "weight_norm": lambda m: parametrizations.weight_norm(m),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m),
    "orthogonal": lambda m: parametrizations.orthogonal(m),
    "custom": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "old weight_norm": lambda m: nn.utils.weight_norm(m),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.3),
}
ADVICE = {
    "weight_norm": "remove_parametrizations",
    "spectral_norm": "remove_parametrizations",
    "orthogonal": "remove_parametrizations",
    "custom": "remove_parametrizations",
    "old weight_norm": "remove_weight_norm",
    "old spectral_norm": "remove_spectral_norm",
    "pruned": r"prune\.remove",
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("method", ["read", "abpem"])
@pytest.mark.parametrize("which", ["query", "value"])
def test_a_wrapped_projection_is_refused_with_advice(name, method, which):
    model = build("hugging-face")
    WRAPS[name](getattr(model.layers[1].attention, which))
    options = {"k": 2} if method == "abpem" else {}
    with pytest.raises(ValueError, match=rf"layers.1.attention.{which}.weight.*{ADVICE[name]}"):
        fasttta.adapt(model, method, spec=HuggingFaceStyle.spec, **options)


def test_packed_projections():
    model = build("three")
    parametrizations.weight_norm(model.attn.qkv)
    with pytest.raises(ValueError, match=r"attn.qkv.weight.*remove_parametrizations"):
        fasttta.adapt(model, "read", spec=Three.spec)
    model = build("joint")
    attention = model.fusion.layers[0].self_attn
    parametrizations.weight_norm(attention, "in_proj_weight")
    with pytest.raises(ValueError, match=r"in_proj_weight.*remove_parametrizations"):
        fasttta.adapt(model, "read", spec=Joint.spec)


def test_a_wrapped_normalisation_is_refused_with_advice():
    model = build("hugging-face")
    parametrize.register_parametrization(model.layers[0].before, "weight", Doubled())
    with pytest.raises(ValueError, match=r"layers.0.before.weight.*remove_parametrizations"):
        fasttta.adapt(model, "tent", spec=HuggingFaceStyle.spec)
    fasttta.adapt(model, "read", spec=HuggingFaceStyle.spec)(*HuggingFaceStyle.batch(3))


def test_the_advice_works():
    model = build("hugging-face")
    query = model.layers[0].attention.query
    parametrizations.weight_norm(query)
    expected = model(*HuggingFaceStyle.batch(3)).logits
    parametrize.remove_parametrizations(query, "weight")
    adapted = fasttta.adapt(model, "read", spec=HuggingFaceStyle.spec)
    assert torch.allclose(
        adapted.step(*HuggingFaceStyle.batch(3)).logits_before, expected, atol=1e-5
    )
    assert len(adapted.tuned) == 12


def own_gradients(model, spec, batch, names, logits):
    """READ's loss and its gradients by plain autograd on a copy of the model's own forward."""
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    leaves = [plain.get_parameter(name).requires_grad_(True) for name in names]
    p = logits(plain(*batch)).softmax(dim=-1)
    top, mass = p.max(dim=-1).values, p.sum(dim=0).softmax(dim=0)
    loss = (-top * top.log()).mean() + (mass * mass.log()).sum()
    return torch.autograd.grad(loss, leaves)


FROZEN = {
    "hugging-face": ["layers.0.output", "layers.1.mlp.0", "text_encoder.0.attention.query",
                     "pixels", "classifier"],
    "three": ["attn.proj", "audio_encoder.inner", "head"],
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("cls", list(FROZEN))
def test_wrapped_frozen_layers_compute_right(name, cls):
    model = build(cls, dtype=torch.float64)
    for path in FROZEN[cls]:
        module = model.get_submodule(path)
        if name != "orthogonal" or isinstance(module, nn.Linear):
            WRAPS[name](module)
    batch = FUSIONS[cls].batch(4, dtype=torch.float64)
    with torch.no_grad():  # spectral norms settle in training mode
        for _ in range(20):
            model.train()(*(x.clone() for x in batch))
    model.eval()
    logits = {"hugging-face": lambda out: out.logits, "three": lambda out: out[1]}[cls]
    with torch.no_grad():
        expected = logits(model(*batch))
    adapted = fasttta.adapt(model, "read", spec=FUSIONS[cls].spec, lr=1e-2)
    result = adapted.step(*batch, trace=True)
    assert torch.allclose(result.logits_before, expected, rtol=1e-9)
    names = [s.parameter.removeprefix("module.") for s in adapted._state.slots.values()]
    leaves = sorted(set(names))
    gradients = dict(zip(leaves, own_gradients(model, None, batch, leaves, logits), strict=True))
    for tuned, slot in adapted._state.slots.items():
        grad = gradients[slot.parameter.removeprefix("module.")]
        grad = grad if slot.rows is None else grad[slice(*slot.rows)]
        assert torch.allclose(result.grads[tuned], grad, rtol=1e-6, atol=1e-12)
    assert not torch.allclose(result.logits, expected, rtol=1e-4)


def test_later_changes_of_a_frozen_weight_norm_do_not_leak():
    """The weight is computed from its parts in the copy, not kept as it was when copied."""
    model = build("three")
    nn.utils.weight_norm(model.head)
    adapted = fasttta.adapt(model, "source", spec=Three.spec, precision="fp64")
    expected = model.double()(*(x.double() for x in Three.batch(3)))[1]
    assert torch.allclose(adapted.step(*Three.batch(3)).logits, expected, atol=1e-5)


# -- adapters of peft


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_adapters_on_tuned_projections(which):
    model = build("hugging-face")
    attention = model.layers[0].attention
    setattr(attention, which, Lora(getattr(attention, which)))
    with pytest.raises(ValueError, match=rf"attention.{which}.*merge_and_unload"):
        fasttta.adapt(model, "read", spec=HuggingFaceStyle.spec)
    fasttta.adapt(model, "tent", spec=HuggingFaceStyle.spec)(*HuggingFaceStyle.batch(3))


def test_adapters_on_the_fusion_of_a_cav_mae(tiny_model):
    model = tiny_model()
    model.blocks_u[0].attn.qkv = Lora(model.blocks_u[0].attn.qkv)
    with pytest.raises(ValueError, match=r"blocks_u.0.attn.qkv.(weight|bias) .*merge_and_unload"):
        fasttta.adapt(model, "read")


def test_peft():
    """The real package, around the whole model, merged and unmerged, with adapters disabled."""
    sys.modules.setdefault("torchvision", None)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value", "output"], r=2)
    batch = HuggingFaceStyle.batch(3)

    def lora():
        wrapped = peft.get_peft_model(build("hugging-face"), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return wrapped.eval()

    wrapped = lora()
    inside = fasttta.ModelSpec(
        [f"base_model.model.layers.{i}.attention" for i in (0, 1)],
        HuggingFaceStyle.spec.spans, HuggingFaceStyle.spec.qkv, "logits",
    )  # fmt: skip
    for model, spec in ((wrapped, inside), (wrapped.base_model.model, HuggingFaceStyle.spec)):
        with pytest.raises(ValueError, match=r"(query|value).(weight|bias).*merge_and_unload"):
            fasttta.adapt(model, "abpem", k=2, spec=spec)
        expected = model(*batch).logits
        tent = fasttta.adapt(model, "tent", spec=spec)
        assert torch.allclose(tent.step(*batch).logits_before, expected, atol=1e-5)
    with wrapped.disable_adapter():
        expected = wrapped(*batch).logits
        source = fasttta.adapt(wrapped, "source", spec=inside)
        assert torch.allclose(source.step(*batch).logits, expected, atol=1e-5)
    expected = wrapped(*batch).logits
    merged = wrapped.merge_and_unload()
    adapted = fasttta.adapt(merged, "abpem", k=2, spec=HuggingFaceStyle.spec)
    assert torch.allclose(adapted.step(*batch).logits_before, expected, atol=1e-5)

"""Recognised models with adapters, parametrisations, compiled parts or another head."""

from __future__ import annotations

import sys

import pytest
import torch
from clips import tiny_ids
from lookalikes import HFCLIP, OpenCLIP
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from user_modules import Lora, user_module

import fasttta


class PeftModel(nn.Module):
    """A wrapper with the model inside, as peft has it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def merge_and_unload(self):
        return self.base_model.model


@pytest.fixture
def user(tiny_model):
    return user_module("cav-mae", tiny_model(), 3)


def test_adapters(user, tiny_batch):
    attention = user.blocks_u[0].attn
    plain = attention.qkv
    attention.qkv = Lora(plain)
    with pytest.raises(ValueError, match=r"blocks_u.0.attn.qkv hold adapters.*merge_and_unload"):
        fasttta.adapt(user, "read")
    attention.qkv = plain
    with pytest.raises(TypeError, match="wrapped by PeftModel.*merge_and_unload"):
        fasttta.adapt(PeftModel(user), "read")
    fasttta.adapt(PeftModel(user).merge_and_unload(), "read")(*tiny_batch())


def test_parametrisations(user, tiny_batch):
    with torch.no_grad():
        expected = user(*tiny_batch(), "multimodal")
    linear = user.blocks_a[0].mlp.fc1
    parametrizations.weight_norm(linear)
    with pytest.raises(ValueError, match=r"blocks_a.0.mlp.fc1.weight.*remove_parametrizations"):
        fasttta.adapt(user, "read")
    parametrize.remove_parametrizations(linear, "weight")
    logits = fasttta.adapt(user, "read").step(*tiny_batch()).logits_before
    assert torch.allclose(logits, expected, atol=1e-5)


def test_compiled_parts(user):
    user.blocks_u[0] = torch.compile(user.blocks_u[0], backend="eager")
    with pytest.raises(ValueError, match=r"blocks_u.0 is compiled on its own.*_orig_mod"):
        fasttta.adapt(user, "read")


def test_another_head(user, tiny_batch):
    user.mlp_head = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5))
    with pytest.raises(ValueError, match=r"another head: mlp_head is Sequential.*ModelSpec\("):
        fasttta.adapt(user, "read")

    class Multimodal(nn.Module):
        """Called with two inputs."""

        def __init__(self):
            super().__init__()
            self.m = user

        def forward(self, a, v):
            return self.m(a, v, "multimodal")

    spec = fasttta.ModelSpec("m.blocks_u.0.attn", {"audio": (0, 6), "video": (6, 10)}, "qkv")
    result = fasttta.adapt(Multimodal(), "abpem", k=3, spec=spec).step(*tiny_batch())
    assert torch.allclose(result.logits_before, user(*tiny_batch(), "multimodal"), atol=1e-5)


@pytest.mark.parametrize("make", [HFCLIP, OpenCLIP])
def test_clips(make):
    model = make()
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    outer, _, leaf = name.rpartition(".")
    plain = model.get_submodule(name)
    setattr(model.get_submodule(outer), leaf, Lora(plain))
    with pytest.raises(ValueError, match="hold adapters.*merge_and_unload"):
        fasttta.adapt(model, "tpt", classes=tiny_ids())
    setattr(model.get_submodule(outer), leaf, plain)
    with pytest.raises(TypeError, match="wrapped by PeftModel.*merge_and_unload"):
        fasttta.adapt(PeftModel(model), "tpt", classes=tiny_ids())
    parametrizations.weight_norm(plain)
    with pytest.raises(ValueError, match=r"is no plain parameter.*remove_parametrizations"):
        fasttta.adapt(model, "source", classes=tiny_ids())


def test_classes_say_what_was_recognised(user):
    with pytest.raises(ValueError, match="recognised as CAV-MAE; models of this family take no"):
        fasttta.adapt(user, "read", classes=["a"])
    with pytest.raises(TypeError, match="Linear is not a model that fasttta"):
        fasttta.adapt(nn.Linear(2, 2), classes=["a"])


def test_peft_on_a_cav_mae(user, tiny_batch):
    sys.modules.setdefault("torchvision", None)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(user, peft.LoraConfig(target_modules=["qkv"], r=2))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    wrapped.eval()
    expected = wrapped(*tiny_batch(), "multimodal")
    for model in (wrapped, user):
        with pytest.raises((TypeError, ValueError), match="merge_and_unload"):
            fasttta.adapt(model, "read")
    adapted = fasttta.adapt(wrapped.merge_and_unload(), "read")
    assert torch.allclose(adapted.step(*tiny_batch()).logits_before, expected, atol=1e-5)

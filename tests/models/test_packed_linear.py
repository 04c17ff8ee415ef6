"""Frozen linear layers in bf16 on processors that multiply it: packed once, to the same numbers."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F

from fasttta.models.blocks import onednn
from fasttta.models.blocks.layers import Linear
from fasttta.ops import processor

pytestmark = pytest.mark.skipif(
    not (processor.bf16_vectors() or processor.bf16_tiles()),
    reason="this processor has neither avx512_bf16 nor AMX",
)


@pytest.fixture
def packings(monkeypatch):
    """The weights that are packed, without that of the trial."""
    assert onednn.packing_works()
    packed, product = [], onednn.onednn_linear

    def linear(x, weight, *rest):
        packed.append(weight.layout)
        return product(x, weight, *rest)

    monkeypatch.setattr(onednn, "onednn_linear", linear)
    return packed


def frozen(inner=24, outer=40, dtype=torch.bfloat16):
    torch.manual_seed(0)
    layer = Linear(inner, outer).to(dtype).requires_grad_(False)
    layer.compute_dtype = torch.bfloat16
    return layer


def test_same_numbers(packings):
    layer, x, add = frozen(), torch.randn(3, 50, 24), torch.randn(3, 50, 40)
    right = F.linear(x.bfloat16(), layer.weight, layer.bias)
    exact = F.linear(x.bfloat16().double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        assert torch.equal(layer(x), right)
        assert torch.equal(layer(x.transpose(0, 1)), right.transpose(0, 1))
        assert torch.equal(layer(x, add=add), add + right)
        active = layer(x, gelu=True)
    assert set(packings) == {torch._mkldnn}
    assert len(packings) == 4
    assert active.dtype == torch.bfloat16  # rounded once, after the GELU
    assert ((active - F.gelu(exact)).abs() <= 2**-8 * F.gelu(exact).abs() + 1e-4).all()


@pytest.mark.parametrize("gelu", [False, True])
def test_same_gradients(packings, gelu):
    layer, x = frozen(), torch.randn(2, 50, 24, dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y = layer(leaves[0], gelu=gelu)
    assert packings == [torch._mkldnn]
    right = F.linear(leaves[1], layer.weight, layer.bias)
    right = F.gelu(right) if gelu else right
    up = torch.randn_like(y)
    assert torch.equal(y, right)
    grads = [torch.autograd.grad(a, b, up)[0] for a, b in zip((y, right), leaves, strict=True)]
    assert torch.equal(*grads)


def test_a_change_of_the_weight_is_seen(packings):
    layer, x = frozen(), torch.randn(64, 24)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        assert torch.equal(layer(x), F.linear(x.bfloat16(), layer.weight, layer.bias))
        layer.weight = torch.nn.Parameter(-layer.weight, requires_grad=False)
        assert torch.equal(layer(x), F.linear(x.bfloat16(), layer.weight, layer.bias))
    assert len(packings) == 3


def test_packed_once_for_all_that_share_the_weight(monkeypatch):
    layer, other, x = frozen(), frozen(), torch.randn(64, 24)
    other.weight = layer.weight
    calls, pack = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda w: calls.append(w) or pack(w)
    )
    with torch.no_grad():
        for each in (layer, other, layer, copy.deepcopy(layer)):
            each(x)
    assert len(calls) == 2


def test_the_packed_weight_goes_with_the_weight():
    layer = frozen()
    before = len(onednn._PACKED)
    with torch.no_grad():
        layer(torch.randn(64, 24))
    assert len(onednn._PACKED) == before + 1
    del layer
    gc.collect()
    assert len(onednn._PACKED) == before


def test_where_nothing_is_packed(packings, monkeypatch):
    x = torch.randn(64, 24)
    few, tuned, other = x[:63], frozen(), frozen()
    tuned.weight.requires_grad_()
    other.compute_dtype = None  # the user's own module in bf16
    with torch.no_grad():
        frozen()(few)
        tuned(x)
        other(x.bfloat16())
        with torch.inference_mode():
            made_there = frozen()
        made_there(x)
        monkeypatch.setattr(processor, "bf16_vectors", lambda: False)
        monkeypatch.setattr(processor, "bf16_tiles", lambda: False)
        frozen()(x)
    assert not packings

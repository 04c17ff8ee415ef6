"""Linear layers without gradients on oneDNN: the numbers of PyTorch, or left to PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttta.models.blocks import onednn
from fasttta.models.blocks.layers import Linear

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no such operations"
)


@pytest.fixture
def called(monkeypatch):
    """The calls of oneDNN's product by layers, without those of the trial."""
    onednn.works()
    calls, product = [], onednn.onednn_linear
    monkeypatch.setattr(onednn, "onednn_linear", lambda *args: calls.append(args) or product(*args))
    return calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("strided", [False, True])
def test_same_numbers(called, mode, strided):
    torch.manual_seed(0)
    layer, x, add = Linear(24, 40), torch.randn(3, 50, 24), torch.randn(3, 50, 40)
    x = x.transpose(0, 1) if strided else x
    add = add.transpose(0, 1) if strided else add
    before = x.clone(), add.clone()
    right = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with mode():
        results = layer(x), layer(x, gelu=True), layer(x, add=add)
    assert len(called) == 3
    for y, exact in zip(results, (right, F.gelu(right), right + add), strict=True):
        assert (y.shape, y.dtype) == (exact.shape, torch.float32)
        assert (y - exact).abs().max() < 2e-6
    assert torch.equal(x, before[0])
    assert torch.equal(add, before[1])


def test_they_work_where_they_exist():
    onednn.works.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert onednn.works()
    finally:
        torch.set_default_dtype(before)


def test_where_they_are_not_used(called):
    layer, x = Linear(24, 40), torch.randn(3, 50, 24)
    layer(x, gelu=True).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer(x[:1, :63])
        layer.double()(x.double(), add=torch.zeros(3, 50, 40).double())
        low = Linear(24, 40)
        low.compute_dtype = torch.bfloat16
        assert low(x, add=torch.zeros(3, 50, 40)).dtype == torch.float32
        strided = Linear(24, 40)
        strided.weight = torch.nn.Parameter(torch.randn(24, 40).T)
        strided(x)
        for bias in (torch.randn(40, 2)[:, 0], torch.randn(1).expand(40)):
            strided = Linear(24, 40)
            strided.bias = torch.nn.Parameter(bias)
            assert torch.equal(strided(x), F.linear(x, strided.weight, bias))
    assert not called


def test_operations_that_fail_are_left_alone(monkeypatch):
    layer, x = Linear(24, 40), torch.randn(3, 50, 24)
    onednn.works.cache_clear()
    calls = []
    monkeypatch.setattr(
        onednn, "onednn_linear", lambda *args, **options: calls.append(args) or torch.zeros(1)
    )
    try:
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    finally:
        onednn.works.cache_clear()
    assert len(calls) == 3  # the trial

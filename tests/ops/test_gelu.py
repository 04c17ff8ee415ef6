"""GELU: its operator against PyTorch's, with a bias and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICE, close
from torch.autograd import gradcheck

from fasttta.ops import gelu as operation
from fasttta.ops.gelu import gelu


@pytest.fixture(autouse=True)
def _on_the_device():
    with DEVICE:
        yield


@pytest.fixture(name="kernels")
def kernels_fixture(monkeypatch):
    """As on a GPU: the operator and its autograd."""
    monkeypatch.setattr(operation, "kernels_serve", lambda x: x.is_contiguous())


def _random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(DEVICE, dtype).requires_grad_()


def test_gradcheck(kernels):
    assert gradcheck(gelu, (_random(2, 3, 4),))
    assert gradcheck(gelu, (_random(2, 3, 4), _random(4, seed=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_pytorch(dtype, kernels):
    x, bias, up = _random(5, 7, dtype=dtype), _random(7, dtype=dtype, seed=1), _random(5, 7, seed=2)
    up = up.detach().to(dtype)
    for args in ((x,), (x, bias)):
        computed, expected = gelu(*args), F.gelu(sum(y.double() for y in args))
        assert computed.dtype == dtype
        assert "_GELU" in type(computed.grad_fn).__name__
        close(computed, expected, dtype, "gelu")
        grads = [torch.autograd.grad(y, args, up.to(y)) for y in (computed, expected)]
        for mine, right in zip(*grads, strict=True):
            close(mine, right, dtype, "gradient")
    assert torch.equal(gelu(x.detach()), gelu(x))


def test_only_what_comes_before_is_kept(kernels):
    x = _random(3, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gelu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_on_a_cpu_it_is_pytorchs():
    x = torch.randn(3, 4, device="cpu", requires_grad=True)
    assert torch.equal(gelu(x), F.gelu(x))
    assert "Gelu" in type(gelu(x).grad_fn).__name__


def test_second_derivatives_are_refused(kernels):
    x = _random(3)
    with pytest.raises(RuntimeError, match="gelu has no second derivative"):
        torch.autograd.grad(gelu(x).sum() + x.square().sum(), x, create_graph=True)


def test_strides(kernels):
    x, up = _random(4, 6), _random(6, 4).T.detach()
    grads = [torch.autograd.grad(f(x), x, up)[0] for f in (gelu, F.gelu)]
    close(*grads, torch.float64, "gradient")
    close(gelu(x.T), F.gelu(x.T), torch.float64, "with gaps")


def test_the_gelu_of_a_product(monkeypatch):
    """Called without a gradient, for a bf16 weight that is frozen and has a bias."""
    monkeypatch.setattr(operation, "kernels_serve", lambda x: x.is_contiguous())
    x, weight, bias = (
        _random(*shape, dtype=torch.bfloat16, seed=seed).detach()
        for seed, shape in enumerate(((2, 3, 8), (5, 8), (5,)))
    )
    assert operation.product_serves(x, weight, bias)
    with torch.enable_grad():
        assert not operation.product_serves(x.requires_grad_(), weight, bias)
    with torch.no_grad():
        assert operation.product_serves(x, weight, bias)
        assert not operation.product_serves(x, weight, None)
        assert not operation.product_serves(x.float(), weight.float(), bias.float())
        assert not operation.product_serves(x, weight.requires_grad_(), bias)
        y = operation.product_gelu(x, weight, bias)
    assert y.shape == (2, 3, 5)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    close(y, expected, torch.bfloat16, "the GELU of a product")


def test_the_tanh_of_float32_sums_is_as_near_as_the_gelu_of_rounded_ones():
    """What cuBLAS computes in the product's pass, against a pass of its own, emulated."""
    x, weight, bias = (
        _random(*shape, dtype=torch.float64, seed=seed).detach().bfloat16()
        for seed, shape in enumerate(((512, 64), (256, 64), (256,)))
    )
    sums = F.linear(x.float(), weight.float() / 24, bias.float() / 3)
    exact = F.gelu(F.linear(x.double(), weight.double() / 24, bias.double() / 3))
    at_once = F.gelu(sums, approximate="tanh").bfloat16()
    apart = F.gelu(sums.bfloat16().float()).bfloat16()
    distance = [(y.double() - exact).square().mean().sqrt().item() for y in (at_once, apart)]
    assert distance[0] <= distance[1]  # 3.5e-3 and 4.0e-3

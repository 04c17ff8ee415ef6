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

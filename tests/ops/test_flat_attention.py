"""RAda's attention: one softmax over all pairs of a head, without a matrix of them."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, close, using

from fasttta import functional as F
from fasttta.ops import flat_attention


def _tensors(classes=5, d=4, batch=3, shared=False, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(classes)
    first = 1 if shared else batch
    return [
        (factor * torch.randn(n, 2, classes, d, generator=generator, dtype=torch.float64))
        .to(DEVICE, dtype)
        .requires_grad_()
        for n, factor in ((first, scale), (batch, 1.0), (batch, 1.0))
    ]


def _with_gradients(tensors, backend, scale=0.7):
    out = F.flat_attention(*tensors, scale, backend=backend)
    along = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return out, *torch.autograd.grad(out, tensors, along.to(out))


# the default's own, and the composite's with one portion of query rows and with several
IMPLEMENTATIONS = [("default", 128), ("composite", 128), ("composite", 2)]


@pytest.mark.parametrize(("implementation", "rows"), IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", [False, True])
def test_against_the_reference(shared, implementation, rows, monkeypatch):
    monkeypatch.setattr(flat_attention, "ROWS", rows)
    backend = using(implementation, monkeypatch)
    tensors = _tensors(shared=shared)
    expected = _with_gradients(tensors, "reference")
    computed = _with_gradients(tensors, backend)
    for x, y in zip(computed, expected, strict=True):
        close(x, y, torch.float64, "flat attention")
    assert torch.autograd.gradcheck(lambda *x: F.flat_attention(*x, 0.7), tensors)


@pytest.mark.parametrize("implementation", ["default", "composite"])
def test_several_kinds_of_queries(implementation, monkeypatch):
    """Their sum and its gradients."""
    using(implementation, monkeypatch)
    (first, k, v), (second, *_) = _tensors(), _tensors(shared=True)
    third = (first.detach() + 1).requires_grad_()
    inputs = [first, second, third, k, v]
    expected = sum(F.flat_attention(q, k, v, 0.7, backend="reference") for q in inputs[:3])
    computed = flat_attention.flat_attentions(inputs[:3], k, v, 0.7)
    along = (
        torch.linspace(-1, 1, computed.numel(), dtype=torch.float64).view(computed.shape).to(DEVICE)
    )
    close(computed, expected, torch.float64, "sum")
    for x, y in zip(
        *(torch.autograd.grad(z, inputs, along) for z in (computed, expected)), strict=True
    ):
        close(x, y, torch.float64, "gradient")


@pytest.mark.parametrize("implementation", ["default", "composite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype, implementation, monkeypatch):
    using(implementation, monkeypatch)
    tensors = _tensors(40, 8, dtype=dtype)
    exact = _with_gradients([x.detach().double().requires_grad_() for x in tensors], "reference")
    for x, y in zip(_with_gradients(tensors, None), exact, strict=True):
        assert x.dtype == dtype
        close(x, y, dtype, "flat attention")


@pytest.mark.parametrize("implementation", ["default", "composite"])
def test_large_scores(implementation, monkeypatch):
    """One pair takes it all; nothing overflows, and sums of rows keep their digits."""
    using(implementation, monkeypatch)
    for dtype, factor, tolerance in ((torch.float64, 900.0, 1e-9), (torch.float32, 100.0, 1e-4)):
        tensors = _tensors(dtype=dtype, scale=factor)
        exact = F.flat_attention(*(x.double() for x in tensors), 1.0, backend="reference")
        computed = F.flat_attention(*tensors, 1.0)
        assert torch.allclose(computed.double(), exact, rtol=tolerance, atol=tolerance)


def test_scale_and_strides():
    q, k, v = _tensors(6, 4)
    computed = F.flat_attention(q, k, v)
    assert torch.allclose(computed, F.flat_attention(q, k, v, 0.5))
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.allclose(F.flat_attention(*apart), computed)


@pytest.mark.parametrize("implementation", ["default", "composite"])
def test_a_nan_is_not_hidden(implementation, monkeypatch):
    using(implementation, monkeypatch)
    q, k, v = (x.detach() for x in _tensors())
    k[1, 0, 2, 1] = torch.nan
    computed = F.flat_attention(q, k, v)
    assert computed[1, 0].isnan().all()
    assert computed[[0, 2]].isfinite().all()
    for x in (q, k, v):
        x.requires_grad_()
    for x in torch.autograd.grad(F.flat_attention(q, k, v).sum(), (q, k, v)):
        assert x[1, 0].isnan().all()
        assert x[[0, 2]].isfinite().all()


def test_errors():
    q, k, v = (x.detach() for x in _tensors())
    for args, kind, message in (
        ((q[0], k, v), ValueError, r"q must be \[batch, heads, tokens, head dim\]"),
        ((q[:2], k, v), ValueError, r"q must be \[3, 2, 5, 4\] like k, or \[1, ...\] where"),
        ((q, k, v[:1]), ValueError, "v and k must have one shape"),
        ((q, k, v.float()), TypeError, "v and k must have one dtype"),
        ((q, k.long(), v), TypeError, "k must be floating point"),
        ((q[:, :, :0], k[:, :, :0], v[:, :, :0]), ValueError, "k needs something in every"),
        ((q, k, v, float("inf")), ValueError, "scale=inf must be finite"),
    ):
        with pytest.raises(kind, match=message):
            F.flat_attention(*args)

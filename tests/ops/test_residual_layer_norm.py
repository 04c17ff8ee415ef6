"""Residual and LayerNorm: derivatives and uses against PyTorch's calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICE, close, composite
from torch.autograd import gradcheck

from fasttta.ops import residual_layer_norm as operation
from fasttta.ops.residual_layer_norm import residual_layer_norm, residual_layer_norm_reference


@pytest.fixture(autouse=True)
def _on_the_device():
    with DEVICE:
        yield


@pytest.fixture(name="fused")
def fused_fixture(monkeypatch):
    """As on a GPU: the operator and its autograd."""
    monkeypatch.setattr(operation, "_has_kernels", lambda *_: True)


def _random(*shape, seed=0, dtype=torch.float64, grad=True):
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(DEVICE, dtype).requires_grad_(grad)


def _inputs(branch=True, affine=True, dtype=torch.float64, kind=None):
    shape = 2, 3, 5
    return (
        _random(*shape, dtype=dtype),
        _random(*shape, seed=1, dtype=kind or dtype) if branch else None,
        *((_random(5, seed=i, dtype=dtype) if affine else None) for i in (2, 3)),
    )


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(branch, affine, fused):
    assert gradcheck(residual_layer_norm, _inputs(branch, affine))


@pytest.mark.parametrize("wanted", range(1, 16))
@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16])
def test_gradients_of_some_inputs(wanted, branch, fused):
    """Whatever part of them is frozen, and whichever of the results is used."""
    inputs = _inputs(dtype=torch.float32, kind=branch)
    leaves = [x.requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(inputs)]
    leaves = [x for x in leaves if x.requires_grad]
    for used in ((True, True), (True, False), (False, True)):
        grads = []
        for f in (residual_layer_norm, residual_layer_norm_reference):
            parts = f(*inputs, 1e-5, torch.bfloat16)
            loss = sum(x.float().pow(3).sum() for x, use in zip(parts, used, strict=True) if use)
            if not loss.requires_grad:
                break
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for mine, right in zip(*grads, strict=True) if len(grads) == 2 else ():
            right = torch.zeros(()) if right is None else right
            mine = torch.zeros_like(right) if mine is None else mine
            assert mine.dtype == right.dtype
            close(mine, right, torch.bfloat16, "gradient")


def test_both_uses_of_a_residual_meet(fused):
    """Without a branch the sum is the residual, and gradients of both uses arrive."""
    x, _, w, b = _inputs(branch=False)
    total, normed = residual_layer_norm(x, None, w, b)
    assert total.data_ptr() == x.data_ptr()
    mine = torch.autograd.grad((total.sin() * normed).sum(), (x, w, b))
    expected = F.layer_norm(x, (5,), w, b)
    right = torch.autograd.grad((x.sin() * expected).sum(), (x, w, b))
    for a, e in zip(mine, right, strict=True):
        close(a, e, torch.float64, "gradient")
    with torch.no_grad():
        assert residual_layer_norm(x, None, w, b)[0] is x


def test_numbers_are_those_of_the_separate_calls():
    """The composite: to the bit, in float32 and where the branch is bfloat16."""
    for kind in (torch.float32, torch.bfloat16):
        inputs = [x.detach() for x in _inputs(dtype=torch.float32, kind=kind)]
        total, normed, _ = composite.residual_layer_norm(*inputs, 1e-5, torch.bfloat16)
        expected = residual_layer_norm_reference(*inputs, 1e-5, torch.bfloat16)
        assert torch.equal(total, expected[0])
        assert torch.equal(normed, expected[1])


def test_on_a_cpu_the_calls_are_pytorchs():
    x = _random(2, 3, dtype=torch.float32).to("cpu")
    if x.device.type == "cpu":
        _, normed = residual_layer_norm(x, x, None, None)
        assert "NativeLayerNorm" in type(normed.grad_fn).__name__


def test_second_derivatives_are_refused(fused):
    x, *others = _inputs()
    total, normed = residual_layer_norm(x, *others)
    with pytest.raises(RuntimeError, match="residual_layer_norm has no second derivative"):
        torch.autograd.grad((total * normed).sum() + x.square().sum(), x, create_graph=True)


def test_empty(fused):
    for shape in ((0, 3), (2, 0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        total, normed = residual_layer_norm(x, x.detach(), None, None)
        assert total.shape == normed.shape == shape
        assert torch.autograd.grad(normed.sum(), x)[0].shape == shape


def test_compiles_in_one_graph():
    """torch.compile sees PyTorch's calls, which it fuses itself."""
    inputs = _inputs(dtype=torch.float32)
    compiled = torch.compile(residual_layer_norm, fullgraph=True, backend="aot_eager")
    for mine, right in zip(compiled(*inputs), residual_layer_norm(*inputs), strict=True):
        assert torch.allclose(mine, right)

"""CLIP's activation in C++ against its formula."""

from __future__ import annotations

import pytest
import torch

from fasttta.ops import native
from fasttta.ops.quick_gelu import quick_gelu

pytestmark = pytest.mark.skipif(not native.load(), reason="no C++ kernels here")
TOLERANCES = {
    torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4,
}  # fmt: skip


def _formula(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4097), (0,), ()])
def test_equals_the_formula(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (6 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    up = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected, computed = _formula(wide), quick_gelu(x)
    assert "_QuickGELU" in type(computed.grad_fn).__name__
    pairs = (
        (computed, expected),
        (
            torch.autograd.grad(computed, x, up)[0],
            torch.autograd.grad(expected, wide, up.double())[0],
        ),
        (quick_gelu(x.detach()), expected),
    )
    for mine, right in pairs:
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        error = (mine.double() - right).abs()
        assert (error <= TOLERANCES[dtype] * right.abs().clamp_min(1)).all()


def test_extremes():
    x = torch.tensor([-torch.inf, -1e30, -200.0, -60.0, 0.0, 200.0, 1e30, torch.inf, torch.nan])
    computed = quick_gelu(x)
    assert torch.equal(
        computed.isnan(), _formula(x).isnan()
    )  # -inf: inf * 0, as the formula has it
    assert torch.allclose(computed[1:-1], _formula(x)[1:-1], atol=1e-37)
    x = x[1:-2].requires_grad_()
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (quick_gelu, _formula)]
    assert torch.allclose(*grads, atol=1e-30)


def test_gradcheck():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick_gelu, x)


def test_strides_and_gradients_of_strides():
    x = torch.randn(4, 6)
    assert torch.allclose(quick_gelu(x.T), _formula(x.T))  # with gaps: PyTorch's calls
    x.requires_grad_()
    up = torch.randn(6, 4).T
    computed, expected = (torch.autograd.grad(f(x), x, up)[0] for f in (quick_gelu, _formula))
    assert torch.allclose(computed, expected, atol=1e-6)


def test_makes_way_where_calls_are_traced_or_transformed():
    x = torch.randn(5)
    assert torch.allclose(
        torch.func.grad(lambda y: quick_gelu(y).sum())(x),
        torch.func.grad(lambda y: _formula(y).sum())(x),
    )
    compiled = torch.compile(quick_gelu, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), _formula(x))


def test_the_kernel_refuses_what_it_cannot_read():
    op, x = torch.ops.fasttta, torch.zeros(3, 4)
    for call, message in (
        (lambda: op.quick_gelu(x.T), "must have no gaps"),
        (lambda: op.quick_gelu(x.long()), "must be float64, float32"),
        (lambda: op.quick_gelu_backward(x[0], x), "grad must be as x"),
        (lambda: op.quick_gelu_backward(x.double(), x), "grad must be as x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()

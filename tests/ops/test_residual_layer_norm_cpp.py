"""The C++ kernels of residual and LayerNorm against PyTorch's calls in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from op_cases import composite

from fasttta.ops import native
from fasttta.ops import residual_layer_norm as operation
from fasttta.ops.registry import ops

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# of results in each type, relative to the largest entry; half types: one rounding
TOLERANCES = {F64: 1e-13, F32: 2e-6, F16: 1e-3, BF16: 5e-3}
SHAPES = [(2, 3, 5), (67, 48), (1, 129, 20), (130, 1), (3, 768)]


@pytest.fixture(autouse=True, scope="module")
def _built():
    if not native.load():
        pytest.skip(f"no C++ kernels: {native.attempt().reason}")


def random(*shape, seed=0, dtype=F32, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=F64) + offset).to(dtype)


def near(mine, right):
    assert mine.shape == right.shape
    if right.numel():
        scale = right.double().abs().max().clamp_min(1e-3)
        assert (mine.double() - right.double()).abs().max() <= TOLERANCES[mine.dtype] * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "types", [(F32, F32, F32), (F32, BF16, BF16), (BF16, BF16, BF16), (F16, F32, F16),
              (F64, F64, F64), (F64, F32, F32)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("affine", [True, False])
def test_forward(shape, types, affine):
    x, y = random(*shape, dtype=types[0], offset=3.0), random(*shape, seed=1, dtype=types[1])
    w, b = (random(shape[-1], seed=i) if affine else None for i in (2, 3))
    for branch in (y, None):
        total, normed, stats = ops.residual_layer_norm(x, branch, w, b, 1e-5, types[2])
        right = composite.residual_layer_norm(
            total.double() if branch is not None else x.double(), None, w, b, 1e-5, F64
        )
        assert normed.dtype == types[2]
        near(normed, right[1])
        near(stats, right[2])
        expected = composite.residual_layer_norm(x, branch, w, b, 1e-5, types[2])
        assert torch.equal(total, expected[0])
        assert [a.dtype for a in (total, stats)] == [a.dtype for a in (expected[0], expected[2])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("types", [(F32, BF16, BF16), (BF16, BF16, BF16), (F64, F64, F32)], ids=str)
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=4)), ids=str)
def test_backward(shape, types, wanted):
    affine, *parts = wanted
    total = random(*shape, dtype=types[0], offset=3.0)
    up, other = random(*shape, seed=1, dtype=types[1]), random(*shape, seed=2, dtype=types[0])
    w = random(shape[-1], seed=3) if affine else None
    *_, stats = ops.residual_layer_norm(total, None, w, w, 1e-5, types[1])
    for grad_total in (other, None):
        args = up, grad_total, total, stats, w, types[2], *parts
        wide = [x if x is None else x.double() for x in args[:5]]
        mine = ops.residual_layer_norm_backward(*args)
        right = composite.residual_layer_norm_backward(*wide, F64, *parts)
        theirs = composite.residual_layer_norm_backward(*args)
        for a, e, t in zip(mine, right, theirs, strict=True):
            assert (a.shape, a.dtype) == (t.shape, t.dtype)
            # the statistics are those of float32
            scale = e.abs().max().clamp_min(1e-3) if e.numel() else 1
            assert (
                not e.numel() or (a - e).abs().max() <= 1e-5 * scale + TOLERANCES[a.dtype] * scale
            )


def test_layouts():
    x = random(1, 1, 33).expand(4, 5, 33)
    y = random(5, 4, 33, seed=1).transpose(0, 1)
    for mine, right in zip(
        ops.residual_layer_norm(x, y, None, None, 1e-5, BF16),
        ops.residual_layer_norm(x.contiguous(), y.contiguous(), None, None, 1e-5, BF16),
        strict=True,
    ):
        assert torch.equal(mine, right)


def test_nan_stays_in_its_row():
    x, y = random(70, 33), random(70, 33, seed=1, dtype=BF16)
    x[3, 4], y[65, 0] = torch.nan, torch.inf
    total, normed, stats = ops.residual_layer_norm(x, y, None, None, 1e-5, BF16)
    bad = torch.zeros(70, dtype=torch.bool)
    bad[[3, 65]] = True
    assert torch.equal(~normed.isfinite().all(-1), bad)
    grad, branch, _ = ops.residual_layer_norm_backward(
        y.nan_to_num(posinf=0), None, total, stats, None, BF16, True, True, False
    )
    for part in (grad, branch):
        assert torch.equal(~part.isfinite().all(-1), bad)


def test_the_same_with_any_number_of_threads():
    x, y, w = random(300, 65), random(300, 65, seed=1, dtype=BF16), random(65, seed=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            total, normed, stats = ops.residual_layer_norm(x, y, w, w, 1e-5, BF16)
            grads = ops.residual_layer_norm_backward(y, x, total, stats, w, BF16, True, True, True)
            results.append((total, normed, stats, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_empty():
    for shape in ((0, 3), (2, 0, 4)):
        x = torch.zeros(shape)
        total, normed, stats = ops.residual_layer_norm(x, x, None, None, 1e-5, BF16)
        assert (total.shape, normed.shape, stats.shape) == (shape, shape, (2, 0))
        grads = ops.residual_layer_norm_backward(x, x, total, stats, None, F32, True, True, True)
        assert [g.shape for g in grads] == [shape, shape, (2, shape[-1])]
        assert not grads[2].any()


@pytest.mark.parametrize(
    ("residual", "product", "fused"),
    [(F32, BF16, True), (F32, F32, False), (F64, BF16, False), (BF16, BF16, False),
     (F32, None, False)],
)  # fmt: skip
def test_serves_between_products_in_bf16(residual, product, fused, monkeypatch):
    """In float32 oneDNN adds the residual as it writes a product, and numbers stay as they are."""
    x, y = random(4, 6, dtype=residual), random(4, 6, seed=1, dtype=product or F32)
    assert operation.fuses(x, product) == fused
    calls, compute = [], ops.residual_layer_norm
    counted = SimpleNamespace(residual_layer_norm=lambda *a: calls.append(a) or compute(*a))
    monkeypatch.setattr(operation, "ops", counted)
    total, normed = operation.residual_layer_norm(x, y, None, None, 1e-5, product)
    assert len(calls) == fused
    right = operation.residual_layer_norm_reference(x, y, None, None, 1e-5, product)
    assert torch.equal(total, right[0])
    near(normed, right[1])
    monkeypatch.setattr(native, "loaded", False)
    monkeypatch.setattr(native, "load", lambda: False)
    assert not operation.fuses(x, product)


def test_refuses_what_does_not_fit():
    x = random(4, 6)
    with pytest.raises(RuntimeError, match="weight must be"):
        ops.residual_layer_norm(x, None, x[0, :5], None, 1e-5, F32)
    with pytest.raises(RuntimeError, match="branch must be"):
        ops.residual_layer_norm(x, x[:3], None, None, 1e-5, F32)

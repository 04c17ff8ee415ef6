"""Flat attention's Triton kernels against the composite."""

from __future__ import annotations

import pytest
import torch
from kernels_here import DEVICE, HALVES, KERNELS, among_nan, check, composite, poisoned  # noqa: F401


def _tensors(batch, heads, classes, d, shared=False, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(classes)
    shapes = (1 if shared else batch, batch, batch)
    q, k, v = (
        torch.randn(n, heads, classes, d, generator=generator).to(DEVICE, dtype) for n in shapes
    )
    return size * q, k, v


def _check(tensors, scale, slack=1.0):
    out, *_ = check("flat_attention", *tensors, scale, slack=slack)
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    saved = composite.flat_attention(*tensors, scale)
    check("flat_attention_backward", grad, *tensors, *saved, scale, slack=slack)


@pytest.mark.parametrize(
    ("batch", "heads", "classes", "d"),
    [(2, 2, 7, 4), (1, 1, 1, 1), (1, 2, 65, 16), (1, 1, 130, 20)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_shapes(batch, heads, classes, d, shared):
    _check(_tensors(batch, heads, classes, d, shared), d**-0.5)


def test_queries_that_the_batch_shares():
    _check(_tensors(3, 2, 40, 8, True), 0.5)


def test_large_scores():
    """Some hundred, as RAda with CoOp has them; sums of a hundred lose digits of exponentials."""
    _check(_tensors(1, 2, 70, 8, size=100.0), 0.7, slack=50.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 40, 12), (1, 1, 70, 20, True)], ids=str)
def test_half_precision(shape, dtype):
    """One tile of classes, and two of them with queries that the batch shares."""
    _check(_tensors(*shape, dtype=dtype), 0.3, slack=2.0)


def test_wide_heads():
    _check(_tensors(1, 1, 40, 128), 128**-0.5)


def test_strided_and_among_nan():
    q, k, v = (among_nan(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in
               _tensors(2, 2, 9, 4))  # fmt: skip
    _check((q, k, v), 0.5)


def test_nan_is_never_hidden():
    for place in range(3):
        tensors = [x.clone() for x in _tensors(2, 1, 9, 4)]
        tensors[place][1, 0, 2, 1] = torch.nan
        out, *_ = KERNELS["flat_attention"](*tensors, 0.5)
        assert out[0].isfinite().all()
        wrong = out[1].isnan()
        assert wrong.all() if place < 2 else wrong.any()


def test_same_bits_twice():
    tensors = _tensors(2, 2, 40, 8, True)
    saved = KERNELS["flat_attention"](*tensors, 0.5)
    grad = torch.randn_like(saved[0])
    for name, args in (
        ("flat_attention", (*tensors, 0.5)),
        ("flat_attention_backward", (grad, *tensors, *saved, 0.5)),
    ):
        runs = [KERNELS[name](*args) for _ in range(2)]
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

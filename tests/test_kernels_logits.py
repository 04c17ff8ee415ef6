"""Kernels on logits against the composite: selection, ties, weights, sizes, extreme values."""

from __future__ import annotations

import kernels_here
import pytest
import torch
from kernels_here import DEVICE, HALVES, KERNELS, among_nan, check, poisoned  # noqa: F401

# rows, classes, k: a single program, one program a row, rows in chunks
SIZES = [(1, 1, 1), (3, 7, 2), (5, 50, 8), (9, 33, 33), (6, 300, 28), (2, 4500, 5)]


def _logits(n, classes, dtype=torch.float32, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    x = 3 * torch.randn(n, classes, generator=generator, device="cpu")
    return among_nan(x.to(DEVICE, dtype))


def _head(logits, k, softmax_sum=False, eps=1e-6, weight=None, weights=(1.0, 0.7)):
    return check("adaptation_head", logits, k, *weights, softmax_sum, eps, weight)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("softmax_sum", [False, True])
def test_head(size, softmax_sum):
    n, classes, k = size
    _head(_logits(n, classes), k, softmax_sum)


@pytest.mark.parametrize("size", [(4, 7, 3), (6, 300, 28)], ids=str)
def test_sample_weights(size):
    n, classes, k = size
    weight = torch.linspace(0, 2, n, device=DEVICE)
    for softmax_sum in (False, True):
        _head(_logits(n, classes), k, softmax_sum, weight=weight)
        check("balance_entropy", _logits(n, classes), softmax_sum, weight)


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_entropies(size):
    n, classes, k = size
    logits = _logits(n, classes)
    upstream = torch.linspace(-1, 2, n, device=DEVICE)
    check("entropy", logits)
    check("entropy_backward", upstream, logits)
    check("principal_entropy", logits, k, 1e-6)
    check("principal_entropy_backward", upstream, logits, k, 1e-6)
    check("balance_entropy", logits, False, None)
    check("balance_entropy", logits, True, None)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype):
    logits = _logits(5, 50, dtype)
    _head(logits, 8)
    upstream = torch.ones(5, device=DEVICE)
    check("principal_entropy_backward", upstream, logits, 8, 1e-6)


@pytest.mark.parametrize("classes", [6, 40, 4500])
def test_ties_go_to_the_lowest_index(classes):
    logits = torch.zeros(3, classes, device=DEVICE)
    logits[1, ::2] = 1
    logits[2, 3] = -0.0
    for k in (1, 2, 4):
        grad = _head(logits, k, weights=(1.0, 0.0))[3]
        # of equal logits, those selected have another gradient than the others
        assert (grad[0, :k] != grad[0, k]).all()


def test_extreme_values():
    logits = _logits(4, 9)
    logits[0, 2] = 3e38
    logits[1] = -3e38
    logits[2, 4] = -torch.inf
    logits[3] *= 1e-30
    _head(logits, 3)
    check("entropy", logits)
    _head(torch.full((2, 5), 88.0, device=DEVICE), 1, softmax_sum=True, eps=0.0)


def test_nan_stays():
    logits = _logits(4, 9)
    logits[2, 5] = torch.nan
    entropy, balance, grad = (KERNELS["adaptation_head"](logits, 3, 1.0, 1.0, False, 1e-6, None))[
        1:
    ]
    assert torch.isnan(entropy)
    assert torch.isnan(balance)
    assert torch.isnan(grad[2]).any()
    assert torch.isnan(check("entropy", logits)[0][2])


def test_the_same_bits_again():
    logits = _logits(6, 300)
    first = _head(logits, 28)
    again = KERNELS["adaptation_head"](logits, 28, 1.0, 0.7, False, 1e-6, None)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_uses_the_interpreter_or_a_gpu():
    assert torch.cuda.is_available() == kernels_here.NATIVE

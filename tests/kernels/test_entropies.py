"""Kernels of entropies against the default: sizes, ties, extremes, rows whole or in chunks."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import chunked_fixture, logits  # noqa: F401
from kernels_here import DEVICE, HALVES, KERNELS, check, poisoned  # noqa: F401


@pytest.mark.parametrize("kind", ["ties", "masked"])
def test_principal_entropy(kind, chunked):
    z = logits(2, 150, kind)
    upstream = torch.tensor([0.5, -1.0], device=DEVICE)
    for k, eps in ((1, 0.0), (8, 1e-6), (150, 0.0)):
        check("principal_entropy", z, k, eps)
        check("principal_entropy_backward", upstream, z, k, eps)
    check("entropy", z)
    check("entropy_backward", upstream, z)
    check("entropy_backward", upstream[:1].expand(2), z.T.contiguous().T)


def test_ties_go_to_the_lowest_index(chunked):
    z = torch.zeros(1, 200, device=DEVICE)
    z[0, [7, 127, 128, 199]] = 1.0
    (grad,) = check("principal_entropy_backward", torch.ones(1, device=DEVICE), z, 3, 1e-6)
    assert grad[0, 7] == grad[0, 127] == grad[0, 128] != grad[0, 199]
    z[0, 8] = -0.0
    check("principal_entropy_backward", torch.ones(1, device=DEVICE), z, 20, 1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype, chunked):
    """Keys of fewer bits select the same; rounded logits tie."""
    z = logits(2, 300, dtype=dtype)
    z[:, 100:200] = z[:, :100]
    check("principal_entropy", z, 29, 1e-6)
    (grad,) = check("principal_entropy_backward", torch.ones(2, device=DEVICE), z, 29, 1e-6)
    assert grad.dtype == dtype


def test_more_than_1023_classes():
    """Counts no longer fit into ten bits; and a row ends within the second chunk."""
    check("principal_entropy", logits(1, 1100, "ties"), 1099, 1e-6)
    check("principal_entropy_backward", torch.ones(1, device=DEVICE), logits(1, 5000), 450, 1e-6)


def test_nan_is_never_hidden(chunked):
    z = logits(3, 6).clone()
    z[1, 2] = torch.nan
    for k in (3, 6):
        entropy = KERNELS["principal_entropy"](z, k, 1e-6)
        assert torch.isnan(entropy).tolist() == [False, True, False]
    rows = logits(2, 6).clone()
    rows[0] = -torch.inf
    assert torch.isnan(KERNELS["entropy"](rows)).tolist() == [True, False]


def test_same_bits_twice(chunked):
    z, upstream = logits(3, 150, "ties"), torch.ones(3, device=DEVICE)
    runs = [KERNELS["principal_entropy_backward"](upstream, z, 9, 1e-6) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("case", ["logit_c50", "logit_c309"])
def test_goldens(golden, case):
    g = golden.load("kernels")
    z = g[f"{case}.logits"].to(DEVICE)
    upstream = torch.full((len(z),), 1 / len(z), device=DEVICE)
    value, grad = KERNELS["entropy"](z).mean(), KERNELS["entropy_backward"](upstream, z)
    expected, slope = g[f"{case}.tent_entropy"], g[f"{case}.tent_entropy.grad"]
    assert abs(value.item() - expected) < 2e-6 * abs(expected)
    assert (grad.cpu() - slope).abs().max() < 4e-6 * slope.abs().max() + 1e-8

"""Kernels of the adaptation head against the default: sizes, ties, extremes, rows in chunks."""

from __future__ import annotations

import pytest
import torch
from fasttta.kernels import adaptation_head_plan
from kernel_cases import chunked_fixture, logits  # noqa: F401
from kernels_here import DEVICE, HALVES, KERNELS, NATIVE, check, poisoned  # noqa: F401

# every kind of row at a length of several chunks, fewer of the short ones
CASES = [
    ((2, 309), "random"), ((2, 309), "ties"), ((2, 309), "extreme"), ((2, 309), "equal"),
    ((3, 50), "random"), ((3, 50), "ties"), ((1, 2), "random"), ((1, 2), "equal"),
    ((3, 1), "random"),
]  # fmt: skip
FLOOR = 6e-8  # rounding of gradients, which are differences of terms of up to 1


def _weight(n):
    return torch.linspace(1.5, 0.5, n, device=DEVICE)


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
def test_head(shape, kind, chunked):
    """Every k at which something ends; forms and weights take turns."""
    z, weight = logits(*shape, kind), _weight(shape[0])
    for n, k in enumerate(sorted({1, max(1, shape[1] - 1), shape[1]})):
        check(
            "adaptation_head", z, k, 1.5, 0.5, n % 2 == 1, 1e-6, weight if n else None, floor=FLOOR
        )
    check("balance_entropy", z, False, weight, floor=FLOOR)
    check("balance_entropy", z, True, floor=FLOOR)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype, chunked):
    """Keys of fewer bits select the same; rounded logits tie."""
    z = logits(2, 300, dtype=dtype)
    z[:, 100:200] = z[:, :100]
    *_, grad = check("adaptation_head", z, 28, 1.0, 1.0, False, 1e-6)
    assert grad.dtype == torch.float32


def test_bfloat16_logits_with_ties_and_weights(chunked):
    z = logits(2, 140, dtype=torch.bfloat16)
    z[:, 70:] = z[:, :70]
    check("adaptation_head", z, 17, 1.0, 1.0, True, 1e-6, _weight(2))


def test_more_than_1023_classes():
    """Counts no longer fit into ten bits."""
    check("adaptation_head", logits(2, 1100, "ties"), 100, 1.0, 1.0, False, 1e-6)


def test_rows_of_several_chunks():
    z = logits(1, 5000, "ties", torch.bfloat16)
    check("adaptation_head", z, 450, 1.0, 1.0, True, 1e-6)


def test_many_samples_a_program(monkeypatch):
    """Sums over samples in parts, the last of them not full."""
    monkeypatch.setattr(adaptation_head_plan, "MOST_PARTS", 3)
    check("adaptation_head", logits(8, 9), 3, 1.0, 1.0, False, 1e-6, _weight(8))


def test_nan_is_never_hidden(chunked):
    z = logits(3, 6).clone()
    z[1, 2] = torch.nan
    for k in (3, 6):
        *losses, grad = KERNELS["adaptation_head"](z, k, 1.0, 1.0, False, 1e-6)
        assert all(torch.isnan(x) for x in losses)
        assert torch.isnan(grad[1]).all()
    assert torch.isnan(KERNELS["balance_entropy"](z, True)[0])


def test_same_bits_twice(chunked):
    z = logits(3, 150)
    runs = [KERNELS["adaptation_head"](z, 9, 1.0, 1.0, True, 1e-6) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("case", ["logit_c50", "logit_c309"])
def test_goldens(golden, case):
    g = golden.load("kernels")
    z = g[f"{case}.logits"].to(DEVICE)
    results = {
        "balance_mean": KERNELS["balance_entropy"](z, False),
        "balance_softmax_of_sum": KERNELS["balance_entropy"](z, True),
    }
    for k in golden.json["kernels"][case]["ks"]:
        *_, entropy, _, grad = KERNELS["adaptation_head"](z, k, 1.0, 0.0, False, 1e-6)
        results[f"principal_entropy_k{k}"] = entropy, grad
    for name, (value, grad) in results.items():
        expected, slope = g[f"{case}.{name}"], g[f"{case}.{name}.grad"]
        assert abs(value.item() - expected) < 2e-6 * abs(expected), name
        # eps 1e-6 is 17 units of float32 at 1: what rounding leaves of ln(p + eps)
        assert (grad.cpu() - slope).abs().max() < 4e-6 * slope.abs().max() + 1e-8, name


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_at_full_size_on_a_gpu(dtype):
    for n, c in ((128, 309), (64, 1000), (700, 4096), (64, 100_000)):
        check("adaptation_head", logits(n, c, dtype=dtype), c // 11, 1.0, 1.0, False, 1e-6)

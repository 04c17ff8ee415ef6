"""The adaptation head: every implementation against the reference and goldens, weights, types."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, IMPLEMENTATIONS, close, logits_of, using

from fasttta import functional as F


@pytest.fixture(autouse=True)
def _on_the_device():
    """Tensors that a test makes are where the operations run natively."""
    with DEVICE:
        yield


LOGIT_SHAPES = [(8, 50), (6, 309), (1, 2), (5, 1), (3, 1000)]


@pytest.mark.parametrize("implementation", ["default", "composite"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("balance", ["mean", "softmax-sum"])
@pytest.mark.parametrize("kind", ["random", "ties", "extreme", "equal"])
@pytest.mark.parametrize("shape", LOGIT_SHAPES, ids=str)
def test_head_equals_reference(shape, kind, balance, weighted, implementation, monkeypatch):
    using(implementation, monkeypatch)
    logits = logits_of(*shape, kind)
    weight = torch.linspace(1, 0, shape[0] + 1)[:-1].double() if weighted else None
    for k in {1, min(shape[1], 8), max(1, shape[1] - 1), shape[1]}:
        results = []
        for backend in (None, "reference"):
            head = F.adaptation_head(logits, k, 1.5, 0.5, balance, weight=weight, backend=backend)
            grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in head]
            alone = F.balance_entropy(logits, balance, weight=weight, backend=backend)
            grads.append(torch.autograd.grad(alone, logits)[0])
            values = [*head, alone]
            up = torch.arange(1.0, shape[0] + 1).double()
            for rows in (F.principal_entropy(logits, k, backend=backend),
                         F.entropy(logits, backend=backend)):  # fmt: skip
                values.append(rows)
                grads.append(torch.autograd.grad(rows @ up, logits)[0])
            results.append((*values, *grads))
        names = "total", "entropy", "balance", "alone", "principal", "entropies"
        for name, computed, expected in zip(
            (*names, *(f"d{name}" for name in names)), *results, strict=True
        ):
            assert torch.isfinite(computed).all(), name
            assert torch.allclose(computed, expected, rtol=1e-12, atol=1e-14), (name, k)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_upstream_gradient(implementation, monkeypatch):
    """Total, entropy and balance may be used together, alone, or not at all."""
    backend = using(implementation, monkeypatch)
    logits, weight = logits_of(6, 9), torch.linspace(0.2, 1, 6).double()
    for ups in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, -2, 3), (0, 2, 1)):
        results = []
        for chosen in (backend, "reference"):
            head = F.adaptation_head(logits, 3, 1.5, 0.7, weight=weight, backend=chosen)
            used = [up * x for up, x in zip(ups, head, strict=True) if up]
            results.append(torch.autograd.grad(sum(used), logits)[0])
        assert torch.allclose(*results, rtol=1e-12, atol=1e-15), ups
    total, _, _ = F.adaptation_head(logits, 3, backend=backend)
    assert torch.autograd.grad(2 * total, logits)[0].abs().max() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_select_samples(implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    logits, weight = logits_of(6, 9), torch.tensor([1.0, 0, 1, 0, 0, 1]).double()
    for form in ("mean", "softmax-sum"):
        computed = F.adaptation_head(logits, 4, balance=form, weight=weight, backend=backend)
        expected = F.adaptation_head(logits[weight > 0], 4, balance=form, backend=backend)
        for a, b in zip(computed, expected, strict=True):
            assert torch.allclose(a, b)
        alone = F.balance_entropy(logits, form, weight=weight, backend=backend)
        assert torch.allclose(alone, expected[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_in_lower_precision(dtype, implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    logits = logits_of(16, 309, dtype=dtype)
    head = F.adaptation_head(logits, 28, backend=backend)
    assert {x.dtype for x in head} == {torch.float32}
    grad = torch.autograd.grad(head[0], logits)[0]
    exact = logits.detach().double().requires_grad_()
    expected = F.adaptation_head(exact, 28, backend="reference")
    for computed, right in zip(head, expected, strict=True):
        close(computed, right, torch.float32, "value")
    assert grad.dtype == dtype
    close(grad, torch.autograd.grad(expected[0], exact)[0], dtype, "gradient")
    up = torch.linspace(-1, 1, 16)
    for measure in (
        lambda z, backend: F.entropy(z, backend=backend),
        lambda z, backend: F.principal_entropy(z, 28, backend=backend),
    ):
        rows, right = measure(logits, backend), measure(exact, "reference")
        close(rows, right, torch.float32, "rows")
        grad = torch.autograd.grad(rows @ up.to(rows), logits)[0]
        assert grad.dtype == dtype
        close(grad, torch.autograd.grad(right @ up.to(right), exact)[0], dtype, "row gradient")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["logit_c50", "logit_c309"])
def test_logit_goldens(golden, case, implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    g = golden.load("kernels")
    terms = {
        "balance_mean": lambda z: F.balance_entropy(z, backend=backend),
        "balance_softmax_of_sum": lambda z: F.balance_entropy(z, "softmax-sum", backend=backend),
        "read_ra": lambda z: F.principal_entropy(z, 1, 0.0, backend=backend).mean(),
        "tent_entropy": lambda z: F.entropy(z, backend=backend).mean(),
    }
    for k in golden.json["kernels"][case]["ks"]:
        terms[f"principal_entropy_k{k}"] = lambda z, k=k: F.principal_entropy(
            z, k, backend=backend
        ).mean()
    for name, term in terms.items():
        logits = g[f"{case}.logits"].double().requires_grad_()
        value = term(logits)
        assert (value - g[f"{case}.{name}"]).abs() < 1e-10, name
        grad = torch.autograd.grad(value, logits)[0]
        assert (grad - g[f"{case}.{name}.grad"]).abs().max() < 1e-10, name

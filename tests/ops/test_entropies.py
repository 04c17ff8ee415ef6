"""Losses on logits: every implementation against the reference and goldens, ties, edges."""

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
        for name, found, expected in zip(
            (*names, *(f"d{name}" for name in names)), *results, strict=True
        ):
            assert torch.isfinite(found).all(), name
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14), (name, k)


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
def test_ties_go_to_the_lowest_index(implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]], dtype=dtype).requires_grad_()
        grad = torch.autograd.grad(F.principal_entropy(logits, 2, backend=backend).sum(), logits)[0]
        # equal logits of which 1 and 2 are selected, 3 is not
        assert grad[0, 1] == grad[0, 2] != grad[0, 3]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_entropies(implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    logits = logits_of(5, 9)
    p = logits.softmax(-1)
    found = F.entropy(logits, backend=backend)
    assert torch.allclose(found, torch.distributions.Categorical(probs=p).entropy())
    # principal entropy of all classes without epsilon is the entropy
    assert torch.allclose(F.principal_entropy(logits, 9, 0.0, backend=backend), found)
    # a shift of all logits changes nothing
    assert torch.allclose(F.entropy(logits + 100, backend=backend), found)
    mean = F.balance_entropy(logits, backend=backend)
    assert torch.allclose(mean, torch.distributions.Categorical(probs=p.mean(0)).entropy())
    masked = logits.detach().clone()
    masked[:, 3] = -torch.inf
    masked.requires_grad_()
    kept = masked[:, [0, 1, 2, 4, 5, 6, 7, 8]]
    for measure in (
        F.entropy,
        lambda z, backend: F.principal_entropy(z, 4, backend=backend),
        lambda z, backend: F.adaptation_head(z, 4, backend=backend)[0],
    ):
        value = measure(masked, backend=backend)
        assert torch.allclose(value, measure(kept, backend=backend))
        assert torch.isfinite(torch.autograd.grad(value.sum(), masked)[0]).all()
    # all nine selected, the masked one too: it has probability 0
    found = F.principal_entropy(masked, 9, 0.0, backend=backend)
    assert torch.allclose(found, F.entropy(kept))
    assert torch.isfinite(torch.autograd.grad(found.sum(), masked)[0]).all()
    assert F.entropy(logits[:0], backend=backend).shape == (0,)
    assert F.principal_entropy(logits[:0], 3, backend=backend).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_is_never_hidden(implementation, dtype, monkeypatch):
    """What decides that an update is skipped must not turn nan into 0."""
    backend = using(implementation, monkeypatch)
    logits = logits_of(4, 6, dtype=dtype).detach()
    logits[1, 2] = torch.nan
    for rows in (
        F.entropy(logits, backend=backend),
        F.principal_entropy(logits, 3, backend=backend),
        F.principal_entropy(logits, 6, 0.0, backend=backend),
    ):
        assert torch.isnan(rows).tolist() == [False, True, False, False]
    for form in ("mean", "softmax-sum"):
        assert torch.isnan(F.balance_entropy(logits, form, backend=backend))
        assert all(
            torch.isnan(x) for x in F.adaptation_head(logits, 3, balance=form, backend=backend)
        )
    grad = torch.autograd.grad(
        F.adaptation_head(logits.requires_grad_(), 3, backend=backend)[0], logits
    )[0]
    assert torch.isnan(grad).all()  # through the class distribution every sample has it


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_select_samples(implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    logits, weight = logits_of(6, 9), torch.tensor([1.0, 0, 1, 0, 0, 1]).double()
    for form in ("mean", "softmax-sum"):
        found = F.adaptation_head(logits, 4, balance=form, weight=weight, backend=backend)
        expected = F.adaptation_head(logits[weight > 0], 4, balance=form, backend=backend)
        for a, b in zip(found, expected, strict=True):
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
    for found, right in zip(head, expected, strict=True):
        close(found, right, torch.float32, "value")
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_view_goldens(atpt_kernels, implementation, monkeypatch):
    """Entropies of TPT and A-TPT over views, with logits up to 300 apart."""
    backend = using(implementation, monkeypatch)
    g = {name: x.to(DEVICE) for name, x in atpt_kernels.items()}
    chosen = g["loss.selected_idx"]
    selected = torch.zeros_like(g["loss.logits"][:, 0])
    selected[chosen] = 1
    cases = {
        "marginal_all": lambda z: F.marginal_entropy(z, backend=backend),
        "marginal_selected": lambda z: F.marginal_entropy(z, weight=selected, backend=backend),
        "pointwise_all": lambda z: F.entropy(z, backend=backend).mean(),
        "pointwise_selected": lambda z: F.entropy(z, backend=backend)[chosen].mean(),
        "weighted_pointwise": lambda z: (
            F.entropy(z, backend=backend)[: len(g["loss.weighted_pointwise.weights"])]
            @ g["loss.weighted_pointwise.weights"]
        ),
        "extreme.marginal": lambda z: F.marginal_entropy(z, backend=backend),
        "extreme.pointwise": lambda z: F.entropy(z, backend=backend).mean(),
    }
    for name, case in cases.items():
        source = "loss.extreme.logits" if name.startswith("extreme") else "loss.logits"
        logits = g[source].clone().requires_grad_()
        value = case(logits)
        assert (value - g[f"loss.{name}.value"]).abs() < 1e-10, name
        grad = torch.autograd.grad(value, logits)[0]
        assert (grad - g[f"loss.{name}.grad_logits"]).abs().max() < 1e-10, name

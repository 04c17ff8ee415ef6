"""Entropies of logits: every implementation against goldens, ties, edges."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, IMPLEMENTATIONS, logits_of, using

from fasttta import functional as F


@pytest.fixture(autouse=True)
def _on_the_device():
    """Tensors that a test makes are where the operations run natively."""
    with DEVICE:
        yield


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
    computed = F.entropy(logits, backend=backend)
    assert torch.allclose(computed, torch.distributions.Categorical(probs=p).entropy())
    # principal entropy of all classes without epsilon is the entropy
    assert torch.allclose(F.principal_entropy(logits, 9, 0.0, backend=backend), computed)
    # a shift of all logits changes nothing
    assert torch.allclose(F.entropy(logits + 100, backend=backend), computed)
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
    computed = F.principal_entropy(masked, 9, 0.0, backend=backend)
    assert torch.allclose(computed, F.entropy(kept))
    assert torch.isfinite(torch.autograd.grad(computed.sum(), masked)[0]).all()
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

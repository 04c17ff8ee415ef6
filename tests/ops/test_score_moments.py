"""Score statistics: default against reference, cancellation, constant scores, memory."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, close, composite, qk, without_native

from fasttta import functional as F

# batch, heads, spans, head dim: odd on every axis, three modalities, more samples than a tile
SHAPES = [
    (3, 4, (20, 12), 6),
    (1, 1, (2, 2), 1),
    (2, 3, (7, 2, 5), 5),
    (5, 2, (3, 11), 17),
    (2, 1, (9,), 4),
    (700, 2, (13, 8), 3),
]


@pytest.fixture(autouse=True)
def _on_the_device():
    """Tensors that a test makes are where the operations run natively."""
    with DEVICE:
        yield


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_moments_equal_reference(shape, heads, layout):
    q, k = qk(*shape, layout=layout)
    spans = shape[2]
    results = []
    for backend in (None, "reference"):
        mean, std = F.score_moments(q, k, spans, heads=heads, backend=backend)
        weights = torch.linspace(0.5, 2, max(mean.numel(), 1), dtype=q.dtype)[: mean.numel()]
        loss = (mean.flatten() * weights).sum() + (std.flatten() * weights.flip(0)).sum()
        results.append((mean, std, *torch.autograd.grad(loss, (q, k))))
    for name, computed, expected in zip(("mean", "std", "dq", "dk"), *results, strict=True):
        close(computed, expected, torch.float64, name)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("offset", [3.0, 30.0])
def test_statistics_do_not_cancel(heads, offset):
    """float32 with scores whose mean is far from 0 in units of their std."""
    q, k = qk(2, 2, (40, 24), 16, dtype=torch.float32, offset=offset)
    computed = F.score_moments(q, k, (40, 24), heads=heads)
    expected = F.score_moments(q.double(), k.double(), (40, 24), heads=heads, backend="reference")
    assert (expected.mean.abs() / expected.std).min() > 3
    # what float32 scores themselves can resolve: eps * |mean|
    tolerance = 1e-5 * expected.std + 4e-7 * expected.mean.abs()
    assert ((computed.std - expected.std).abs() <= tolerance).all()
    assert ((computed.mean - expected.mean).abs() <= 1e-6 * expected.mean.abs()).all()


def test_each_head_of_one_is_the_mean():
    q, k = qk(3, 1, (6, 5), 4)
    each, mean = (F.score_moments(q, k, (6, 5), heads=h) for h in ("each", "mean"))
    assert torch.allclose(each.mean[:, 0], mean.mean)
    assert torch.allclose(each.std[:, 0], mean.std)


def test_constant_scores_have_no_gradient():
    """A block of equal scores has std 0; its gradient is 0, as torch.std has it, not nan."""
    q = torch.zeros(1, 1, 6, 2, dtype=torch.float64, requires_grad=True)
    k = torch.ones(1, 1, 6, 2, dtype=torch.float64, requires_grad=True)
    std = F.score_moments(q, k, (3, 3)).std
    assert (std == 0).all()
    for grad in torch.autograd.grad(std.sum(), (q, k)):
        assert (grad == 0).all()


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_no_batch_of_score_maps_is_held(heads, monkeypatch):
    """The largest tensor of PyTorch calls is one sample's scores, however large the batch."""
    without_native(monkeypatch)  # C++ allocates out of the mode's sight
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    Largest.size = max(Largest.size, x.numel())
            return out

    spans, heads_n, d, batch = (400, 300), 2, 4, 3
    q, k = (x.detach() for x in qk(batch, heads_n, spans, d, torch.float32))
    with Largest():
        mean, std = composite.score_moments(q, k, list(spans), 0.5, heads == "each")
        composite.score_moments_backward(mean, std, q, k, std, list(spans), 0.5, heads == "each")
    assert Largest.size <= max(sum(spans) ** 2, q.numel())

"""The attention bootstrapping loss: default against reference and goldens, properties, edges."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, close, qk
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck

from fasttta import functional as F
from fasttta.ops import attention_bootstrap, token_moments

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


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("pair", ["key", "query"])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bootstrap_equals_reference(shape, heads, pair, anchored):
    q, k = qk(*shape)
    m = (shape[1], len(shape[2])) if heads == "each" else (len(shape[2]),)
    anchor = None
    if anchored:
        anchor = F.Moments(torch.full(m, 0.1).double(), torch.linspace(0.5, 1, m[-1]).expand(m))
    results = []
    for backend in (None, "reference"):
        loss, moments = F.attention_bootstrap(
            q, k, shape[2], None, heads, pair, anchor=anchor, return_moments=True, backend=backend
        )
        weights = torch.arange(1.0, shape[0] + 1, dtype=q.dtype)
        # one modality has no cross block: loss 0, which in the reference depends on nothing
        loss = loss + 0 * (q.sum() + k.sum())
        grads = torch.autograd.grad((loss * weights).sum(), (q, k))
        results.append((loss, *moments, *grads))
    for name, computed, expected in zip(("loss", "mean", "std", "dq", "dk"), *results, strict=True):
        close(computed, expected, torch.float64, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_bootstrap_in_lower_precision(heads, dtype):
    q, k = qk(2, 3, (20, 12), 8, dtype=dtype)
    loss, moments = F.attention_bootstrap(q, k, (20, 12), heads=heads, return_moments=True)
    assert {loss.dtype, moments.mean.dtype, moments.std.dtype} == {torch.float32}
    grads = torch.autograd.grad(loss.sum(), (q, k))
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    expected = F.attention_bootstrap(*exact, (20, 12), heads=heads, backend="reference")
    close(loss, expected, torch.float32, "loss")
    for name, computed, right in zip(
        "qk", grads, torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert computed.dtype == dtype
        close(computed, right, dtype, f"d{name}")


def test_equal_at_full_length():
    """T = 708, the published size, to float64 round-off; at 16 of 64 channels for CI's time."""
    for heads in ("mean", "each"):
        q, k = qk(1, 3, (512, 196), 16, layout="packed")
        results = []
        for backend in (None, "reference"):
            loss = F.attention_bootstrap(q, k, (512, 196), heads=heads, backend=backend)
            results.append((loss, *torch.autograd.grad(loss.sum(), (q, k))))
        for name, computed, expected in zip(("loss", "dq", "dk"), *results, strict=True):
            close(computed, expected, torch.float64, name)


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_attention_properties(heads):
    shape = (4, 2, (6, 5), 4)
    q, k = qk(*shape)
    loss = F.attention_bootstrap(q, k, shape[2], heads=heads)
    assert (loss > 0).all()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(
        F.attention_bootstrap(q[order], k[order], shape[2], heads=heads), loss[order]
    )
    # tokens within a modality may come in any order
    mixed = torch.cat((torch.randperm(6), 6 + torch.randperm(5)))
    assert torch.allclose(
        F.attention_bootstrap(q[:, :, mixed], k[:, :, mixed], shape[2], heads=heads), loss
    )
    # one and the same tokens in both modalities: no gap
    same_q, same_k = (torch.cat((x[:, :, :5], x[:, :, :5]), 2) for x in (q, k))
    zero = F.attention_bootstrap(same_q, same_k, (5, 5), heads=heads)
    assert torch.allclose(zero, torch.zeros_like(zero), atol=1e-12)


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_empty_batch(heads):
    q, k = qk(0, 2, (4, 3), 4)
    loss, moments = F.attention_bootstrap(q, k, (4, 3), heads=heads, return_moments=True)
    assert loss.shape == (0,)
    assert (
        moments.mean.shape == moments.std.shape == ((0, 2, 2, 2) if heads == "each" else (0, 2, 2))
    )
    for grad in torch.autograd.grad(loss.sum(), (q, k)):
        assert grad.shape == q.shape


def test_ignored_sample_cannot_spoil_gradients():
    """A sample whose loss gets weight 0 may have undefined statistics."""
    q, k = qk(2, 2, (4, 3), 4)
    zero = torch.cat((torch.zeros_like(q[:1]), q[1:])).detach().requires_grad_()
    loss = F.attention_bootstrap(zero, k, (4, 3))
    assert not torch.isfinite(loss[0])
    weight = torch.tensor([0.0, 1.0], dtype=torch.float64)
    used = torch.where(weight > 0, loss * weight, 0).sum()
    for grad in torch.autograd.grad(used, (zero, k)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_nan_is_never_hidden(heads, backend):
    q, k = (x.detach() for x in qk(2, 2, (4, 3), 4))
    q[1, 0, 2, 1] = torch.nan
    loss = F.attention_bootstrap(q, k, (4, 3), heads=heads, backend=backend)
    assert torch.isnan(loss).tolist() == [False, True]


def test_gaussian_kl():
    mean, std = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([1.0, 0.5, 3.0]).double()
    assert torch.equal(F.gaussian_kl(mean, std, mean, std), torch.zeros(3).double())
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(mean.flip(0), std + 1))
    assert torch.allclose(F.gaussian_kl(mean, std, mean.flip(0), std + 1), expected)
    half = [torch.tensor([x], dtype=torch.float16) for x in (300.0, 1.0, 0.0, 1.0)]
    assert F.gaussian_kl(*half) == 45000  # computed in float32: 300 squared overflows float16
    inputs = [x.clone().requires_grad_() for x in (mean, std, mean.flip(0), std + 1)]
    assert gradcheck(F.gaussian_kl, inputs)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", ["attn_small", "attn_full"])
def test_attention_goldens(golden, case, backend):
    g = golden.load("kernels")
    spans = [golden.json["kernels"][case][key] for key in ("Ta", "Tv")]
    for heads, prefix in (("mean", ""), ("each", "perhead_")):
        q, k = (g[f"{case}.{name}"].double().requires_grad_() for name in "qk")
        loss, moments = F.attention_bootstrap(
            q, k, spans, heads=heads, return_moments=True, backend=backend
        )
        for i, row in enumerate("av"):
            for j, column in enumerate("av"):
                for name, computed in zip(("mean", "std"), moments, strict=True):
                    expected = g[f"{case}.{prefix}{name}_{row}{column}"]
                    assert (computed[..., i, j] - expected).abs().max() < 1e-10
        total = g[f"{case}.{prefix}loss" if prefix else f"{case}.loss_attn"]
        assert (loss.mean() - total).abs() < 1e-10
        for name, grad in zip("qk", torch.autograd.grad(loss.mean(), (q, k)), strict=True):
            expected = g[f"{case}.{prefix}grad_{name}"]
            assert (grad - expected).abs().max() < (
                1e-10 if expected.dtype == torch.float64 else 1e-9
            )


class Recorder:
    """The dispatcher's namespace, which notes the last argument of every call."""

    def __init__(self, ops) -> None:
        self.ops, self.calls = ops, []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, args[-1]))
            return getattr(self.ops, name)(*args)

        return call


def test_the_forward_keeps_token_moments_for_the_backward(monkeypatch):
    q, k = qk(2, 3, (7, 5), 4)
    options = [7, 5], 0.5, True, False
    recorder = Recorder(attention_bootstrap.ops)
    monkeypatch.setattr(attention_bootstrap, "ops", recorder)
    monkeypatch.setattr(attention_bootstrap, "keeps_tokens", lambda *_: True)
    attention_bootstrap.attention_bootstrap(q, k, *options)[0].sum().backward()
    names, last = zip(*recorder.calls, strict=True)
    assert names == ("token_moments", "attention_bootstrap", "attention_bootstrap_backward")
    assert last[1].shape == (2, 3, 2, 2, 5, 4)
    assert torch.equal(last[2], last[1])
    expected = attention_bootstrap.attention_bootstrap_reference(q, k, *options)[0].sum()
    for x, grad in zip((q, k), torch.autograd.grad(expected, (q, k)), strict=True):
        torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize(
    ("device", "spans", "d", "dtype", "per_head", "kept"),
    [
        ("cuda", [512, 196], 64, torch.bfloat16, True, True),
        ("cuda", [512, 196], 64, torch.bfloat16, False, False),
        ("cpu", [512, 196], 64, torch.bfloat16, True, False),
        ("cuda", [512, 196], 64, torch.float64, True, False),  # which kernels do not take
        ("cuda", [200, 60], 64, torch.bfloat16, True, True),
        ("cuda", [200, 59], 64, torch.bfloat16, True, False),  # 33,280 bytes of 33,152
    ],
)
def test_token_moments_are_kept_where_memory_allows(device, spans, d, dtype, per_head, kept):
    with FakeTensorMode():
        q = torch.empty(2, 3, sum(spans), d, dtype=dtype, device=device)
        assert token_moments.keeps_tokens(q, q, spans, per_head) is kept

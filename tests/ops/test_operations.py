"""Derivatives of the operations, their registration, and the choice of a backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from op_cases import DEVICE, IMPLEMENTATIONS, composite, logits_of, qk, using, without_native
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck

from fasttta import functional as F
from fasttta.ops import native, registry
from fasttta.ops.adaptation_head import adaptation_head
from fasttta.ops.attention_bootstrap import attention_bootstrap
from fasttta.ops.score_moments import score_moments_reference
from fasttta.ops.shared_prefix_attention import layout as layout_of


@pytest.fixture(autouse=True)
def _on_the_device():
    """Tensors that a test makes are where the operations run natively."""
    with DEVICE:
        yield


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck_maps(implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    generator = torch.Generator("cpu").manual_seed(0)
    shuffled = torch.randperm(60, generator=generator, device="cpu").double() / 7  # no ties
    maps = shuffled.view(3, 4, 5).to(DEVICE).requires_grad_()
    assert gradcheck(lambda x: F.total_variation(x, backend=backend), (maps,))
    assert gradcheck(lambda x: F.reliability_weights(F.total_variation(x), 30.0), (maps,))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_gradcheck_attention(heads, implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    q, k = qk(2, 2, (3, 4, 2), 3)
    anchor = F.Moments(torch.zeros(3).double(), torch.ones(3).double())
    if heads == "each":
        anchor = F.Moments(*(x.expand(2, 3) for x in anchor))
    options = {"heads": heads, "backend": backend}
    assert gradcheck(lambda q, k: F.score_moments(q, k, (3, 4, 2), **options), (q, k))
    # with the batch's own anchors the loss has a stop-gradient, which finite differences ignore
    assert gradcheck(
        lambda q, k: F.attention_bootstrap(q, k, (3, 4, 2), anchor=anchor, **options), (q, k)
    )


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradchecklogits_of(backend):
    logits, weight = logits_of(5, 7), torch.linspace(0.2, 1, 5).double()
    assert gradcheck(lambda z: F.entropy(z, backend=backend), (logits,))
    assert gradcheck(lambda z: F.principal_entropy(z, 3, backend=backend), (logits,))
    for form in ("mean", "softmax-sum"):
        for w in (None, weight):
            options = {"weight": w, "backend": backend}
            assert gradcheck(lambda z, f=form, o=options: F.balance_entropy(z, f, **o), (logits,))
            assert gradcheck(
                lambda z, f=form, o=options: F.adaptation_head(z, 3, 1.5, 0.7, f, **o), (logits,)
            )


def _op_samples():
    with DEVICE:  # also while tests are collected
        return list(_made())


def _made():
    q, k = (x.detach() for x in qk(2, 3, (4, 3), 5, torch.float32, layout="packed"))
    logits, weight = torch.randn(4, 6), torch.rand(4)
    yield "token_moments", (q, k, [4, 3])
    for per_head in (False, True):
        mean, std = score_moments_reference(q, k, [4, 3], 0.5, per_head)
        shape = [4, 3], 0.5, per_head
        anchors = [mean[0].diagonal(dim1=-2, dim2=-1), std[0].diagonal(dim1=-2, dim2=-1)]
        yield "score_moments", (q, k, *shape)
        yield "score_moments_backward", (mean, std, q, k, std, *shape)
        for anchor in ([], anchors):
            yield "attention_bootstrap", (q, k, *shape, True, *anchor)
            yield (
                "attention_bootstrap_backward",
                (torch.rand(2), q, k, mean, std, *shape, False, *anchor),
            )
    yield "entropy", (logits,)
    across = torch.randn(6, 4).T
    yield "entropy_backward", (torch.rand(4), across)
    yield "principal_entropy_backward", (torch.rand(4), across, 2, 1e-6)
    yield "balance_entropy", (across, False)
    yield "adaptation_head", (across, 2, 1.5, 0.5, False, 1e-6)
    yield "total_variation_backward", (torch.rand(6), torch.randn(3, 5, 6).permute(2, 0, 1))
    yield "entropy_backward", (torch.rand(4), logits)
    yield "principal_entropy", (logits, 2, 1e-6)
    yield "principal_entropy_backward", (torch.rand(4), logits, 2, 1e-6)
    for w in ((), (weight,)):
        yield "balance_entropy", (logits, True, *w)
        yield "adaptation_head", (logits, 2, 1.5, 0.5, False, 1e-6, *w)
    maps = torch.randn(4, 3, 5)
    yield "total_variation", (maps,)
    yield "total_variation_backward", (torch.rand(4), maps)
    yield "reliability_ensemble", (maps, logits, 0.5)
    for shared in (q, q[:1]):
        out, top, rest = composite.flat_attention(shared, k, k, 0.5)
        yield "flat_attention", (shared, k, k, 0.5)
        yield "flat_attention_backward", (k, shared, k, k, out, top, rest, 0.5)
    for x in (maps, maps.transpose(0, 2)):
        branch, affine = x.bfloat16(), (torch.rand(x.shape[-1]), torch.rand(x.shape[-1]))
        yield "scaled_rows", (x, "gelu")
        yield "scaled_layer_norm", (x, branch, *affine, 1e-5)
        yield "scaled_layer_norm", (x, None, *affine, 1e-5)
    for name in ("gelu", "quick_gelu"):
        yield name, (logits,)
        yield f"{name}_backward", (torch.rand(4, 6), logits)
    yield "gelu", (logits, torch.rand(6))
    yield "gelu_backward", (torch.rand(4, 6), logits, torch.rand(6))
    yield from _layer_norms(maps)
    packed, kv = torch.randn(2, 6, 12).chunk(3, -1), torch.randn(2, 2, 3, 4)
    layout = *layout_of([1, 3, 2]), 2, 0.5
    for queries in (packed[0], packed[0][:, :3]):  # all, and every sequence's last
        tensors = queries, *packed[1:], *kv
        out, lse = composite.shared_prefix_attention(*tensors, *layout)
        yield "shared_prefix_attention", (*tensors, *layout)
        yield "shared_prefix_attention_backward", (queries, *tensors, out, lse, *layout)


def _layer_norms(x):
    """A branch in another type than the residual x [4, 3, 5] and none, tuned and frozen weights."""
    half, affine = torch.bfloat16, (torch.rand(5), torch.rand(5))
    for branch, weights, dtype in (
        (torch.randn(4, 3, 5).to(half), affine, half),
        (torch.randn(3, 4, 5).transpose(0, 1), (None, None), torch.float32),
        (None, affine, half),
    ):
        yield "residual_layer_norm", (x, branch, *weights, 1e-5, dtype)
        total, normed, stats = composite.residual_layer_norm(x, branch, *weights, 1e-5, dtype)
        total = x if branch is None else total
        kind = total.dtype if branch is None else branch.dtype
        saved = total, stats, weights[0], kind
        for wanted in ((True, kind == half, False), (False, kind == half, True)):
            yield "residual_layer_norm_backward", (normed, None, *saved, *wanted)
        yield "residual_layer_norm_backward", (normed, total, *saved, True, kind == half, True)


def test_opcheck_covers_every_op():
    assert {name for name, _ in _op_samples()} == set(vars(composite))


@pytest.mark.parametrize(
    ("name", "args"), _op_samples(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.fasttta, name).default, args)


@pytest.mark.parametrize(
    ("name", "args"), _op_samples(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_composite_returns_what_is_declared(name, args, monkeypatch):
    """Shapes, types and strides, as torch.compile is told; opcheck looks at what is dispatched."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        declared = getattr(torch.ops.fasttta, name)(*fakes)
    as_tuple = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
    for cpp in (True, False):  # the composite of a head's moments has a part in C++
        if not cpp:
            without_native(monkeypatch)
        computed = getattr(composite, name)(*args)
        for x, y in zip(as_tuple(computed), as_tuple(declared), strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_compiles_without_a_break():
    """torch.compile sees the operations as single nodes."""

    def loss(q, k, logits):
        total, _, _ = adaptation_head(logits, 3, 1.0, 1.0, False, 1e-6)
        return total + attention_bootstrap(q, k, [4, 3], 0.5, False, False)[0].mean()

    q, k = qk(2, 2, (4, 3), 5, torch.float32)
    logits = logits_of(4, 6, dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (q, k, logits)
    expected, computed = loss(*inputs), compiled(*inputs)
    assert torch.allclose(computed, expected)
    for a, b in zip(
        torch.autograd.grad(computed, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_named_backend_runs_that_or_says_why_not():
    z, maps = torch.randn(3, 5, device="cpu"), torch.rand(3, 4, 4, device="cpu")
    q = torch.randn(1, 1, 4, 2, device="cpu")
    for call, match in (
        (lambda: F.score_moments(q, q, (2, 2), backend="cpp"), "score_moments has no cpp kernel "
         'but for heads="each": its work is matrix products'),
        (lambda: F.attention_bootstrap(q, q, (2, 2), backend="cpp"), "matrix products"),
        (lambda: F.gaussian_kl(z, z, z, z, backend="triton"), "gaussian_kl has no triton kernel"),
        (lambda: F.reliability_weights(z[0], backend="cpp"), "PyTorch's own elementwise kernels"),
        (lambda: F.entropy(z.to("meta"), backend="cpp"), "needs tensors on the CPU, found meta"),
        (lambda: F.entropy(z, backend="triton"), "backend='triton': "),
        (lambda: F.total_variation(maps, backend="gpu"), "backend='gpu' is unknown; known: None"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()


def test_an_operator_without_kernels_says_so(monkeypatch):
    alone = registry.Operator("alone", torch.neg, None, None, None)
    monkeypatch.setitem(registry.OPERATORS, "alone", alone)
    monkeypatch.setattr(registry, "has_kernel", lambda name, key: False)
    monkeypatch.setattr(native, "attempt", lambda: native.Outcome(Path("library.so")))
    assert registry.refusal("alone", "cpp") == "alone has no C++ kernel"
    monkeypatch.setattr(native, "attempt", lambda: native.Outcome(None, "no compiler"))
    assert registry.refusal("alone", "cpp") == "the C++ kernels are not there: no compiler"
    assert registry.refusal("alone", "triton") == "alone has no Triton kernel"


def test_arguments_are_checked():
    z, maps = torch.randn(3, 5), torch.rand(3, 4, 4)
    for call, error, match in (
        (lambda: F.total_variation(maps[0]), ValueError, r"maps must be \[maps, height, width\]"),
        (lambda: F.total_variation(maps[:, :0]), ValueError, "1 x 1, found shape"),
        (lambda: F.total_variation(maps.long()), TypeError, "maps must be floating point"),
        (lambda: F.total_variation([1.0]), TypeError, "maps must be a tensor"),
        (lambda: F.reliability_weights(z[0, 0]), ValueError, r"tv must be \[maps\]"),
        (lambda: F.marginal_entropy(z[None], weight=z[0]), ValueError, "of one sample with them"),
        (lambda: F.reliability_weights(z[0], 0), ValueError, "temperature=0 must be finite and"),
        (lambda: F.reliability_weights(z[0], float("nan")), ValueError, "temperature=nan"),
        (lambda: F.reliability_ensemble(maps, z[:2]), ValueError, "the 3 maps' views, found 2"),
        (lambda: F.reliability_ensemble(maps[:0], z[:0]), ValueError, "at least 1 map"),
        (lambda: F.reliability_ensemble(maps, z.to("meta")), ValueError, "one device"),
        (lambda: F.marginal_entropy(z[:0]), ValueError, "at least 1 sample"),
        (lambda: F.marginal_entropy(z, weight=z), ValueError, r"weight must be \[3\]"),
        (lambda: F.principal_entropy(z, 2, float("inf")), ValueError, "eps=inf must be finite"),
    ):
        with pytest.raises(error, match=match):
            call()

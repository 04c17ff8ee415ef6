"""Operations: default against reference and goldens, derivatives, ties, edges, registration."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from fasttta import functional as F
from fasttta.ops import autograd, composite, reference, schema

# relative to the largest entry of the expected tensor; half types: error of one rounding of the
# returned gradient, statistics themselves are float32
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}

# batch, heads, spans, head dim: odd on every axis, three modalities, more samples than a tile
SHAPES = [
    (3, 4, (20, 12), 6),
    (1, 1, (2, 2), 1),
    (2, 3, (7, 2, 5), 5),
    (5, 2, (3, 11), 17),
    (2, 1, (9,), 4),
    (700, 2, (13, 8), 3),
]


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _on_the_device():
    """Tensors that a test makes are where the operations run natively."""
    with DEVICE:
        yield


def _qk(batch, heads, spans, d, dtype=torch.float64, layout="dense", offset=0.0, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    random = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    t = sum(spans)
    if layout == "packed":  # views of [B, T, 3, H, d], as the model's qkv product gives them
        qkv = torch.randn(batch, t, 3, heads, d, **random).to(DEVICE)
        q, k, _ = (qkv + offset).to(dtype).permute(2, 0, 3, 1, 4)
    else:
        q, k = (
            (torch.randn(batch, heads, t, d, **random) + offset).to(DEVICE, dtype) for _ in range(2)
        )
    return q.detach().requires_grad_(), k.detach().requires_grad_()


def _close(found, expected, dtype, what):
    assert found.shape == expected.shape, what
    expected = expected.double()
    scale = expected.abs().max().item() if expected.numel() else 0
    error = (found.double() - expected).abs().max().item() if expected.numel() else 0
    assert error <= TOLERANCES[dtype] * max(scale, 1e-30), f"{what}: {error:.1e} of {scale:.1e}"


# --------------------------------------------------------------------------- attention


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_moments_equal_reference(shape, heads, layout):
    q, k = _qk(*shape, layout=layout)
    spans = shape[2]
    results = []
    for backend in (None, "reference"):
        mean, std = F.score_moments(q, k, spans, heads=heads, backend=backend)
        weights = torch.linspace(0.5, 2, max(mean.numel(), 1), dtype=q.dtype)[: mean.numel()]
        loss = (mean.flatten() * weights).sum() + (std.flatten() * weights.flip(0)).sum()
        results.append((mean, std, *torch.autograd.grad(loss, (q, k))))
    for name, found, expected in zip(("mean", "std", "dq", "dk"), *results, strict=True):
        _close(found, expected, torch.float64, name)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("pair", ["key", "query"])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bootstrap_equals_reference(shape, heads, pair, anchored):
    q, k = _qk(*shape)
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
    for name, found, expected in zip(("loss", "mean", "std", "dq", "dk"), *results, strict=True):
        _close(found, expected, torch.float64, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_bootstrap_in_lower_precision(heads, dtype):
    q, k = _qk(2, 3, (20, 12), 8, dtype=dtype)
    loss, moments = F.attention_bootstrap(q, k, (20, 12), heads=heads, return_moments=True)
    assert {loss.dtype, moments.mean.dtype, moments.std.dtype} == {torch.float32}
    grads = torch.autograd.grad(loss.sum(), (q, k))
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    expected = F.attention_bootstrap(*exact, (20, 12), heads=heads, backend="reference")
    _close(loss, expected, torch.float32, "loss")
    for name, found, right in zip(
        "qk", grads, torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert found.dtype == dtype
        _close(found, right, dtype, f"d{name}")


def test_equal_at_full_length():
    """T = 708, the published size, to float64 round-off; at 16 of 64 channels for CI's time."""
    for heads in ("mean", "each"):
        q, k = _qk(1, 3, (512, 196), 16, layout="packed")
        results = []
        for backend in (None, "reference"):
            loss = F.attention_bootstrap(q, k, (512, 196), heads=heads, backend=backend)
            results.append((loss, *torch.autograd.grad(loss.sum(), (q, k))))
        for name, found, expected in zip(("loss", "dq", "dk"), *results, strict=True):
            _close(found, expected, torch.float64, name)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("offset", [3.0, 30.0])
def test_statistics_do_not_cancel(heads, offset):
    """float32 with scores whose mean is far from 0 in units of their std."""
    q, k = _qk(2, 2, (40, 24), 16, dtype=torch.float32, offset=offset)
    found = F.score_moments(q, k, (40, 24), heads=heads)
    expected = F.score_moments(q.double(), k.double(), (40, 24), heads=heads, backend="reference")
    assert (expected.mean.abs() / expected.std).min() > 3
    # what float32 scores themselves can resolve: eps * |mean|
    tolerance = 1e-5 * expected.std + 4e-7 * expected.mean.abs()
    assert ((found.std - expected.std).abs() <= tolerance).all()
    assert ((found.mean - expected.mean).abs() <= 1e-6 * expected.mean.abs()).all()


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_attention_properties(heads):
    shape = (4, 2, (6, 5), 4)
    q, k = _qk(*shape)
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
    q, k = _qk(0, 2, (4, 3), 4)
    loss, moments = F.attention_bootstrap(q, k, (4, 3), heads=heads, return_moments=True)
    assert loss.shape == (0,)
    assert (
        moments.mean.shape == moments.std.shape == ((0, 2, 2, 2) if heads == "each" else (0, 2, 2))
    )
    for grad in torch.autograd.grad(loss.sum(), (q, k)):
        assert grad.shape == q.shape


def test_each_head_of_one_is_the_mean():
    q, k = _qk(3, 1, (6, 5), 4)
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


def test_ignored_sample_cannot_spoil_gradients():
    """A sample whose loss gets weight 0 may have undefined statistics."""
    q, k = _qk(2, 2, (4, 3), 4)
    zero = torch.cat((torch.zeros_like(q[:1]), q[1:])).detach().requires_grad_()
    loss = F.attention_bootstrap(zero, k, (4, 3))
    assert not torch.isfinite(loss[0])
    weight = torch.tensor([0.0, 1.0], dtype=torch.float64)
    used = torch.where(weight > 0, loss * weight, 0).sum()
    for grad in torch.autograd.grad(used, (zero, k)):
        assert torch.isfinite(grad).all()


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
                for name, found in zip(("mean", "std"), moments, strict=True):
                    expected = g[f"{case}.{prefix}{name}_{row}{column}"]
                    assert (found[..., i, j] - expected).abs().max() < 1e-10
        total = g[f"{case}.{prefix}loss" if prefix else f"{case}.loss_attn"]
        assert (loss.mean() - total).abs() < 1e-10
        for name, grad in zip("qk", torch.autograd.grad(loss.mean(), (q, k)), strict=True):
            expected = g[f"{case}.{prefix}grad_{name}"]
            assert (grad - expected).abs().max() < (
                1e-10 if expected.dtype == torch.float64 else 1e-9
            )


# --------------------------------------------------------------------------- logits

LOGIT_SHAPES = [(8, 50), (6, 309), (1, 2), (5, 1), (3, 1000)]


def _logits(n, c, kind="random", dtype=torch.float64):
    generator = torch.Generator("cpu").manual_seed(n * c)
    logits = torch.randn(n, c, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)
    if kind == "ties":
        logits = logits.round()
    elif kind == "extreme":
        logits = logits * 400
    elif kind == "equal":
        logits = torch.zeros_like(logits)
    return logits.to(dtype).requires_grad_()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("balance", ["mean", "softmax-sum"])
@pytest.mark.parametrize("kind", ["random", "ties", "extreme", "equal"])
@pytest.mark.parametrize("shape", LOGIT_SHAPES, ids=str)
def test_head_equals_reference(shape, kind, balance, weighted):
    logits = _logits(*shape, kind)
    weight = torch.linspace(1, 0, shape[0] + 1)[:-1].double() if weighted else None
    for k in {1, min(shape[1], 8), max(1, shape[1] - 1), shape[1]}:
        results = []
        for backend in (None, "reference"):
            head = F.adaptation_head(logits, k, 1.5, 0.5, balance, weight=weight, backend=backend)
            grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in head]
            rows = F.principal_entropy(logits, k, backend=backend)
            grads.append(
                torch.autograd.grad(rows @ torch.arange(1.0, len(rows) + 1).double(), logits)[0]
            )
            results.append((*head, rows, *grads))
        for name, found, expected in zip(
            ("total", "entropy", "balance", "rows", "dtotal", "dentropy", "dbalance", "drows"),
            *results,
            strict=True,
        ):
            assert torch.isfinite(found).all(), name
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14), (name, k)


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]).double().requires_grad_()
    for backend in (None, "reference"):
        grad = torch.autograd.grad(F.principal_entropy(logits, 2, backend=backend).sum(), logits)[0]
        # equal logits of which 1 and 2 are selected, 3 is not
        assert grad[0, 1] == grad[0, 2] != grad[0, 3]


def test_entropies():
    logits = _logits(5, 9)
    p = logits.softmax(-1)
    for backend in (None, "reference"):
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
    for backend in (None, "reference"):
        value = F.entropy(masked, backend=backend)
        assert torch.allclose(value, F.entropy(masked[:, [0, 1, 2, 4, 5, 6, 7, 8]]))
        assert torch.isfinite(torch.autograd.grad(value.sum(), masked)[0]).all()
    assert F.entropy(logits[:0]).shape == (0,)
    assert F.principal_entropy(logits[:0], 3).shape == (0,)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_nan_is_never_hidden(backend):
    """What decides that an update is skipped must not turn nan into 0."""
    logits = _logits(4, 6).detach()
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
    q, k = (x.detach() for x in _qk(2, 2, (4, 3), 4))
    q[1, 0, 2, 1] = torch.nan
    for heads in ("mean", "each"):
        loss = F.attention_bootstrap(q, k, (4, 3), heads=heads, backend=backend)
        assert torch.isnan(loss).tolist() == [False, True]


def test_weights_select_samples():
    logits, weight = _logits(6, 9), torch.tensor([1.0, 0, 1, 0, 0, 1]).double()
    for form in ("mean", "softmax-sum"):
        found = F.adaptation_head(logits, 4, balance=form, weight=weight)
        expected = F.adaptation_head(logits[weight > 0], 4, balance=form)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b)
        assert torch.allclose(F.balance_entropy(logits, form, weight=weight), expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_in_lower_precision(dtype):
    logits = _logits(16, 309, dtype=dtype)
    head = F.adaptation_head(logits, 28)
    assert {x.dtype for x in head} == {torch.float32}
    grad = torch.autograd.grad(head[0], logits)[0]
    exact = logits.detach().double().requires_grad_()
    expected = F.adaptation_head(exact, 28, backend="reference")
    for found, right in zip(head, expected, strict=True):
        _close(found, right, torch.float32, "value")
    assert grad.dtype == dtype
    _close(grad, torch.autograd.grad(expected[0], exact)[0], dtype, "gradient")


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", ["logit_c50", "logit_c309"])
def test_logit_goldens(golden, case, backend):
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


# --------------------------------------------------------------------------- derivatives, registry


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_gradcheck_attention(heads, backend):
    q, k = _qk(2, 2, (3, 4, 2), 3)
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
def test_gradcheck_logits(backend):
    logits, weight = _logits(5, 7), torch.linspace(0.2, 1, 5).double()
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
    q, k = (x.detach() for x in _qk(2, 3, (4, 3), 5, torch.float32, layout="packed"))
    logits, weight = torch.randn(4, 6), torch.rand(4)
    for per_head in (False, True):
        mean, std = reference.score_moments(q, k, [4, 3], 0.5, per_head)
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
    yield "entropy_backward", (torch.rand(4), logits)
    yield "principal_entropy", (logits, 2, 1e-6)
    yield "principal_entropy_backward", (torch.rand(4), logits, 2, 1e-6)
    for w in ((), (weight,)):
        yield "balance_entropy", (logits, True, *w)
        yield "adaptation_head", (logits, 2, False, 1e-6, *w)


def test_opcheck_covers_every_op():
    assert {name for name, _ in _op_samples()} == set(schema.SCHEMAS)


@pytest.mark.parametrize(
    ("name", "args"), list(_op_samples()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.fasttta, name).default, args)


def test_compiles_without_a_break():
    """torch.compile sees the operations as single nodes."""

    def loss(q, k, logits):
        total, _, _ = autograd.adaptation_head(logits, 3, 1.0, 1.0, False, 1e-6)
        return total + autograd.attention_bootstrap(q, k, [4, 3], 0.5, False, False)[0].mean()

    q, k = _qk(2, 2, (4, 3), 5, torch.float32)
    logits = _logits(4, 6, dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (q, k, logits)
    expected, found = loss(*inputs), compiled(*inputs)
    assert torch.allclose(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_no_batch_of_score_maps_is_held(heads):
    """Peak of live tensor bytes: a few tiles of one sample, however large the batch."""
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
    q, k = (x.detach() for x in _qk(batch, heads_n, spans, d, torch.float32))
    with Largest():
        mean, std = composite.score_moments(q, k, list(spans), 0.5, heads == "each")
        composite.score_moments_backward(mean, std, q, k, std, list(spans), 0.5, heads == "each")
    assert Largest.size <= max(400 * 400, q.numel())

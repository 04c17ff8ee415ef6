"""The C++ kernel of each head's moments: equal to the reference, and used where it is made for."""

from __future__ import annotations

import pytest
import torch
from op_cases import TOLERANCES, close, qk

from fasttta import functional as F
from fasttta.ops import native
from fasttta.ops import score_moments_default as in_pytorch
from fasttta.ops.score_moments import score_moments_reference

# samples, heads, spans, channels: of CAV-MAE's fusion block, and what fills no vector or chunk
SIZES = [
    (1, 2, (512, 196), 64),
    (2, 3, (4, 3), 5),
    (1, 1, (65, 2, 130), 17),
    (3, 1, (9,), 1),
    (1, 2, (2, 20), 100),
    (2, 1, (31, 33), 256),
    (0, 2, (4, 3), 8),
]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    if not native.load():
        pytest.skip(f"no C++ kernels: {native.attempt().reason}")
    monkeypatch.setattr("op_cases.DEVICE", torch.device("cpu"))


def moments(q, k, spans, ups, backend=None):
    """Means, stds and gradients on q and k of their sum by ``ups``."""
    computed = F.score_moments(q, k, spans, heads="each", backend=backend)
    return *computed, *torch.autograd.grad(computed, (q, k), ups)


@pytest.mark.filterwarnings("ignore:std")  # of no samples, in the reference
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_reference(size, dtype, layout, monkeypatch):
    batch, heads, spans, d = size
    q, k = qk(batch, heads, spans, d, dtype, layout)
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    shape = (2, batch, heads, len(spans), len(spans))
    ups = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.1
    wide = torch.promote_types(dtype, torch.float32)
    right = _reference(*exact, spans, ups.double())
    monkeypatch.setattr(in_pytorch, "_moments_per_head", None)  # PyTorch's calls
    monkeypatch.setattr(in_pytorch, "_backward_per_head", None)
    computed = _ours(q, k, spans, ups.to(wide))
    for name, x, y in zip(("mean", "std", "grad_q", "grad_k"), computed, right, strict=True):
        kept = wide if name in ("mean", "std") else dtype
        assert x.dtype == kept
        close(x, y, kept if kept != torch.float64 else dtype, name)
    assert computed[2].stride() == torch.empty_like(q).stride()


def _ours(q, k, spans, ups):
    options = [*spans], q.shape[3] ** -0.5, True
    mean, std = in_pytorch.score_moments(q.detach(), k.detach(), *options)
    return (
        mean,
        std,
        *in_pytorch.score_moments_backward(*ups, q.detach(), k.detach(), std, *options),
    )


def _reference(q, k, spans, ups):
    computed = score_moments_reference(q, k, [*spans], q.shape[3] ** -0.5, True)
    return *(x.detach() for x in computed), *torch.autograd.grad(computed, (q, k), tuple(ups))


def test_nothing_cancels():
    """At a mean of 1000 standard deviations float32 keeps 5 digits of the std."""
    q, k = qk(2, 2, (512, 196), 64, torch.float32)
    axis = torch.zeros(64)
    axis[5] = 8000.0
    q = (q + 0.3 * axis).detach()
    k = (k + 0.3 * axis).detach()
    computed = torch.ops.fasttta.head_moments(q, k, [512, 196], 0.125)
    right = score_moments_reference(q.double(), k.double(), [512, 196], 0.125, True)
    assert (right[0] / right[1]).median() > 1000
    for x, y in zip(computed, right, strict=True):
        assert ((x - y).abs() <= 1e-5 * y).all()


def test_one_modality_alone_has_no_gradient():
    """Not even where its tokens are not finite."""
    q, k = (x.detach() for x in qk(1, 2, (9,), 8, torch.float32))
    q[0, 0, 3, 2] = torch.nan
    computed = in_pytorch.moments_backward(
        *torch.ones(2, 1, 2, 1, 1), q, k, torch.ones(1, 2, 1, 1), [9], 0.3, True, False
    )
    assert not any(x.any() for x in computed)


def test_the_same_with_any_number_of_threads():
    q, k = (x.detach() for x in qk(3, 3, (70, 30), 24, torch.float32))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_ours(q, k, (70, 30), torch.ones(2, 3, 3, 2, 2)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nan_stays_with_its_head():
    q, k = (x.detach() for x in qk(2, 3, (7, 6), 8, torch.float32))
    q[1, 2, 9, 3] = torch.nan
    computed = _ours(q, k, (7, 6), torch.ones(2, 2, 3, 2, 2))
    assert computed[0][1, 2].isnan().any(-1).tolist() == [False, True]
    for x in computed:
        bad = x.flatten(2).isnan().any(2)
        assert bad.tolist() == [[False] * 3, [False, False, True]]


def _channels_apart(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("case", ["wide", "channels apart", "off"])
def test_pytorch_serves_the_rest(case, monkeypatch):
    """And a named backend says why the kernel does not."""
    monkeypatch.setattr(in_pytorch, "_WIDEST", 15 if case == "wide" else 256)
    q, k = (x.detach() for x in qk(2, 3, (7, 6), 16, torch.float64))
    if case == "channels apart":
        q = _channels_apart(q)
    why = {
        "wide": "1 to 15 channels a head, found 16",
        "channels apart": "channels next to each other",
        "off": "not there: no compiler",
    }[case]
    if case == "off":
        monkeypatch.setattr(native, "loaded", False)
        monkeypatch.setattr(native, "_outcome", native.Outcome(None, "no compiler"))
        monkeypatch.setattr(native, "_tell", lambda _: None)
    monkeypatch.setattr(torch.ops.fasttta, "head_moments", None)
    q, k = q.requires_grad_(), k.requires_grad_()
    ups = torch.rand(2, 2, 3, 2, 2, dtype=torch.float64)
    for x, y in zip(
        moments(q, k, (7, 6), tuple(ups)), moments(q, k, (7, 6), tuple(ups), "reference"),
        strict=True,
    ):  # fmt: skip
        close(x, y, torch.float64, case)
    with pytest.raises(ValueError, match=f"backend='cpp': .*{why}"):
        F.score_moments(q, k, (7, 6), heads="each", backend="cpp")


def test_by_name():
    """backend="cpp" has moments of each head, with or without the loss; of their mean PyTorch."""
    q, k = qk(2, 3, (7, 6), 16, torch.float64)
    for heads in ("each", "mean"):
        for call in (F.score_moments, F.attention_bootstrap):
            if heads == "mean":
                with pytest.raises(ValueError, match="matrix products"):
                    call(q, k, (7, 6), heads=heads, backend="cpp")
                continue
            computed = call(q, k, (7, 6), heads=heads, backend="cpp")
            right = call(q, k, (7, 6), heads=heads, backend="reference")
            for x, y in zip(computed, right, strict=True):
                close(x, y, torch.float64, call.__name__)


def test_declared():
    q, k = (x.detach() for x in qk(2, 3, (7, 6), 16, torch.float32, "packed"))
    op = torch.ops.fasttta
    up = torch.rand(2, 3, 2, 2)
    grads = torch.empty_like(q), torch.empty_like(k)
    torch.library.opcheck(op.head_moments.default, (q, k, [7, 6], 0.5))
    args = (up, up, q, k, [7, 6], 0.5, False, *grads)
    torch.library.opcheck(op.head_moments_backward.default, args)


def test_refuses_what_does_not_fit():
    op = torch.ops.fasttta
    q = torch.randn(2, 3, 13, 16)
    up, grads = torch.rand(2, 3, 2, 2), (torch.empty_like(q), torch.empty_like(q))
    for bad, match in (
        ((q, q[:, :, 1:], [7, 6], 1.0), "alike"),
        ((q, q.double(), [7, 6], 1.0), "alike"),
        ((q, q, [7, 5], 1.0), "add up to T"),
        ((q, q, [13, 0], 1.0), "positive"),
        ((_channels_apart(q), q, [7, 6], 1.0), "next to each other"),
        ((q.int(), q.int(), [7, 6], 1.0), "float64, float32"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.head_moments(*bad)
    with pytest.raises(RuntimeError, match=r"\[B, H, M, M\]"):
        op.head_moments_backward(up[:1], up, q, q, [7, 6], 1.0, False, *grads)
    short = [x[:, :, 1:] for x in grads]
    with pytest.raises(RuntimeError, match="add up to T"):
        op.head_moments_backward(up, up, q, q, [7, 6], 1.0, False, *short)
    with pytest.raises(RuntimeError, match="q's type"):
        op.head_moments_backward(up, up, q, q, [7, 6], 1.0, False, *(x.double() for x in grads))

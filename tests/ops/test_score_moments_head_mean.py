"""The C++ kernels of score blocks: equal to the formula in float64, and used where they serve."""

from __future__ import annotations

import pytest
import torch
from op_cases import TOLERANCES, close, qk, without_native

from fasttta import functional as F
from fasttta.ops import native, score_moments_default

# samples, row spans, column spans: of CAV-MAE's fusion block, what fills no vector, strip or
# chunk, rows of several chunks, the smallest block that has a std
SIZES = [
    (1, (512, 196), (512, 196)),
    (2, (512,), (196,)),
    (3, (4, 3), (5,)),
    (2, (33, 1, 16), (2, 515, 1030)),
    (1, (1, 7), (2, 17)),
    (5, (2,), (1,)),
    (0, (4, 3), (4, 3)),
]
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    if not native.load():
        pytest.skip(f"no C++ kernels: {native.attempt().reason}")
    monkeypatch.setattr("op_cases.DEVICE", torch.device("cpu"))


def scores_of(batch, rows, columns, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, sum(rows), sum(columns)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def ups_of(batch, rows, columns, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    shape = 2, batch, len(rows), len(columns)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) + 0.1


def formula(scores, rows, columns, c):
    """Mean and std [b, M, N], differentiable."""
    blocks = [x.split(columns, 2) for x in (c * scores).split(rows, 1)]
    mean, std = (
        torch.stack([torch.stack([f(x) for x in row], 1) for row in blocks], 1)
        for f in (lambda x: x.mean((1, 2)), lambda x: x.flatten(1).std(1))
    )
    return mean, std


def run(scores, rows, columns, c, ups):
    """Mean, std and gradient on the scores of their sums by ``ups``."""
    mean, std = score_moments_default._block_moments(scores.clone(), [*rows], [*columns], c)
    grad = scores.clone()
    score_moments_default._block_gradients(ups[0], ups[1] / std, [*rows], [*columns], c, grad)
    return mean, std, grad


@pytest.mark.filterwarnings("ignore:std")  # of no samples, in the formula
@pytest.mark.parametrize("native_code", [True, False], ids=["cpp", "pytorch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_formula(size, dtype, native_code, monkeypatch):
    if not native_code:
        without_native(monkeypatch)
    scores, ups = scores_of(*size, dtype), ups_of(*size, dtype)
    exact = scores.double().requires_grad_()
    right = formula(exact, *size[1:], -0.3)
    (moved,) = torch.autograd.grad(right, exact, tuple(ups.double()))
    computed = run(scores, *size[1:], -0.3, ups)
    for name, x, y in zip(("mean", "std", "grad"), computed, (*right, moved), strict=True):
        assert x.dtype == dtype
        close(x, y.detach(), dtype, name)


@pytest.mark.parametrize("sink", [False, True], ids=["alike", "one key apart"])
def test_nothing_cancels(sink):
    """At a mean of 1000 standard deviations float32 keeps 5 digits of the std; first scores of
    rows that are unlike the others are no worse."""
    scores = scores_of(2, (512, 196), (512, 196)).add_(1000)
    if sink:
        scores[:, :, 0] = -1e5
        scores[:, :, 512] = 0
    scores = scores.float()
    computed = torch.ops.fasttta.block_moments(scores, [512, 196], [512, 196], 1.0)
    right = formula(scores.double(), (512, 196), (512, 196), 1.0)
    assert sink or (right[0] / right[1]).min() > 990
    for x, y in zip(computed, right, strict=True):
        assert ((x - y).abs() <= 1e-6 * y.abs()).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_constant_scores_have_no_deviation(value):
    scores = torch.full((1, 70, 33), value)
    mean, std = torch.ops.fasttta.block_moments(scores, [70], [30, 3], 2.0)
    assert (mean == 2 * scores[0, 0, 0]).all()
    assert (std <= 1e-7 * abs(value)).all()


def test_the_same_with_any_number_of_threads():
    size = 2, (300, 77), (210, 190)
    scores, ups = scores_of(*size, torch.float32), ups_of(*size, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(scores, *size[1:], 0.3, ups))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_stays_with_its_block(value):
    size = 2, (20, 7), (18, 9)
    scores, ups = scores_of(*size), ups_of(*size)
    scores[1, 22, 20] = value
    mean, std, grad = run(scores, *size[1:], 1.0, ups)
    bad = torch.zeros(2, 2, 2, dtype=torch.bool)
    bad[1, 1, 1] = True
    assert torch.equal(~mean.isfinite(), bad)
    assert str(mean[1, 1, 1].item()) == str(value)
    assert torch.equal(std.isnan(), bad)
    assert grad[1, 20:, 18:].isnan().all()
    assert grad.isnan().sum() == 7 * 9


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_statistics_with_and_without(layout, dtype, monkeypatch):
    """score_moments of the heads' mean by C++ and by PyTorch's passes, each of which is called."""
    calls, op = [], torch.ops.fasttta

    def counted(name):
        kernel = getattr(op, name)

        def call(*args):
            calls.append(name)
            return kernel(*args)

        monkeypatch.setattr(op, name, call)

    for name in ("block_moments", "block_moments_backward"):
        counted(name)
    q, k = qk(3, 2, (40, 24), 6, dtype, layout)
    results = []
    for there in (True, False):
        if not there:
            without_native(monkeypatch)
        computed = F.score_moments(q, k, (40, 24))
        results.append((*computed, *torch.autograd.grad([x.sum() for x in computed], (q, k))))
        assert set(calls) == ({"block_moments", "block_moments_backward"} if there else set())
        calls.clear()
    for name, x, y in zip(("mean", "std", "dq", "dk"), *results, strict=True):
        close(x, y, x.dtype, name)


def test_declared():
    size = 2, (4, 3), (5, 2)
    scores, ups = scores_of(*size), ups_of(*size)
    op, spans = torch.ops.fasttta, ([4, 3], [5, 2])
    torch.library.opcheck(op.block_moments.default, (scores, *spans, 0.5))
    torch.library.opcheck(op.block_moments_backward.default, (*ups, *spans, 0.5, scores))


def test_refuses_what_does_not_fit():
    op = torch.ops.fasttta
    scores, spans, ups = torch.randn(2, 7, 9), ([4, 3], [5, 4]), torch.rand(2, 2, 2, 2)
    for bad, match in (
        ((scores[0], *spans), "without gaps"),
        ((scores[:, :, ::2], [7], [5]), "without gaps"),
        ((scores.bfloat16(), *spans), "float32 or float64"),
        ((scores.int(), *spans), "float32 or float64"),
        ((scores, [4, 4], [5, 4]), "add up to R"),
        ((scores, [7, 0], [5, 4]), "add up to R"),
        ((scores, [4, 3], [5, 5]), "add up to C"),
        ((scores, [4, 3], []), "add up to C"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.block_moments(*bad, 1.0)
        with pytest.raises(RuntimeError, match=match):
            op.block_moments_backward(*ups, *bad[1:], 1.0, bad[0])
    for bad in ((ups[0, :1], ups[1]), (ups[0], ups[1, :, :1]), (ups[0, 0], ups[1])):
        with pytest.raises(RuntimeError, match=r"\[B, M, N\]"):
            op.block_moments_backward(*bad, *spans, 1.0, scores)

"""The C++ attention in bf16: as near to float64 as PyTorch's, and used where it is faster."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import SHAPES, formula, near
from attention_cases import heads as float_heads

from fasttta.ops import native, processor, softmax_attention
from fasttta.ops.registry import ops

# more of what fills no pair: odd numbers of queries, keys and channels
ODD = [(1, 2, 7, 9, 63), (2, 1, 1, 3, 2), (1, 3, 5, 130, 17), (1, 1, 49, 129, 66)]


@pytest.fixture(autouse=True, scope="module")
def _built():
    if not native.load():
        pytest.skip(f"no C++ kernels: {native.attempt().reason}")


def heads(*shape, **options):
    return float_heads(*shape, **options).bfloat16()


def run(q, k, v, up, scale, forward, backward):
    """Attention, log-sum-exp and gradients by two operators, as float64."""
    out, lse = forward(q, k, v, scale)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    grads = backward(up, q, k, v, out, lse, scale)
    return [x.double() for x in (out, lse, *grads)]


def flash(q, k, v, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def flash_backward(*args):
    name = "_scaled_dot_product_flash_attention_for_cpu_backward"
    return getattr(torch.ops.aten, name)(*args[:-1], 0.0, False, attn_mask=None, scale=args[-1])


def exactly(q, k, v, up, scale):
    """The same in float64, from the same bf16 numbers."""
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out = formula(*exact, scale)
    lse = (scale * exact[0] @ exact[1].mT).logsumexp(-1)
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out, exact, up.double()))]


@pytest.mark.parametrize("shape", [*SHAPES, *ODD], ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["usual", "sharp"])
def test_as_near_to_float64_as_pytorch(shape, size):
    b, h, t, s, d = shape
    q, k = heads(b, h, t, d, scale=size), heads(b, h, s, d, seed=1)
    v, up = heads(b, h, s, d, seed=2), heads(b, h, t, d, seed=3)
    computed = run(q, k, v, up, d**-0.5, ops.attention, ops.attention_backward)
    if not b:
        assert [x.shape for x in computed] == [q.shape, q.shape[:3], q.shape, k.shape, v.shape]
        return
    exact = exactly(q, k, v, up, d**-0.5)
    theirs = run(q, k, v, up, d**-0.5, flash, flash_backward)
    near(computed[1], exact[1])
    for ours, right, other in zip(computed, exact, theirs, strict=True):
        one_rounding = 2**-9 * right.abs().max()
        assert (ours - right).abs().max() <= 1.5 * (other - right).abs().max() + one_rounding


@pytest.mark.parametrize("scale", [0.25, -0.25, 0.0])
def test_any_scale(scale):
    q, k, v, up = (heads(1, 2, 21, 16, seed=i) for i in range(4))
    computed = run(q, k, v, up, scale, ops.attention, ops.attention_backward)
    for ours, right in zip(computed, exactly(q, k, v, up, scale), strict=True):
        near(ours, right, 2e-2)


@pytest.mark.parametrize("size", [5.71875, 20.0], ids=["infinite", "past infinity"])
def test_scores_far_from_zero(size):
    """Those of the columns that fill up a vector are zero, so their weights overflow: to 2^128 or,
    where the exponent wraps round, to anything."""
    q, k = torch.full((1, 2, 21, 16), 4.0).bfloat16(), torch.full((1, 2, 21, 16), -size).bfloat16()
    v, up = (heads(1, 2, 21, 16, seed=i) for i in (2, 3))
    computed = run(q, k, v, up, 0.25, ops.attention, ops.attention_backward)
    exact = exactly(q, k, v, up, 0.25)
    if size < 6:
        assert (exact[1] / math.log(2)).round().unique().tolist() == [-128.0]
    assert all(x.isfinite().all() for x in computed)
    near(computed[1], exact[1])
    near(computed[0], exact[0], 1e-2)
    near(computed[4], exact[4], 1e-2)


def test_the_same_with_any_number_of_threads():
    q, k, v, up = (heads(2, 3, 131, 16, seed=i) for i in range(4))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(q, k, v, up, 0.25, ops.attention, ops.attention_backward))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nan_and_infinity_stay_in_their_rows():
    q, k, v, up = (heads(1, 2, 21, 16, seed=i).clone() for i in range(4))
    q[0, 0, 3, 2], q[0, 0, 5, 1] = torch.nan, torch.inf
    out, lse, dq, *_ = run(q, k, v, up, 0.25, ops.attention, ops.attention_backward)
    rows = torch.zeros(1, 2, 21, dtype=torch.bool)
    rows[0, 0, [3, 5]] = True
    assert torch.equal(~out.isfinite().all(-1), rows)
    assert torch.equal(~lse.isfinite(), rows)
    assert torch.equal(~dq.isfinite().all(-1), rows)
    v[0, 1, 4] = torch.nan
    assert ops.attention(q, k, v, 0.25)[0][0, 1].isnan().all()


def test_layouts():
    """Channels that do not lie next to each other, and odd addresses."""
    q, k, v, up = (heads(2, 2, 21, 16, seed=i) for i in range(4))
    right = run(q, k, v, up, 0.25, ops.attention, ops.attention_backward)
    strided = [x.mT.contiguous().mT for x in (q, k, v, up)]
    shifted = [torch.cat((x, x[..., :1]), -1)[..., :-1] for x in (q, k, v, up)]
    for args in (strided, shifted):
        computed = run(*args, 0.25, ops.attention, ops.attention_backward)
        assert all(map(torch.equal, computed, right))


@pytest.mark.parametrize("vectors", [True, False])
def test_serves_where_the_processor_has_vectors_but_no_tiles(vectors, monkeypatch):
    for tiles in (False, True):
        monkeypatch.setattr(processor, "bf16_vectors", lambda: vectors)
        monkeypatch.setattr(processor, "bf16_tiles", lambda tiles=tiles: tiles)
        leaves = [heads(1, 2, 20, 16, seed=i).requires_grad_() for i in range(3)]
        calls = []
        with monkeypatch.context() as patch:
            kept = ops.attention
            patch.setattr(softmax_attention, "ops", _Counting(kept, ops.attention_backward, calls))
            out = softmax_attention.attend(*leaves, 0.25)
            grads = torch.autograd.grad(out.sum(), leaves)
        assert len(calls) == (2 if vectors and not tiles else 0)
        assert {x.dtype for x in (out, *grads)} == {torch.bfloat16}


class _Counting:
    """Stands for the operators and counts calls."""

    def __init__(self, forward, backward, calls):
        self.attention = lambda *args: calls.append(1) or forward(*args)
        self.attention_backward = lambda *args: calls.append(1) or backward(*args)


def test_refuses_mixed_types():
    q, k = heads(1, 2, 20, 16), heads(1, 2, 21, 16)
    for bad in ((q, k.float(), k), (q, k, k.float()), (q.half(), k.half(), k.half())):
        with pytest.raises(RuntimeError, match="must be"):
            ops.attention(*bad, 1.0)


def test_declared():
    q, k = heads(2, 2, 20, 16), heads(2, 2, 21, 16)
    out, lse = ops.attention(q, k, k, 0.25)
    for name, args in (
        ("attention", (q, k, k, 0.25)),
        ("attention_backward", (out, q, k, k, out, lse, 0.25)),
    ):
        torch.library.opcheck(getattr(torch.ops.fasttta, name).default, args)

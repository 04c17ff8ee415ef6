"""The Triton kernels of packed sequences with a shared prefix against the composite."""

from __future__ import annotations

import pytest
import torch
from kernels_here import DEVICE, HALVES, KERNELS, among_nan, check, composite, poisoned  # noqa: F401

from fasttta.ops.shared_prefix_attention import layout

FORWARD, BACKWARD = "shared_prefix_attention", "shared_prefix_attention_backward"


def _arguments(lengths, prefix=5, heads=2, d=4, batch=1, last=False, dtype=torch.float32, size=1.0):
    """Views of packed projections, as a text tower has them; last: queries of last tokens."""
    generator = torch.Generator().manual_seed(sum(lengths) + prefix)

    def projection(count):
        x = torch.randn(batch, count, 3 * heads * d, generator=generator)
        return x.to(DEVICE, dtype).chunk(3, dim=-1)

    (q, k, v), (_, *shared) = projection(sum(lengths)), projection(prefix)
    packed = layout(lengths, DEVICE)
    if last:
        q = q.index_select(1, packed.starts[1:] - 1)
    return size * q, k, v, *shared, *packed, heads, d**-0.5


def _check(args, slack=1.0):
    out, _ = check(FORWARD, *args, slack=slack)
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    saved = composite.shared_prefix_attention(*args)
    # a sequence of one token has no gradient of scores
    return check(BACKWARD, grad, *args[:5], *saved, *args[5:], slack=slack, floor=1e-7)


def _run(args, grad=None):
    """Results of both directions."""
    out, lse = KERNELS[FORWARD](*args)
    grad = torch.ones_like(out) if grad is None else grad
    return out, lse, *KERNELS[BACKWARD](grad, *args[:5], out, lse, *args[5:])


RAGGED = [3, 1, 4, 2]
SEVERAL = [20, 30, 14, 1, 40, 3, 7]  # of 64, 51 tokens


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5, 20])
@pytest.mark.parametrize("lengths", [[1], [4, 4, 4], RAGGED], ids=str)
def test_lengths(lengths, prefix, last):
    _check(_arguments(lengths, prefix, 1, last=last))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [SEVERAL, [64], [64, 64, 1], [63, 2], [1] * 65],
    ids=["several", "64", "more", "65", "ones"],
)
def test_tiles(lengths, last):
    _check(_arguments(lengths, heads=1, last=last))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("batch", "heads", "d"), [(3, 1, 20), (1, 3, 1), (2, 1, 64)])
def test_samples_and_heads(batch, heads, d, last):
    _check(_arguments(RAGGED, 3, heads, d, batch, last))


def test_many_tiles():
    """Cut short: more than are added at once."""
    args = list(_arguments([2] * 18, 1, 1, 2))
    args[6] = torch.arange(19, dtype=torch.int32, device=DEVICE)
    _check(args)


@pytest.mark.parametrize("last", [False, True])
def test_strided_and_among_nan(last):
    q, k, v, prefix_k, prefix_v, *rest = _arguments([20, 30, 9], batch=2, heads=1, last=last)
    tensors = map(among_nan, (q, k, v, prefix_k, prefix_v))
    _check((*tensors, *rest))


def test_rows_that_are_not_contiguous():
    args = _arguments(RAGGED)
    tensors = (x.mT.contiguous().mT for x in args[:5])
    _check((*tensors, *args[5:]))


def test_a_prefix_that_samples_share():
    q, k, v, prefix_k, prefix_v, *rest = _arguments(RAGGED, batch=3)
    shared = (x[:1].expand(3, -1, -1) for x in (prefix_k, prefix_v))
    _check((q, k, v, *shared, *rest))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype, last):
    _check(_arguments([20, 30, 9], heads=1, d=12, batch=2, last=last, dtype=dtype), slack=2.0)


@pytest.mark.parametrize("last", [False, True])
def test_wide_heads_in_bfloat16(last):
    """128 channels, which no other type has, and several tiles."""
    _check(_arguments(SEVERAL[:4], 20, 1, 128, last=last, dtype=torch.bfloat16), slack=2.0)


def test_large_scores():
    """Hundreds, also with keys that a query does not see; blocks of keys of which it sees none."""
    _check(_arguments(SEVERAL[:4], 0, 1, size=200.0), slack=50.0)


def _with(args, grad, place, row, value):
    """Both directions with one value of q, k, v or the gradient changed, in the second sample."""
    tensors = [x.clone() for x in (*args[:3], grad)]
    tensors[place][1, row, 1] = value
    out, lse, *grads = _run((*tensors[:3], *args[3:]), tensors[3])
    return out, lse.mT, *grads


@pytest.mark.parametrize("place", range(4), ids=["q", "k", "v", "grad"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_sequence(dtype, place, last):
    """Tiles share products; of the second sequence's four tokens the second one is bad."""
    args = _arguments([3, 4, 2], 2, 1, batch=2, last=last, dtype=dtype)
    grad = torch.ones_like(args[0])
    row = 1 if last and place in (0, 3) else 4
    clean = _with(args, grad, place, row, 0.0)
    for value in (torch.nan, torch.inf):
        results = _with(args, grad, place, row, value)
        for n, (x, y) in enumerate(zip(results, clean, strict=True)):
            assert torch.equal(x[0], y[0])
            if n < 5:
                changed = slice(1, 2) if last and n < 3 else slice(3, 7)
                unchanged = torch.ones(x.shape[1], dtype=torch.bool)
                unchanged[changed] = False
                assert torch.equal(x[1, unchanged], y[1, unchanged])
        if place == 1 and value == torch.inf:
            continue  # a score of -inf is no attention
        out, lse, dq, dk, dv, prefix_dk, prefix_dv = (x[1] for x in results)
        queries = slice(1, 2) if last else slice(4, 7) if place in (1, 2) else slice(4, 5)
        keys = slice(3, 7) if last else slice(3, 5)  # that those queries see
        wrong = [dq[queries], dk[keys], prefix_dk]
        wrong += [out[queries]] if place < 3 else []
        wrong += [lse[queries]] if place < 2 else []
        wrong += [dv[keys], prefix_dv] if place != 2 else []
        assert not any(x.isfinite().any() for x in wrong)
        if not last:
            assert out[3].isfinite().all()  # does not see the bad one


def test_nan_in_a_prefix_reaches_its_whole_sample():
    for place in (3, 4):
        args = list(_arguments(RAGGED, batch=2))
        args[place] = args[place].clone()
        args[place][1, 2, :] = torch.nan
        out, *_ = results = _run(args)
        assert all(x[0].isfinite().all() for x in results)
        assert out[1].isnan().all()


def test_same_bits_twice():
    args = _arguments([20, 50, 3], batch=2, heads=1)
    assert all(torch.equal(x, y) for x, y in zip(_run(args), _run(args), strict=True))


def test_longer_sequences_and_wider_heads_are_the_composites(monkeypatch):
    monkeypatch.setattr("fasttta.ops.triton.kernels", None)  # nothing is to be loaded
    for args in (_arguments([65, 3]), _arguments(RAGGED, d=65)):
        results, expected = KERNELS[FORWARD](*args), composite.shared_prefix_attention(*args)
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))

"""Attention of packed sequences with a shared prefix: reference, C++ and composite."""

from __future__ import annotations

import functools

import pytest
import torch
from op_cases import DEVICE, close, using

from fasttta import functional as F
from fasttta.ops import native
from fasttta.ops.shared_prefix_attention import causal_with_prefix, layout

IMPLEMENTATIONS = ("default", "composite")
NAMES = ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
# lengths, tokens of the prefix, heads, channels of one
CASES = {
    "ragged": ([1, 4, 2, 2], 3, 2, 5),
    "equal": ([3, 3], 2, 1, 4),
    "single tokens": ([1, 1, 1], 5, 2, 3),
    "one sequence": ([6], 1, 3, 2),
    "no prefix": ([2, 5], 0, 2, 4),
    "several tiles": ([30, 30, 30, 4, 60, 1, 1], 5, 2, 6),
    "longer than a tile": ([3, 70, 2], 17, 1, 4),
    "heads of CLIP": ([2, 3, 9], 5, 2, 64),
}


def _tensors(case, last=False, batch=2, dtype=torch.float64, size=1.0):
    """q, k and v as parts of one projection, as the text tower has them, and lengths and heads."""
    lengths, prefix, heads, d = CASES[case]
    generator = torch.Generator().manual_seed(sum(lengths))

    def packed(tokens):
        x = torch.randn(batch, tokens, 3 * heads * d, generator=generator, dtype=torch.float64)
        return (size * x).to(DEVICE, dtype).chunk(3, -1)

    q, k, v = packed(sum(lengths))
    _, prefix_k, prefix_v = packed(prefix)
    q = q[:, torch.tensor(lengths).cumsum(0) - 1] if last else q
    tensors = [x.detach().requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
    return tensors, (lengths, heads)


def _with_gradients(tensors, options, backend=None, scale=0.7):
    out = F.shared_prefix_attention(*tensors, *options, scale, backend=backend)
    along = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return out, *torch.autograd.grad(out, tensors, along.to(out))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, last, implementation, monkeypatch):
    backend = using(implementation, monkeypatch)
    tensors, options = _tensors(case, last)
    expected = _with_gradients(tensors, options, "reference")
    computed = _with_gradients(tensors, options, backend)
    for name, x, y in zip(NAMES, computed, expected, strict=True):
        close(x, y, torch.float64, name)


@pytest.mark.parametrize("last", [False, True])
def test_reference_is_causal_attention_of_whole_sequences(last):
    (q, k, v, prefix_k, prefix_v), (lengths, heads) = _tensors("ragged")
    rows = torch.tensor(lengths).cumsum(0).tolist()
    queries = q[:, [n - 1 for n in rows]] if last else q
    computed = F.shared_prefix_attention(
        queries, k, v, prefix_k, prefix_v, lengths, heads, backend="reference"
    )
    start = 0
    for n, stop in enumerate(rows):
        whole = (
            torch.cat((shared, x[:, start:stop]), 1).unflatten(-1, (heads, -1)).transpose(1, 2)
            for shared, x in ((torch.zeros_like(prefix_k), q), (prefix_k, k), (prefix_v, v))
        )
        out = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True)
        out = out.transpose(1, 2).flatten(2)[:, prefix_k.shape[1] :]
        mine = computed[:, n : n + 1] if last else computed[:, start:stop]
        close(mine, out[:, -1:] if last else out, torch.float64, f"sequence {n}")
        start = stop


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[1]])
def test_prefix_in_front_of_the_packed_tokens(case, implementation, monkeypatch):
    """One call for both is the attention of each, gradients of the prefix from either added."""
    lengths, p, heads, d = CASES[case]
    generator = torch.Generator().manual_seed(p)
    shape = 2, p + sum(lengths), 3 * heads * d
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    qkv = [x.detach().requires_grad_() for x in qkv.chunk(3, -1)]
    (q0, q1), (k0, k1), (v0, v1) = ((x[:, :p], x[:, p:]) for x in qkv)
    call = functools.partial(F.shared_prefix_attention, heads=heads, backend="reference")
    front = call(q0, k0, v0, k0[:, :0], v0[:, :0], [p])
    expected = torch.cat((front, call(q1, k1, v1, k0, v0, lengths)), 1)
    using(implementation, monkeypatch)
    layouts = layout([p], DEVICE), layout(lengths, DEVICE)
    computed = causal_with_prefix(*qkv, *layouts, heads, d**-0.5)
    along = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    close(computed, expected, torch.float64, "out")
    for name, x, y in zip(
        "qkv", *(torch.autograd.grad(z, qkv, along) for z in (computed, expected)), strict=True
    ):
        close(x, y, torch.float64, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation, monkeypatch):
    using(implementation, monkeypatch)
    for case in ("ragged", "no prefix"):
        for last in (False, True):
            tensors, options = _tensors(case, last, batch=1)
            assert torch.autograd.gradcheck(
                lambda *x, given=options: F.shared_prefix_attention(*x, *given), tensors
            )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype, implementation, monkeypatch):
    using(implementation, monkeypatch)
    tensors, options = _tensors("several tiles", dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = _with_gradients(wide, options, "reference")
    for name, x, y in zip(NAMES, _with_gradients(tensors, options), exact, strict=True):
        assert x.dtype == dtype
        close(x, y, dtype, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores(implementation, monkeypatch):
    """One key takes it all; nothing overflows. Scores are some thousand, so float32's gradients
    have three digits."""
    using(implementation, monkeypatch)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        tensors, options = _tensors("ragged", dtype=dtype, size=30.0)
        exact = [x.detach().double().requires_grad_() for x in tensors]
        exact = _with_gradients(exact, options, "reference", 1.0)
        for x, y in zip(_with_gradients(tensors, options, None, 1.0), exact, strict=True):
            assert (x.double() - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_is_not_hidden_and_stays_in_its_sequence(implementation, monkeypatch):
    using(implementation, monkeypatch)
    tensors, options = _tensors("ragged")  # rows 1 to 4 are the second sequence
    q, k, v, prefix_k, prefix_v = (x.detach() for x in tensors)
    k[1, 2, 0] = torch.nan
    computed = F.shared_prefix_attention(q, k, v, prefix_k, prefix_v, *options)
    assert computed[1, 2:5, :5].isnan().all()  # of the first head's five channels
    clean = torch.ones(computed.shape, dtype=torch.bool)
    clean[1, 2:5, :5] = False
    assert computed[clean].isfinite().all()
    tensors = [x.requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
    out = F.shared_prefix_attention(*tensors, *options)
    dq, dk, dv, *shared = torch.autograd.grad(out.sum(), tensors)
    for x in (dq, dk, dv):
        assert x[1, 2:5].isnan().any()
        assert x[0].isfinite().all()
        assert x[1, [0, 5, 6, 7, 8]].isfinite().all()
    for x in shared:
        assert x[1].isnan().any()
        assert x[0].isfinite().all()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads of a CPU")
def test_results_do_not_depend_on_threads():
    tensors, options = _tensors("several tiles", dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_with_gradients(tensors, options))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))


def test_nothing_is_written_to_and_strides_do_not_matter():
    tensors, options = _tensors("several tiles")
    kept = [x.detach().clone() for x in tensors]
    apart = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors]
    for x, y in zip(
        _with_gradients(tensors, options), _with_gradients(apart, options), strict=True
    ):
        assert torch.equal(x, y)
        assert x.is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(kept, tensors, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_of_the_first_row_stays_there_and_no_sample_is_none(implementation, monkeypatch):
    """What fills up shorter sequences is no row of another one."""
    using(implementation, monkeypatch)
    tensors, options = _tensors("ragged")
    tensors[2].data[:, 0] = torch.nan
    computed = _with_gradients(tensors, options)
    for x in computed[:4]:
        assert x[:, 1:].isfinite().all()
    assert computed[0][:, 0].isnan().any()
    empty = [x.detach()[:0].requires_grad_() for x in tensors]
    for x, y in zip(_with_gradients(empty, options), (empty[0], *empty), strict=True):
        assert x.shape == y.shape


def test_layout():
    computed = layout([30, 30, 4, 60, 1, 3, 1])
    assert computed.starts.tolist() == [0, 30, 60, 64, 124, 125, 128, 129]
    assert computed.tiles.tolist() == [0, 3, 6, 7]
    assert computed.longest == 60
    assert layout([70, 1, 70]).tiles.tolist() == [0, 1, 2, 3]


def test_errors():
    (q, k, v, prefix_k, prefix_v), (lengths, heads) = _tensors("ragged")
    given = {
        "q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v, "lengths": lengths,
        "heads": heads,
    }  # fmt: skip
    for changed, kind, message in (
        ({"q": q[0]}, ValueError, r"q must be \[batch, tokens, heads \* head dim\]"),
        ({"q": q[:, :3]}, ValueError, "q must be of all 9 tokens or of the 4 sequences' last"),
        ({"q": q.float()}, TypeError, "q and k must have one dtype"),
        ({"v": v[:, :4]}, ValueError, "v and k must have one shape"),
        ({"prefix_k": prefix_k[:1]}, ValueError, r"prefix_k must be \[2, tokens, 10\] like k"),
        ({"prefix_v": prefix_v[:, 1:]}, ValueError, "prefix_v and prefix_k must have one shape"),
        ({"lengths": [4, 4]}, ValueError, "must be positive and sum to the 9 tokens of k"),
        ({"lengths": [9, 0]}, ValueError, r"positive and sum .* found \[9, 0\]"),
        ({"lengths": [4.5, 4.5]}, TypeError, "lengths must be integers"),
        ({"heads": 3}, ValueError, "heads=3 must divide the 10 channels"),
        ({"heads": 0}, ValueError, "heads=0 must be a positive integer"),
        ({"scale": float("nan")}, ValueError, "scale=nan must be finite"),
    ):
        with pytest.raises(kind, match=message):
            F.shared_prefix_attention(**given | changed)


@pytest.mark.skipif(DEVICE.type != "cpu" or not native.load(), reason="no C++ kernel here")
def test_the_kernel_refuses_what_it_cannot_read():
    tensors, (lengths, heads) = _tensors("ragged")
    q, k, v, prefix_k, prefix_v = (x.detach() for x in tensors)
    starts, tiles, longest = layout(lengths)
    op = torch.ops.fasttta.shared_prefix_attention
    good = [q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, 1.0]
    for at, bad, message in (
        (0, q[0], r"q must be \[B, tokens"),
        (0, q[:, :3], "every sequence's last"),
        (0, q.float(), "q must be of k's precision"),
        (2, v[:, 1:], "values must be as many"),
        (3, prefix_k[:1], "one batch and one width"),
        (5, starts.long(), "must be int32"),
        (5, starts.flip(0), "starts must ascend from 0 to 9"),
        (6, tiles * 2, "tiles must ascend from 0 to 4"),
        (8, 3, r"must be \[B, S, heads \* d\]"),
    ):
        args = [*good[:at], bad, *good[at + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            op(*args)

"""The C++ attention in float32: equal to the formula in float64, and used where it is made for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as nnf
from attention_cases import SHAPES, formula, heads, near
from op_cases import without_native

from fasttta.ops import native, processor, softmax_attention


@pytest.fixture(autouse=True, scope="module")
def _built():
    if not native.load():
        pytest.skip(f"no C++ kernels: {native.attempt().reason}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["usual", "sharp"])
def test_equals_the_formula(shape, size):
    """Forward, log-sum-exp and gradients against float64; sharp scores reach some thousand."""
    b, h, t, s, d = shape
    q, k = heads(b, h, t, d, scale=size), heads(b, h, s, d, seed=1)
    v, up = heads(b, h, s, d, seed=2), heads(b, h, t, d, seed=3)
    assert softmax_attention._suits(q, k, v)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = formula(*exact, d**-0.5)
    out, lse = softmax_attention.forward(q, k, v, d**-0.5)
    tolerance = 4e-6 * max(1.0, size * d**0.5 / 8)  # a score's own rounding moves its exponential
    near(out, expected.detach(), tolerance)
    near(lse, (d**-0.5 * exact[0] @ exact[1].transpose(-2, -1)).logsumexp(-1).detach())
    assert out.transpose(1, 2).is_contiguous()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    computed = torch.autograd.grad(softmax_attention.attend(*leaves, d**-0.5), leaves, up)
    right = torch.autograd.grad(expected, exact, up.double())
    for x, y in zip(computed, right, strict=True):
        near(x, y, tolerance)
    for x, y in zip(
        softmax_attention.backward(up, q, k, v, out, lse, d**-0.5), computed, strict=True
    ):
        assert torch.equal(x, y)


def test_the_same_with_any_number_of_threads():
    """Units of work are the same, and no sum goes across them."""
    q, k, v = (heads(2, 3, 130, 16, seed=i) for i in range(3))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, lse = softmax_attention.forward(q, k, v, 0.25)
            results.append((out, lse, *softmax_attention.backward(out, q, k, v, out, lse, 0.25)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nan_and_infinity_stay_where_they_are():
    q, k, v = (heads(1, 2, 20, 16, seed=i).clone() for i in range(3))
    q[0, 0, 3, 2], q[0, 0, 5, 1] = torch.nan, torch.inf
    out, _ = softmax_attention.forward(q, k, v, 0.25)
    rows = torch.zeros(1, 2, 20, dtype=torch.bool)
    rows[0, 0, [3, 5]] = True
    assert torch.equal(~out.isfinite().all(-1), rows)
    v[0, 1, 4] = torch.nan
    assert softmax_attention.forward(q, k, v, 0.25)[0][0, 1].isnan().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap's
@pytest.mark.parametrize(
    "case",
    ["float64", "bfloat16", "few queries", "long", "wide", "autocast", "vmap", "dual", "off"],
)
def test_pytorch_serves_the_rest(case, monkeypatch):
    """And gives what it gives."""
    t, s, d = {"few queries": (3, 20, 16), "long": (16, 4200, 4), "wide": (20, 20, 300)}.get(
        case, (20, 20, 16)
    )
    q, k, v = heads(1, 2, t, d), heads(1, 2, s, d, seed=1), heads(1, 2, s, d, seed=2)
    if case in ("float64", "bfloat16"):
        q, k, v = (x.to(getattr(torch, case)) for x in (q, k, v))
    monkeypatch.setattr(processor, "bf16_vectors", lambda: False)
    if case == "off":
        without_native(monkeypatch)
    monkeypatch.setattr(
        softmax_attention._Attention, "apply", lambda *_: pytest.fail("not for this")
    )
    q.requires_grad_()
    attend = softmax_attention.attend
    if case == "dual":
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
            attend(torch.autograd.forward_ad.make_dual(q.detach(), q.detach()), k, v, 0.25)
        return
    if case == "vmap":
        computed = torch.vmap(attend, in_dims=(0, 0, 0, None))(q[None], k[None], v[None], 0.25)[0]
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            computed = attend(q, k, v, 0.25)
    right = formula(*(x.detach().double() for x in (q, k, v)), 0.25)
    assert computed.dtype == (torch.bfloat16 if case == "autocast" else q.dtype)
    near(computed.detach(), right, 2e-2 if computed.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("gap", [60.0, 200.0])
def test_far_scores_leave_nothing_denormal(gap):
    """Products of denormal numbers take 40 times as long as others. One key has all of a query."""
    q, v, up = heads(1, 2, 64, 16), heads(1, 2, 64, 16, seed=1), heads(1, 2, 64, 16, seed=2)
    k = 0.01 * heads(1, 2, 64, 16, seed=3)
    k[:, :, 5] = 16 * gap * q.sum(2) / q.sum(2).square().sum(-1, keepdim=True)
    q = q.sum(2, keepdim=True) + 0.01 * q  # q·k of key 5 exceeds the others by about 16 gap
    out, lse = softmax_attention.forward(q, k, v, 1 / 16)
    computed = softmax_attention.backward(1e-6 * up, q, k, v, out, lse, 1 / 16)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = formula(*exact, 1 / 16)
    near(out, expected.detach(), 1e-5)
    right = torch.autograd.grad(expected, exact, 1e-6 * up.double())
    assert (computed[2] - right[2]).abs().max() <= 1e-5 * right[2].abs().max()
    tiny = torch.finfo(torch.float32).tiny
    for x in (out, *computed):
        assert not ((x != 0) & (x.abs() < tiny)).any()


def test_declared():
    q, k = heads(2, 2, 20, 16), heads(2, 2, 21, 16)
    out, lse = torch.ops.fasttta.attention(q, k, k, 0.25)
    for name, args in (
        ("attention", (q, k, k, 0.25)),
        ("attention_backward", (out, q, k, k, out, lse, 0.25)),
    ):
        torch.library.opcheck(getattr(torch.ops.fasttta, name).default, args)


def test_layouts():
    """Channels that do not lie next to each other, expanded batches and gradients."""
    q, k, v = (heads(2, 2, 20, 16, seed=i) for i in range(3))
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.equal(
        softmax_attention.attend(*strided, 0.25), softmax_attention.attend(q, k, v, 0.25)
    )
    shared = k[:1].expand(2, -1, -1, -1)
    right = nnf.scaled_dot_product_attention(q.double(), shared.double(), v.double(), scale=0.25)
    near(softmax_attention.attend(q, shared, v, 0.25), right)
    results = []
    for dtype, attend in ((torch.float32, softmax_attention.attend), (torch.float64, formula)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k[:1], v)]
        many = leaves[1].expand(2, -1, -1, -1)
        out = attend(leaves[0], many, leaves[2], 0.25)
        out.sum().backward()  # a gradient without strides
        results.append([x.grad for x in leaves])
        out = attend(leaves[0], many, leaves[2], 0.25)
        results[-1] += torch.autograd.grad(out, leaves, strided[0].to(dtype))
    for x, y in zip(*results, strict=True):
        near(x, y)


_NARROW = """
import sys, torch
from fasttta.ops import flat_attention, native, native_build, softmax_attention as softmax
from fasttta.ops.score_moments import score_moments_reference
flags = native_build.flags
native_build.flags = lambda: (*(x for x in flags() if not x.startswith("-m")), *sys.argv[1:])
assert native.attempt().path is not None, native.attempt().reason
for shape in ((1, 2, 50, 37, 20), (2, 1, 64, 64, 64), (1, 1, 17, 5, 3)):
    b, h, t, s, d = shape
    for dtype in (torch.float32, torch.float64):
        q, up = torch.randn(2, b, h, t, d, dtype=dtype)
        k, v = torch.randn(2, b, h, s if dtype == torch.float32 else t, d, dtype=dtype)
        exact = [x.to(torch.float64, copy=True).requires_grad_() for x in (q, k, v)]
        if dtype == torch.float32:
            out, lse = torch.ops.fasttta.attention(q, k, v, 0.3)
            grads_qkv = torch.ops.fasttta.attention_backward(up, q, k, v, out, lse, 0.3)
            right = (0.3 * exact[0] @ exact[1].mT).softmax(-1) @ exact[2]
        else:
            saved = torch.ops.fasttta.flat_attention(q, k, v, 0.3)
            grads_qkv = torch.ops.fasttta.flat_attention_backward(up, q, k, v, *saved, 0.3)
            out = saved[0]
            scores = 0.3 * exact[0] @ exact[1].mT
            right = t * scores.flatten(-2).softmax(-1).view_as(scores) @ exact[2]
        pairs = zip((out, *grads_qkv), (right, *torch.autograd.grad(right, exact, up.double())))
        if s == t or dtype == torch.float64:  # moments of each head, of two spans
            spans, up_mean, up_std = [t - 7, 7], *torch.rand(2, b, h, 2, 2, dtype=dtype)
            mean, std = torch.ops.fasttta.head_moments(q, k, spans, 0.3)
            grads = torch.empty(2, *q.shape, dtype=dtype)
            torch.ops.fasttta.head_moments_backward(
                up_mean, up_std / std, q, k, spans, 0.3, True, *grads
            )
            right = score_moments_reference(*exact[:2], spans, 0.3, True)
            moved = torch.autograd.grad(right, exact[:2], (up_mean.double(), up_std.double()))
            pairs = [*pairs, *zip((mean, std, *grads), (*right, *moved))]
            scores = q[:, 0] @ k[:, 0].mT  # moments of their blocks
            exact = scores.to(torch.float64, copy=True).requires_grad_()
            up_mean, up_std = up_mean[:, 0], up_std[:, 0]
            mean, std = torch.ops.fasttta.block_moments(scores, spans, spans, 0.3)
            torch.ops.fasttta.block_moments_backward(
                up_mean, up_std / std, spans, spans, 0.3, scores
            )
            rows = [x.split(spans, 2) for x in (0.3 * exact).split(spans, 1)]
            right = [
                torch.stack([f(x.flatten(1), 1) for row in rows for x in row], 1).view(b, 2, 2)
                for f in (torch.mean, torch.std)
            ]
            moved = torch.autograd.grad(right, exact, (up_mean.double(), up_std.double()))
            pairs += zip((mean, std, scores), (*right, *moved))
        if dtype == torch.float32:
            half = [x.bfloat16() for x in (q, k, v, up)]
            exact = [x.double().requires_grad_() for x in half[:3]]
            right = (0.3 * exact[0] @ exact[1].mT).softmax(-1) @ exact[2]
            out, lse = torch.ops.fasttta.attention(*half[:3], 0.3)
            grads = torch.ops.fasttta.attention_backward(half[3], *half[:3], out, lse, 0.3)
            moved = torch.autograd.grad(right, exact, half[3].double())
            for x, y in zip((out, *grads), (right, *moved)):
                assert (x - y).abs().max() <= 1e-2 * y.abs().max(), (shape, "bfloat16")
        for x, y in pairs:
            worst = (x - y).abs().max() / y.abs().max()
            assert worst <= (1e-12 if dtype == torch.float64 else 1e-5), (shape, dtype, worst)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("flags", ["-march=x86-64-v3", "-march=x86-64"], ids=["AVX2", "SSE2"])
def test_on_processors_with_narrower_vectors(flags, tmp_path):
    """Built as there, in a process of its own."""
    environment = {**os.environ, "FASTTTA_CACHE": str(tmp_path), "FASTTTA_NATIVE": "auto"}
    command = [sys.executable, "-P", "-c", _NARROW, flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_refuses_what_does_not_fit():
    q, k = heads(1, 2, 20, 16), heads(1, 2, 21, 16)
    for bad in ((q, k, k[:, :, 1:]), (q, k[..., :8], k), (q.double(), k, k)):
        with pytest.raises(RuntimeError, match="fit|must be"):
            torch.ops.fasttta.attention(*bad, 1.0)
    out, lse = torch.ops.fasttta.attention(q, k, k, 1.0)
    with pytest.raises(RuntimeError, match="must be"):
        torch.ops.fasttta.attention_backward(out[:, :, 1:], q, k, k, out, lse, 1.0)

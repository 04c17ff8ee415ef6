"""How kernels are reached: registration, what the composite keeps, devices, graphs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from kernels_here import DEVICE, KERNELS, MODULES, NATIVE, composite

from fasttta import functional
from fasttta.ops import registry, triton
from fasttta.ops.shared_prefix_attention import layout as prefix_layout


def _prefix_args(
    dtype=torch.float32, lengths=(2, 1, 3), d=4, batch=2, prefix=3, last=False, device=DEVICE
):
    """Of shared_prefix_attention, with two heads."""
    packed = prefix_layout(lengths, device)

    def projection(count):
        return torch.randn(batch, count, 3 * 2 * d, device=device).to(dtype).chunk(3, dim=-1)

    (q, k, v), (_, *shared) = projection(sum(lengths)), projection(prefix)
    q = q[:, : len(lengths)].contiguous() if last else q
    return q, k, v, *shared, *packed, 2, 0.5


def _samples(dtype):
    """Arguments of every operation."""
    q, k = torch.randn(2, 2, 3, 7, 4, dtype=dtype, device=DEVICE)
    z, maps = (torch.randn(3, 6, dtype=dtype, device=DEVICE) for _ in range(2))
    maps, ones = maps.reshape(3, 2, 3), torch.ones(3, dtype=dtype, device=DEVICE)
    yield "token_moments", (q, k, [4, 3])
    for per_head in (False, True):
        options = [4, 3], 0.5, per_head
        mean, std = composite.score_moments(q, k, *options)
        yield "score_moments", (q, k, *options)
        yield "score_moments_backward", (mean, std, q, k, std, *options)
        yield "attention_bootstrap", (q, k, *options, True)
        yield "attention_bootstrap_backward", (ones[:2], q, k, mean, std, *options, False)
    yield "entropy", (z,)
    yield "entropy_backward", (ones, z)
    yield "principal_entropy", (z, 2, 1e-6)
    yield "principal_entropy_backward", (ones, z, 2, 1e-6)
    yield "balance_entropy", (z, True)
    yield "adaptation_head", (z, 2, 1.0, 1.0, False, 1e-6, ones)
    yield "total_variation", (maps,)
    yield "total_variation_backward", (ones, maps)
    yield "reliability_ensemble", (maps, z, 1.0)
    for shared in (q, q[:1]):
        out, top, rest = composite.flat_attention(shared, k, k, 0.5)
        yield "flat_attention", (shared, k, k, 0.5)
        yield "flat_attention_backward", (k, shared, k, k, out, top, rest, 0.5)
    yield "scaled_rows", (maps, "quick_gelu")
    yield "scaled_layer_norm", (maps, maps, ones, ones, 1e-5)
    yield "scaled_layer_norm", (maps, None, ones, ones, 1e-5)
    for name in ("gelu", "quick_gelu"):
        yield name, (q.flatten(),)
        yield f"{name}_backward", (k.flatten(), q.flatten())
    yield "gelu", (z, ones.repeat(2))
    for branch, weight in ((None, None), (maps, ones)):
        yield "residual_layer_norm", (maps, branch, weight, weight, 1e-5, dtype)
        _, normed, stats = composite.residual_layer_norm(maps, None, None, None, 1e-5, dtype)
        saved = maps, stats, weight, torch.float32
        yield "residual_layer_norm_backward", (normed, branch, *saved, True, True, True)
        yield "residual_layer_norm_backward", (normed, branch, *saved, False, False, True)
    for args in (_prefix_args(dtype), _prefix_args(dtype, last=True)):
        out, lse = composite.shared_prefix_attention(*args)
        yield "shared_prefix_attention", args
        yield "shared_prefix_attention_backward", (out, *args[:5], out, lse, *args[5:])


def test_every_launcher_is_registered():
    launchers = {x for m in MODULES.values() for x in vars(m) if x in registry.OPERATORS}
    assert len(launchers) >= 15
    assert all(registry.has_kernel(name, "CUDA") for name in launchers)
    assert {name for name, _ in _samples(torch.float32)} == set(KERNELS) == launchers


def _meta(x):
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@pytest.mark.parametrize(
    ("name", "args"), list(_samples(torch.float16)), ids=lambda x: x if isinstance(x, str) else ""
)
def test_results_are_as_declared(name, args):
    """Shapes, types and strides are those that torch.compile is told to expect."""
    tensors = [isinstance(x, torch.Tensor) for x in args]
    args = [
        x.mT.contiguous().mT if t and x.ndim > 1 else x for t, x in zip(tensors, args, strict=True)
    ]
    single = [
        x.float() if t and x.is_floating_point() else x for t, x in zip(tensors, args, strict=True)
    ]
    operation = getattr(torch.ops.fasttta, name)
    for serve, inputs in ((KERNELS[name], args), (operation, args), (operation, single)):
        results = serve(*inputs), operation(*map(_meta, inputs))
        as_tuple = (x if isinstance(x, tuple) else (x,) for x in results)
        for x, y in zip(*as_tuple, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize(
    ("name", "args"), list(_samples(torch.float64)), ids=lambda x: x if isinstance(x, str) else ""
)
def test_float64_is_left_to_the_composite(name, args, monkeypatch):
    monkeypatch.setattr(triton, "kernels", None)  # nothing is to be loaded
    results, expected = KERNELS[name](*args), getattr(composite, name)(*args)
    as_tuple = (x if isinstance(x, tuple) else (x,) for x in (results, expected))
    assert all(torch.equal(x, y) for x, y in zip(*as_tuple, strict=True))


def test_what_else_the_composite_keeps(monkeypatch):
    monkeypatch.setattr(triton, "kernels", None)
    q, k = torch.randn(2, 1, 2, 7, 65, device=DEVICE)
    for args in ((q, k, [4, 3], 0.0, False), (q, k, [4, 3], 1.0, True)):
        mean, _ = KERNELS["score_moments"](*args)
        assert torch.equal(mean, composite.score_moments(*args)[0])
    # samples 2^31 elements long, of which only the strides are looked at
    far = torch.empty(1, 2, 7, 4, device="meta").as_strided((1, 2, 7, 4), (4, 2**31, 4, 1))
    assert triton.is_far(far)
    assert not triton.is_far(q)
    assert KERNELS["principal_entropy"](torch.zeros(0, 4, device=DEVICE), 2, 0.0).shape == (0,)
    assert KERNELS["total_variation"](torch.zeros(2, 0, 4, device=DEVICE)).tolist() == [0, 0]


@pytest.mark.parametrize("lacks", ["triton", "compiler", "headers"])
def test_says_what_triton_lacks(lacks, monkeypatch, tmp_path):
    """Kernels are started by way of a little C: without a compiler the composites serve."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if lacks == "triton":
        monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
        expected = "Triton is not installed"
    elif lacks == "compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        expected = "Triton needs a C compiler"
    else:
        monkeypatch.setenv("CC", "cc")
        monkeypatch.setattr(triton.sysconfig, "get_path", lambda *_: str(tmp_path))
        expected = "Python.h is not there"
    triton.missing.cache_clear()
    triton.installed.cache_clear()
    try:
        assert expected in triton.missing()
        assert expected in registry.refusal("entropy", "triton")
        with pytest.warns(RuntimeWarning, match=expected):
            assert not triton.installed()
    finally:
        triton.missing.cache_clear()
        triton.installed.cache_clear()


def test_refusals():
    assert "no triton kernel" in registry.refusal("gaussian_kl", "triton")
    if NATIVE:
        x = torch.zeros(2, 2, device="cuda")
        assert registry.refusal("entropy", "triton", x) is None
        with pytest.raises(ValueError, match="backend='triton'.* float64"):
            functional.entropy(x.double(), backend="triton")
    else:
        assert "no GPU" in registry.refusal("entropy", "triton")
    assert "found cpu" in registry.refusal("entropy", "triton", torch.zeros(2, 2))


def _scores(d=4, dtype=torch.float32, batch=2):
    return (torch.empty(batch, 1, 7, d, device="meta", dtype=dtype),) * 2


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("score_moments", (*_scores(), [4, 3], 0.0, False), "a scale other than 0"),
        ("score_moments", (*_scores(65), [4, 3], 1.0, True), "at most 64 channels"),
        ("score_moments", (*_scores(), [2] * 200, 1.0, False), "2\\^15 tiles"),
        ("score_moments", (*_scores(batch=65536), [4, 3], 1.0, False), "at most 65535 samples"),
        ("score_moments", (*_scores(dtype=torch.float64), [4, 3], 1.0, True), "float64"),
        (
            "attention_bootstrap",
            (*_scores(), [4, 3], 1.0, False, True, torch.zeros(3), torch.zeros(2)),
            r"anchors \[2\] in float32, found \[3\]",
        ),
        ("entropy", (torch.zeros(2, 3, dtype=torch.float64),), "float64"),
        (
            "flat_attention",
            (*_scores(129), _scores(129)[0], 1.0),
            "at most 128 channels, found 129",
        ),
        ("flat_attention", (*_scores(), _scores(dtype=torch.float16)[0], 1.0), "of one dtype"),
        (
            "shared_prefix_attention",
            _prefix_args(lengths=(65, 2), device="meta"),
            "sequences of at most 64 tokens, found 65",
        ),
        (
            "shared_prefix_attention",
            _prefix_args(d=65, device="meta"),
            "at most 64 channels in torch.float32, found 65",
        ),
        (
            "shared_prefix_attention",
            _prefix_args(torch.bfloat16, d=129, device="meta"),
            "at most 128 channels in torch.bfloat16, found 129",
        ),
        (
            "shared_prefix_attention",
            _prefix_args(batch=32768, device="meta"),
            "at most 65535 heads, found 32768 samples of 2",
        ),
        (
            "shared_prefix_attention",
            (_prefix_args(torch.bfloat16)[0], *_prefix_args()[1:]),
            "of one dtype",
        ),
        (
            "shared_prefix_attention",
            (*_prefix_args()[:5], *(x.long() for x in _prefix_args()[5:7]), *_prefix_args()[7:]),
            "int64",
        ),
        ("scaled_rows", (torch.zeros(2, 3, dtype=torch.float64), ""), "float64"),
        ("scaled_rows", (torch.empty(1, 16385, device="meta"), ""), "at most 16384 values"),
        (
            "scaled_layer_norm",
            (torch.zeros(2, 3), None, torch.zeros(6)[::2], torch.zeros(3), 1e-5),
            "weights without gaps",
        ),
        ("total_variation", (torch.empty(65536, 2, 2, device="meta"),), "at most 65535"),
        ("total_variation", (torch.empty(2, 2**16, 2**16, device="meta"),), "2\\^31 elements"),
    ],
)
def test_what_kernels_are_not_made_for_has_a_reason(name, args, reason):
    assert re.search(reason, registry.OPERATORS[name].no_triton(*args))


@pytest.mark.parametrize(
    ("name", "args"), list(_samples(torch.float16)), ids=lambda x: x if isinstance(x, str) else ""
)
def test_samples_have_no_such_reason(name, args):
    assert registry.OPERATORS[name].no_triton(*args) is None


def test_triton_is_not_imported_with_the_operations():
    code = "import sys, fasttta.functional; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("name", "args"), list(_samples(torch.float32)), ids=lambda x: x if isinstance(x, str) else ""
)
def test_in_a_graph(name, args):
    """Nothing waits for the device, and a replay gives the same bits."""
    expected = KERNELS[name](*args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        KERNELS[name](*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = KERNELS[name](*args)
    graph.replay()
    as_tuple = (x if isinstance(x, tuple) else (x,) for x in (results, expected))
    assert all(torch.equal(x, y) for x, y in zip(*as_tuple, strict=True))

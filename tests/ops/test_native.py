"""The C++ kernels: what they compute, and that they are built once, by anyone, or do without."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from op_cases import TOLERANCES, close, composite

from fasttta import functional as F
from fasttta.ops import native, native_build, registry


@pytest.fixture(autouse=True, scope="module")
def _built():
    """Where there is a compiler the build must not fail."""
    if native.mode() == "off" or native.compiler() is None or native.ninja() is None:
        pytest.skip(f"no C++ kernels: {native.attempt().reason}")
    assert native.attempt().path is not None, native.attempt().reason


DTYPES = list(TOLERANCES)


def _logits(n, c, dtype, kind="random"):
    logits = torch.randn(n, c, generator=torch.Generator().manual_seed(n + c)).double() * 3
    if kind == "ties":
        logits = logits.round()
    if kind == "masked":
        logits[:, ::3] = -torch.inf
    return logits.to(dtype)


def test_every_name_has_a_kernel():
    registered = {name for name in registry.OPERATORS if registry.has_kernel(name, "CPU")}
    assert registered == set(native.NAMES)


@pytest.mark.parametrize("kind", ["random", "ties", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c"), [(1, 1), (3, 17), (130, 33), (2, 4097)])
def test_heads_equal_composite(n, c, dtype, kind):
    """The composite in float64 on the same, possibly rounded, logits; several units of work."""
    if kind == "masked" and c == 1:
        pytest.skip("one class, and that one masked")
    logits, weight = _logits(n, c, dtype, kind), torch.linspace(1, 0.1, n)
    exact = logits.double()
    wide = torch.promote_types(dtype, torch.float32)
    for k in {1, (c + 1) // 2, c}:
        for softmax_sum in (False, True):
            for w in (None, weight):
                args = (k, 1.5, 0.7, softmax_sum, 1e-6)
                computed = torch.ops.fasttta.adaptation_head(logits, *args, w)
                expected = composite.adaptation_head(exact, *args, w)
                for x, right in zip(computed, expected, strict=True):
                    assert x.dtype == wide
                    assert x.is_contiguous()
                    assert (x.double() - right).abs().max() <= TOLERANCES[wide] * max(
                        1.0, right.abs().max().item()
                    )
    up = torch.linspace(-1, 1, n).to(wide)
    for name, options in (("entropy", ()), ("principal_entropy", ((c + 1) // 2, 1e-6))):
        computed = getattr(torch.ops.fasttta, name)(logits, *options)
        right = getattr(composite, name)(exact, *options)
        assert computed.dtype == wide
        assert (computed - right).abs().max() <= TOLERANCES[wide] * max(
            1.0, right.abs().max().item()
        )
        grad = getattr(torch.ops.fasttta, f"{name}_backward")(up, logits, *options)
        right = getattr(composite, f"{name}_backward")(up.double(), exact, *options)
        assert grad.dtype == dtype
        assert (grad.double() - right).abs().max() <= TOLERANCES[dtype] * max(
            0.1, right.abs().max().item()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 28, 308])
def test_selection_is_that_of_a_stable_sort(k, dtype):
    """Which classes are selected shows in the gradient; many ties, both zeros, extremes."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randint(-4, 5, (40, 309), generator=generator).double()
    logits[::2] *= torch.rand(20, 309, generator=generator).double()
    logits[1, ::2] = -0.0
    logits[1, 1::2] = 0.0
    logits[3] = torch.tensor([-7e4, 6e4, 1e-7] * 103)
    logits = logits.clamp(-6e4, 6e4).to(dtype)
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    selected = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)
    # of p alone where the rest is not selected: p ln p's derivative differs by more than noise
    p = logits.double().softmax(-1)
    g = torch.where(selected, -(p + 0.5).log() - p / (p + 0.5), 0)
    expected = p * (g - (p * g).sum(-1, keepdim=True))
    up = torch.ones(40, dtype=torch.promote_types(dtype, torch.float32))
    computed = torch.ops.fasttta.principal_entropy_backward(up, logits, k, 0.5)
    close(computed, expected, dtype, "gradient")


# samples, of them with queries of their own, heads, classes, channels
FLAT = [
    (2, 2, 2, 13, 5), (3, 1, 2, 130, 80), (2, 1, 1, 1, 7), (1, 1, 3, 33, 1), (2, 2, 1, 515, 24),
    (0, 0, 2, 5, 4), (0, 1, 2, 5, 4),
]  # fmt: skip


def _flat(b, own, h, n, d, dtype, offset=0.0):
    """q, k, v and the gradient, views of packed projections; offset: of all scores, about."""
    generator = torch.Generator().manual_seed(n)
    packed = torch.randn(b + own, n, 4, h, d, generator=generator)
    if offset:
        packed[..., 0, :, 0], packed[..., 1, :, 0] = offset * d**0.5, 1
    q, k, v, grad = packed.to(dtype).permute(2, 0, 3, 1, 4)
    return q[b:], k[:b], v[:b], grad[:b]


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FLAT, ids=str)
def test_flat_attention_equals_composite(shape, dtype, offset):
    """In float64 on the same values; scores of some hundred keep their digits."""
    q, k, v, grad = _flat(*shape, dtype, offset)
    exact = [x.double() for x in (q, k, v)]
    scale = shape[-1] ** -0.5
    right = composite.flat_attention(*exact, scale)
    computed = torch.ops.fasttta.flat_attention(q, k, v, scale)
    wide = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in computed] == [dtype, wide, wide]
    gradients = composite.flat_attention_backward(grad.double(), *exact, *right, scale)
    results = torch.ops.fasttta.flat_attention_backward(grad, q, k, v, *computed, scale)
    assert [x.shape for x in results] == [x.shape for x in (q, k, v)]
    assert all(x.dtype == dtype for x in results)
    for x, y in zip((*computed, *results), (*right, *gradients), strict=True):
        assert x.is_contiguous()
        if x.numel():  # a score's own rounding moves its exponential
            times = 10 if offset else 1
            limit = TOLERANCES[x.dtype] * times * max(0.1 * times, y.abs().max())
            assert (x.double() - y).abs().max() <= limit


def test_float32_is_as_good_as_the_composite():
    """Against float64, within twice the error of PyTorch's own float32."""
    logits = _logits(64, 1000, torch.float32)
    args = (30, 1.0, 1.0, False, 1e-6)
    exact = composite.adaptation_head(logits.double(), *args)
    computed = composite.adaptation_head(logits, *args)
    ours = torch.ops.fasttta.adaptation_head(logits, *args)
    for x, y, right in zip(ours, computed, exact, strict=True):
        scale = right.abs().max()
        error, theirs = ((z.double() - right).abs().max() / scale for z in (x, y))
        assert error <= 2 * theirs + 4 * torch.finfo(torch.float32).eps


def test_results_do_not_depend_on_threads():
    logits, maps = _logits(300, 309, torch.float32), torch.rand(40, 50, 60)
    q, k, v, grad = _flat(3, 1, 2, 130, 16, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            flat = torch.ops.fasttta.flat_attention(q, k, v, 0.25)
            results.append(
                (
                    *torch.ops.fasttta.adaptation_head(logits, 28, 1.0, 1.0, False, 1e-6),
                    *flat,
                    *torch.ops.fasttta.flat_attention_backward(grad, q, k, v, *flat, 0.25),
                    torch.ops.fasttta.total_variation(maps),
                    torch.ops.fasttta.total_variation_backward(torch.rand(40) * 0 + 1, maps),
                )
            )
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_inputs(dtype):
    """Any strides; inputs are not written to; gradients have no gaps."""
    wide = torch.promote_types(dtype, torch.float32)
    logits = _logits(34, 12, dtype)[::2, 1::3]
    maps = torch.rand(4, 9, 6, 2).to(dtype)[..., 0].transpose(1, 2)
    weight, up = torch.rand(34, 2).to(dtype)[::2, 1], torch.rand(17, dtype=wide)
    tokens, attended = torch.rand(2, 4, 9, 3).to(dtype).transpose(2, 3), torch.rand(2, 4, 3, 9)
    ends = torch.rand(2, 2, 4, 3).to(wide).unbind()
    kept = [x.clone() for x in (logits, maps, weight, tokens)]
    for name, args in (
        ("adaptation_head", (logits, 2, 1.0, 1.0, False, 1e-6, weight)),
        ("balance_entropy", (logits, True, weight)),
        ("entropy_backward", (up, logits)),
        ("total_variation", (maps,)),
        ("total_variation_backward", (up[:4], maps)),
        ("reliability_ensemble", (maps, logits[:4], 1.0)),
        ("flat_attention", (tokens[:1], tokens, tokens, 0.5)),
        ("flat_attention_backward",
         (tokens, tokens, tokens, tokens, attended.to(dtype), *ends, 0.5)),
    ):  # fmt: skip
        dense = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in args]
        results = [getattr(torch.ops.fasttta, name)(*x) for x in (args, dense)]
        for computed, expected in zip(*(r if isinstance(r, tuple) else (r,) for r in results),
                                   strict=True):  # fmt: skip
            assert torch.equal(computed, expected), name
            assert computed.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(kept, (logits, maps, weight, tokens), strict=True))


def test_kernels_refuse_what_they_cannot_read():
    op, x = torch.ops.fasttta, torch.zeros(3, 1, 4, 2)
    for call, match in (
        (lambda: op.entropy(torch.zeros(3)), "must be"),
        (lambda: op.entropy(torch.zeros(3, 4, dtype=torch.long)), "float64, float32"),
        (lambda: op.principal_entropy(torch.zeros(3, 4), 5, 0.0), "k must be 1 to"),
        (lambda: op.adaptation_head(torch.zeros(0, 4), 1, 1.0, 1.0, False, 0.0), "n and C"),
        (lambda: op.balance_entropy(torch.zeros(3, 4), False, torch.ones(2)), "weight must be"),
        (lambda: op.total_variation(torch.zeros(3, 4)), "maps must be"),
        (lambda: op.total_variation_backward(torch.ones(2), torch.zeros(3, 4, 4)), "grad must be"),
        (lambda: op.reliability_ensemble(torch.zeros(3, 4, 4), torch.zeros(2, 4), 1.0), "needed"),
        (lambda: op.flat_attention(*torch.zeros(3, 2, 4), 1.0), r"must be \[B, H, K, d\]"),
        (lambda: op.flat_attention(x, x, x[:, :, 1:], 1.0), "alike"),
        (lambda: op.flat_attention(x[:2], x, x, 1.0), "batch"),
        (lambda: op.flat_attention(x.double(), x, x, 1.0), "q must be of k's precision"),
        (lambda: op.flat_attention(*3 * (x[:, :, :0],), 1.0), "something in every head"),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


def test_cpp_is_differentiable():
    logits = _logits(6, 9, torch.float64).requires_grad_()
    for backend in ("cpp", "reference"):
        total, entropy, _ = F.adaptation_head(logits, 3, backend=backend)
        grad = torch.autograd.grad(total + 2 * entropy, logits)[0]
        if backend == "cpp":
            computed = grad
    assert torch.allclose(computed, grad, rtol=1e-12, atol=1e-15)


REPORT = """
import json, logging, warnings
records = []
logging.getLogger("fasttta").addHandler(type("H", (logging.Handler,), {
    "emit": lambda self, record: records.append(record.getMessage())})())
logging.getLogger("fasttta").setLevel("INFO")
import torch
import fasttta.functional as F
from fasttta.ops import native, registry
assert native._outcome is None  # importing builds and loads nothing
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    z = torch.arange(6.0).view(2, 3)
    values = [F.entropy(z).tolist() for _ in range(3)]
    refused = registry.refusal("entropy", "cpp", z)
print(json.dumps({"values": values, "records": records, "refused": refused,
    "live": registry.has_kernel("entropy", "CPU"),
    "warnings": [str(w.message) for w in caught if "fasttta" in str(w.message)]}))
"""


def _run(**environment):
    return subprocess.Popen(
        [sys.executable, "-P", "-c", REPORT], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def _report(process):
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    report = json.loads(out)
    right = F.entropy(torch.arange(6.0).view(2, 3)).tolist()
    assert report["values"] == [pytest.approx(right)] * 3
    return report


def _compiler(folder, body):
    """A stand-in for the compiler; it notes its calls."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_concurrent_processes_build_once(tmp_path):
    """Two that start together, over what an interrupted build left, and a third one later."""
    real = native.compiler()
    compiler = _compiler(tmp_path, f'exec {real} "$@" -O0')  # takes a third of the time
    cache = tmp_path / "with space"
    environment = {"FASTTTA_CACHE": str(cache), "CXX": compiler}
    left = cache / "native" / native.library_name(compiler)
    left = left.with_name(f"{left.stem}-interrupted")
    left.mkdir(parents=True)
    (left / "library.so").write_text("half a library")
    together = [_run(**environment) for _ in range(2)]
    report = [_report(process) for process in together]
    report.append(_report(_run(**environment)))
    assert all(x["live"] and not x["warnings"] and x["refused"] is None for x in report)
    assert sorted(len(x["records"]) for x in report) == [0, 0, 1]
    compiled = [x for x in (tmp_path / "calls").read_text().splitlines() if " -c " in x]
    units = [p for p in native_build.sources() if p.suffix == ".cpp"]
    assert len(compiled) == len(units)
    assert {p.suffix for p in (cache / "native").iterdir()} == {".so", ".lock"}


@pytest.mark.parametrize("case", ["no compiler", "failing compiler", "no cache"])
def test_without_a_library_the_composite_serves(tmp_path, case):
    environment = {"FASTTTA_CACHE": str(tmp_path / "cache")}
    if case == "no compiler":
        environment |= {"CXX": "no-such-compiler"}
        why = "no C++ compiler: no-such-compiler is not on PATH"
    elif case == "failing compiler":
        body = 'test "$1" = --version && exit\necho "x.cpp:1: error: out of luck"; exit 1'
        environment |= {"CXX": _compiler(tmp_path, body)}
        why = "error: out of luck"
    else:
        (tmp_path / "cache").write_text("a file where the folder should be")
        why = "cache"
    report = _report(_run(**environment))
    assert not report["live"]
    (warning,) = report["warnings"]
    assert why in warning
    assert why in report["refused"]
    process = _run(**environment, FASTTTA_NATIVE="require")
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "FASTTTA_NATIVE=require: " in errors
    assert why in errors


def test_switched_off(tmp_path):
    report = _report(_run(FASTTTA_NATIVE="off", FASTTTA_CACHE=str(tmp_path)))
    assert not report["live"]
    assert report["warnings"] == []
    assert "FASTTTA_NATIVE=off" in report["refused"]
    assert list(tmp_path.iterdir()) == []
    process = _run(FASTTTA_NATIVE="on")
    assert "FASTTTA_NATIVE='on' is unknown; known: auto, off, require" in process.communicate()[1]


def test_key_covers_what_goes_in(monkeypatch):
    compiler = native.compiler()
    before = native.library_name(compiler)
    assert native.library_name(compiler) == before
    for name, value in (
        ("flags", lambda: ("-O0",)),
        ("processor", lambda: "another"),
        ("version", lambda compiler: "g++ 99"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(native_build, name, value)
            assert native.library_name(compiler) != before, name
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert native.library_name(compiler) != before

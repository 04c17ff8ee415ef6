"""The Triton kernels on this machine: natively on a GPU, else through Triton's interpreter.

Import it before anything imports Triton: functions are interpreted or not from the moment they are
decorated. What the environment says is left as it was, for subprocesses.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NATIVE = DEVICE.type == "cuda"

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

_before = os.environ.get("TRITON_INTERPRET")
if not NATIVE:
    os.environ["TRITON_INTERPRET"] = "1"

# ruff: noqa: E402
import bf16_interpreter
import fasttta.kernels
import triton
from op_cases import composite

from fasttta.ops import registry

MODULES = {
    x.name: importlib.import_module(f"fasttta.kernels.{x.name}")
    for x in pkgutil.iter_modules(fasttta.kernels.__path__)
}
KERNELS = {name: x.on_cuda for name, x in registry.OPERATORS.items() if x.on_cuda is not None}

if not NATIVE:
    triton.knobs.runtime.interpret = True
    if _before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = _before
    if isinstance(MODULES["score_moments"]._merge_kernel, triton.runtime.JITFunction):
        raise RuntimeError("something imported Triton before tests/kernels_here.py did")
    bf16_interpreter.install()

HALVES = [torch.float16, torch.bfloat16]

# relative to the largest entry of the exact result, on top of what the composite loses
TOLERANCES = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_MARGIN = 64  # elements before and after whatever a launcher allocates


def exact(x):
    """A floating tensor in float64; anything else as it is."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def run(name: str, *args):
    """Results of an operation: the launcher's, the composite's, and the composite's in float64."""
    results, naive = KERNELS[name](*args), getattr(composite, name)(*args)
    expected = getattr(composite, name)(*map(exact, args))
    return [x if isinstance(x, tuple) else (x,) for x in (results, naive, expected)]


def check(name: str, *args, slack: float = 1.0, floor: float = 0.0) -> tuple[torch.Tensor, ...]:
    """Compares a launcher's results with those of the composite, and returns the launcher's.

    Tolerance: TOLERANCES times slack, twice what the composite in the inputs' type loses against
    itself in float64, and a floor for results that are 0 by cancellation.
    """
    results, naive, expected = run(name, *args)
    for n, (x, y, z) in enumerate(zip(results, naive, expected, strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), (name, n)
        if not z.numel():
            continue
        odd = ~torch.isfinite(z)
        assert torch.equal(torch.isnan(x), torch.isnan(y)), (name, n)
        assert torch.equal(x[odd & ~torch.isnan(z)].double(), z[odd & ~torch.isnan(z)]), (name, n)
        x_type = x.dtype
        x, y, z = (t.double().masked_fill(odd, 0) for t in (x, y, z))
        allowed = 2 * (y - z).abs().max() + slack * TOLERANCES[x_type] * z.abs().max() + floor
        error = (x - z).abs().max()
        assert error <= allowed, f"{name} result {n}: off by {error:.1e}, allowed {allowed:.1e}"
    return results


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """New tensors are full of nan, and nothing may be written beside them."""
    empty, empty_like = torch.empty, torch.empty_like
    made = []

    def bad(dtype):
        return float("nan") if dtype.is_floating_point else -(2**30)

    def guarded(shape, stride, dtype, device):
        count = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        count = count if all(shape) else 0
        base = torch.full((count + 2 * _MARGIN,), bad(dtype), dtype=dtype, device=device)
        made.append(base)
        return base.as_strided(shape, stride, _MARGIN)

    def new(*shape, dtype=None, device=None, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        meta = empty(shape, dtype=dtype, device="meta")
        return guarded(tuple(shape), meta.stride(), meta.dtype, device or "cpu")

    def like(x, **_):
        meta = empty_like(x, device="meta")
        return guarded(tuple(x.shape), meta.stride(), x.dtype, x.device)

    for module in MODULES.values():
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", _Torch(empty=new, empty_like=like))
    yield
    for base in made:
        edges = torch.cat((base[:_MARGIN], base[-_MARGIN:]))
        clean = torch.isnan(edges) if base.is_floating_point() else edges == bad(base.dtype)
        assert clean.all(), "a kernel wrote beside its output"


class _Torch:
    """torch with other allocations."""

    def __init__(self, **changed):
        self.__dict__.update(changed)

    def __getattr__(self, name):
        return getattr(torch, name)


def among_nan(x: torch.Tensor) -> torch.Tensor:
    """x with the same strides, in memory that is nan around it and between its rows."""
    stride = tuple(s + (16 if n == 0 else 0) for n, s in enumerate(x.stride()))
    count = 1 + sum((n - 1) * s for n, s in zip(x.shape, stride, strict=True))
    base = torch.full((count + 2 * _MARGIN,), float("nan"), dtype=x.dtype, device=x.device)
    return base.as_strided(x.shape, stride, _MARGIN).copy_(x)

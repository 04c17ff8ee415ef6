"""Inputs of the operations' tests, their implementations, and what equal means."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch

from fasttta.ops import native, registry

registry.operations()
#: Default implementations, in PyTorch's calls, by the operators' names.
composite = SimpleNamespace(
    **{name: x.default for name, x in registry.OPERATORS.items() if x.default is not None}
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# relative to the largest entry of the expected tensor; half types: error of one rounding of the
# returned gradient, statistics themselves are float32
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}

# "default" is the dispatcher's choice (C++ on a CPU), "composite" what serves without it
IMPLEMENTATIONS = ("default", "composite", "reference")


def without_native(monkeypatch) -> None:
    """Lets operations run as if there were no C++ kernels."""
    monkeypatch.setattr(native, "loaded", False)
    monkeypatch.setattr(native, "load", lambda: False)


def using(implementation: str, monkeypatch) -> str | None:
    """The ``backend`` with which public functions run an implementation."""
    if implementation == "composite":
        without_native(monkeypatch)
        for file in registry.FILES:
            if file not in ("byte_sums", "token_moments"):  # they call no other operator
                monkeypatch.setattr(import_module(f"fasttta.ops.{file}"), "ops", composite)
    return "reference" if implementation == "reference" else None


def qk(batch, heads, spans, d, dtype=torch.float64, layout="dense", offset=0.0, seed=0):
    """Random q and k [B, H, T, d] that require gradients, dense or as views of a packed product."""
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


def logits_of(n, c, kind="random", dtype=torch.float64):
    """Logits [n, c] that require gradients: random, with ties, extreme or all equal."""
    generator = torch.Generator("cpu").manual_seed(n * c)
    logits = torch.randn(n, c, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)
    if kind == "ties":
        logits = logits.round()
    elif kind == "extreme":
        logits = logits * 400
    elif kind == "equal":
        logits = torch.zeros_like(logits)
    return logits.to(dtype).requires_grad_()


def close(computed, expected, dtype, what):
    """Asserts that the largest error is within the type's tolerance of the largest value."""
    assert computed.shape == expected.shape, what
    expected = expected.double()
    scale = expected.abs().max().item() if expected.numel() else 0
    error = (computed.double() - expected).abs().max().item() if expected.numel() else 0
    assert error <= TOLERANCES[dtype] * max(scale, 1e-30), f"{what}: {error:.1e} of {scale:.1e}"

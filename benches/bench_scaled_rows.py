"""Rows in float8, and the LayerNorm that ends in them: PyTorch's calls and ours, on a GPU."""

from __future__ import annotations

import pytest
import torch

from fasttta.ops.scaled_layer_norm import scaled_layer_norm, scaled_layer_norm_reference
from fasttta.ops.scaled_rows import emulated, scaled_rows, scaled_rows_reference

TOKENS = 8 * 708  # of a batch of K50
CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA or emulated(torch.device("cuda")) is not None, reason="kernels for GPUs with float8"
)


def _values(values, scale):
    return (values.float() * scale,)


@pytest.mark.parametrize("side", ["ours", "torch.compile"])
@pytest.mark.parametrize(("width", "activation"), [(768, ""), (3072, "gelu")])
def bench_scaled_rows(width, activation, side, full, device, measure):
    x = torch.randn(TOKENS if full else 5, width, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(scaled_rows_reference)

    def run():
        rows = scaled_rows(x, activation) if side == "ours" else compiled(x, activation)
        return _values(rows.values, rows.scale) if side == "ours" else _values(*rows)

    measure(
        run,
        lambda: _values(*scaled_rows_reference(x, activation)),
        tolerance=1 / 8,  # a step of e4m3, where the last bit of an activation decides
        shape=f"{x.shape[0]}x{width}",
        dtype=x.dtype,
        bytes=x.nbytes + x.numel() + 4 * len(x),  # one byte a value and a scale a row written
    )


@pytest.mark.parametrize("side", ["ours", "torch.compile"])
def bench_scaled_layer_norm(side, full, device, measure):
    x = torch.randn(TOKENS if full else 5, 768, device=device)
    args = x, x.bfloat16(), *torch.randn(2, 768, device=device)
    compiled = torch.compile(scaled_layer_norm_reference)

    def run():
        if side == "ours":
            total, rows = scaled_layer_norm(*args)
            return total, *_values(rows.values, rows.scale)
        total, *rows = compiled(*args, 1e-5)
        return total, *_values(*rows)

    def reference():
        total, *rows = scaled_layer_norm_reference(*args, 1e-5)
        return total, *_values(*rows)

    measure(
        run,
        reference,
        tolerance=1 / 8,
        shape=f"{len(x)}x768",
        dtype=x.dtype,
        # residual and branch read, the sum and one byte a value written
        bytes=2 * x.nbytes + args[1].nbytes + x.numel() + 4 * len(x),
    )

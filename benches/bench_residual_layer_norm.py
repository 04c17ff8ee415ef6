"""A branch added to the residual stream, and its LayerNorm: PyTorch's calls and one pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttta.ops.registry import ops
from fasttta.ops.residual_layer_norm import residual_layer_norm, residual_layer_norm_reference

SHAPES = {"K50": (8, 708, 768), "VGG": (32, 708, 768), "text": (1, 4170, 512)}
IMPLEMENTATIONS = [
    pytest.param("compiled", marks=pytest.mark.compiled),
    "default",
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["forward", "backward", "backward, tuned"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_residual_layer_norm(implementation, direction, shape, device, full, threads, measure):
    """Residual in float32, branch and normalised tokens in bfloat16; backward of kept statistics.

    On a CPU a quarter of the batch.
    """
    sizes = SHAPES[shape] if full else (2, 3, 5)
    if device.type == "cpu":
        sizes = (max(1, sizes[0] // 4), *sizes[1:])
    generator = torch.Generator().manual_seed(0)
    x, y, up, up_total = (
        torch.randn(sizes, generator=generator).to(device, kind)
        for kind in (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
    )
    weight, bias = torch.randn(2, sizes[-1], generator=generator).to(device).unbind()
    tuned, dtype = direction.endswith("tuned"), torch.bfloat16
    total, _, stats = ops.residual_layer_norm(x, y, weight, bias, 1e-5, dtype)
    values = x.numel()

    def forward(of):
        return lambda: of(x, y, weight, bias, 1e-5, dtype)

    def backward():
        grads = ops.residual_layer_norm_backward(
            up, up_total, total, stats, weight, dtype, True, True, tuned
        )
        return [g for g in grads if g.numel()]

    def separate():
        mean, rstd = stats.view(2, *sizes[:-1], 1)
        grad, *affine = torch.ops.aten.native_layer_norm_backward(
            up.float(), total, sizes[-1:], mean, rstd, weight, bias, [True, tuned, tuned]
        )
        grad = grad + up_total
        return [grad, grad.to(dtype), *([torch.stack(affine)] if tuned else [])]

    def exact() -> list[Tensor]:
        if direction == "forward":
            wide = [a.double() for a in (x, y, weight, bias)]
            return list(residual_layer_norm_reference(*wide))
        mean, rstd = stats.double().view(2, *sizes[:-1], 1)
        grad, *affine = torch.ops.aten.native_layer_norm_backward(
            up.double(), total.double(), sizes[-1:], mean, rstd, weight.double(), bias.double(),
            [True, tuned, tuned],
        )  # fmt: skip
        grad = grad + up_total
        return [grad, grad, *([torch.stack(affine)] if tuned else [])]

    def fused(*tensors):  # also on a CPU, where the models leave it to other calls
        return ops.residual_layer_norm(*tensors)[:2]

    one_pass = residual_layer_norm if device.type == "cuda" else fused
    pair = forward(one_pass), forward(residual_layer_norm_reference)
    ours, official = pair if direction == "forward" else (backward, separate)
    if implementation == "compiled":
        torch._dynamo.reset()
        ours = torch.compile(official, dynamic=False)
    with torch.no_grad():
        measure(
            ours,
            official,
            exact=tuple(exact()),
            memory=True,
            threads=threads,
            headline=(shape, direction, implementation) == ("VGG", "forward", "default"),
            shape="x".join(map(str, sizes)),
            dtype=dtype,
            # forward: residual and branch read, sum and tokens written; backward: the tokens'
            # gradient, the sum's and the sum read, two written
            bytes=(12 if direction == "forward" else 16) * values,
        )

"""Softmax attention: maps in memory, PyTorch's fused kernel, ours. On a GPU PyTorch's serves."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fasttta.ops import processor
from fasttta.ops.softmax_attention import attend

HEADS, CHANNELS = 12, 64  # ViT-B
TOKENS = {"video": 196, "audio": 512, "both": 708}  # CAV-MAE's encoders and its fusion block


def maps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * q.shape[3] ** -0.5
    return scores.softmax(dim=-1) @ v


IMPLEMENTATIONS = {
    "plain": nnf.scaled_dot_product_attention,
    "default": lambda q, k, v: attend(q, k, v, q.shape[3] ** -0.5),
}


def on_cpus(bench):
    """The cases of a bench of a kernel for CPUs."""
    for mark in (
        pytest.mark.parametrize("implementation", IMPLEMENTATIONS),
        pytest.mark.parametrize("direction", ["forward", "forward+backward"]),
        pytest.mark.parametrize("tokens", TOKENS),
        pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel for CPUs"),
    ):
        bench = mark(bench)
    return bench


@on_cpus
def bench_softmax_attention(implementation, direction, tokens, full, threads, measure):
    compare(implementation, direction, tokens, full, threads, measure, torch.float32)


@on_cpus
@pytest.mark.skipif(not processor.bf16_vectors(), reason="this processor has no avx512_bf16")
def bench_bf16_attention(implementation, direction, tokens, full, threads, measure):
    compare(implementation, direction, tokens, full, threads, measure, torch.bfloat16)


def compare(implementation, direction, tokens, full, threads, measure, dtype):
    """Measures an implementation in a type against maps in memory in the same type."""
    batch, heads, count, channels = (4, HEADS, TOKENS[tokens], CHANNELS) if full else (2, 3, 17, 5)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, count, 3, heads, channels, generator=generator).to(dtype)
    inputs = tuple(packed.permute(2, 0, 3, 1, 4))  # views of a packed projection
    along = torch.randn(batch, count, heads, channels, generator=generator)
    along = along.to(dtype).transpose(1, 2)
    backward = direction == "forward+backward"

    def outputs(of, inputs, along):
        out = of(*inputs)
        if not backward:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, inputs, along)

    exact = [x[:1].double().requires_grad_(backward) for x in inputs]
    exact = outputs(maps, exact, along[:1].double())
    inputs = tuple(x.requires_grad_(backward) for x in inputs)
    measure(
        functools.partial(outputs, IMPLEMENTATIONS[implementation], inputs, along),
        functools.partial(outputs, maps, inputs, along),
        exact=exact,
        memory=True,
        threads=threads,
        **({} if dtype == torch.float32 else {"rounding": torch.finfo(dtype).eps}),
        headline=implementation == "default" and tokens == "both" and backward,
        shape="x".join(map(str, inputs[0].shape)),
        dtype=dtype,
        # q, k, v read and the result written; backward reads these and its gradient, writes three
        bytes=(12 if backward else 4) * inputs[0].nbytes,
        # two products of all pairs; backward the scores once more, and four
        flops=(7 if backward else 2) * 2 * batch * heads * count**2 * channels,
    )

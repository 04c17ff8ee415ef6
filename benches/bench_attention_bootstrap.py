"""Attention statistics and loss: official formulation, the best one in plain PyTorch, ours."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fasttta import functional as F

HEADS, CHANNELS, SPANS = 12, 64, (512, 196)  # CAV-MAE's fusion block
BATCHES = (8, 32, 128) if torch.cuda.is_available() else (8,)
CASES = [
    ("mean", "plain"),
    pytest.param("mean", "compiled reference", marks=pytest.mark.compiled),
    pytest.param("mean", "compiled", marks=pytest.mark.compiled),
    ("mean", "default"),
    pytest.param("each", "compiled reference", marks=pytest.mark.compiled),
    ("each", "default"),
]


def merged(q: Tensor, k: Tensor, spans: tuple[int, ...]) -> Tensor:
    """The mean over heads of q·k is the dot product of all heads' channels over H: one product."""
    queries, keys = (x.transpose(1, 2).flatten(2).float() for x in (q, k))  # [B, T, H d]
    scale = q.shape[3] ** -0.5 / q.shape[1]
    scores = torch.bmm(queries, keys.transpose(1, 2))  # [B, T, T], times 1 / scale
    aa, av, va, vv = (
        tuple(scale * x for x in (block.mean((1, 2)), block.std((1, 2))))
        for rows in scores.split(spans, dim=1)
        for block in rows.split(spans, dim=2)
    )
    aa, vv = (tuple(x.detach() for x in moments) for moments in (aa, vv))
    return F.gaussian_kl(*va, *aa) + F.gaussian_kl(*av, *vv)


def loss_of(implementation: str, heads: str):
    """Loss [B] of (q, k, spans) by name."""
    backend = None if implementation == "default" else "reference"
    loss = functools.partial(F.attention_bootstrap, heads=heads, backend=backend)
    if implementation in ("plain", "compiled"):
        loss = merged
    if implementation.startswith("compiled"):
        torch._dynamo.reset()
        return torch.compile(loss, dynamic=False)
    return loss


def views_of_packed(batch: int, dtype: torch.dtype, device: torch.device, full: bool):
    """q, k as the model's packed projection hands them over: [B, H, T, d] views."""
    heads, channels, spans = (HEADS, CHANNELS, SPANS) if full else (3, 5, (4, 3))
    batch = batch if full else 2
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, sum(spans), 3, heads, channels, generator=generator)
    q, k, _ = packed.to(device, dtype).permute(2, 0, 3, 1, 4)
    return q, k, spans


def minimal_flops(
    shape: tuple[int, ...], spans: tuple[int, ...], heads: str, backward: bool
) -> int:
    """The fewest operations on q, k of this shape [B, H, T, d].

    Head mean: all scores of merged heads; backward, the cross blocks once more and their products
    with k and with q. Each head: d x d covariances of q and of k; backward, these once more and
    the products of q and of k with a d x d matrix.
    """
    batch, h, t, d = shape
    if heads == "each":
        return batch * h * 2 * 2 * t * d * d * (3 if backward else 1)
    cross = t * t - sum(n * n for n in spans)
    return batch * 2 * h * d * (t * t + (3 * cross if backward else 0))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("heads", "implementation"), CASES)
def bench_attention_bootstrap(
    heads, implementation, direction, batch, device, full, threads, measure
):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, spans = views_of_packed(batch, dtype, device, full)
    backward = direction == "forward+backward"
    loss, official = loss_of(implementation, heads), loss_of("reference", heads)

    def outputs(of, q, k):
        value = of(q, k, spans)
        return (value, *torch.autograd.grad(value.sum(), (q, k))) if backward else (value,)

    few = [x[:2].detach().double().requires_grad_(backward) for x in (q, k)]
    exact = outputs(official, *few)
    q.requires_grad_(backward), k.requires_grad_(backward)
    measure(
        functools.partial(outputs, loss, q, k),
        functools.partial(outputs, official, q, k),
        exact=exact,
        memory=True,
        threads=threads,
        headline=implementation == "default" and backward,
        shape="x".join(map(str, q.shape)),
        spans=spans,
        dtype=dtype,
        # q and k read; backward reads them again and writes two gradients
        bytes=(6 if backward else 2) * q.numel() * q.element_size(),
        flops=minimal_flops(q.shape, spans, heads, backward),
    )

"""Moments of attention scores with the gradient of all blocks: official formulation and ours."""

from __future__ import annotations

import functools

import pytest
import torch

from fasttta import functional as F

HEADS, CHANNELS, SPANS = 12, 64, (512, 196)  # CAV-MAE's fusion block
BATCHES = (8, 32, 128) if torch.cuda.is_available() else (8,)


def minimal_flops(shape: tuple[int, ...], heads: str, backward: bool) -> int:
    """The fewest operations on q, k of this shape [B, H, T, d].

    Head mean: all scores of merged heads; backward, these once more and their products with k and
    with q. Each head: d x d covariances of q and of k; backward, these once more and the products
    of q and of k with a d x d matrix.
    """
    batch, h, t, d = shape
    if heads == "each":
        return batch * h * 2 * 2 * t * d * d * (3 if backward else 1)
    return batch * 2 * h * d * t * t * (4 if backward else 1)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("heads", ["mean", "each"])
def bench_score_moments(heads, direction, batch, device, full, threads, measure):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    count, channels, spans = (HEADS, CHANNELS, SPANS) if full else (3, 5, (4, 3))
    batch = batch if full else 2
    backward = direction == "forward+backward"
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, sum(spans), 3, count, channels, generator=generator)
    q, k, _ = packed.to(device, dtype).permute(2, 0, 3, 1, 4)  # views of a packed projection

    def outputs(backend, q, k):
        mean, std = F.score_moments(q, k, spans, heads=heads, backend=backend)
        if not backward:
            return mean, std
        return mean, std, *torch.autograd.grad((mean + std).sum(), (q, k))

    few = [x[:2].detach().double().requires_grad_(backward) for x in (q, k)]
    exact = outputs("reference", *few)
    q.requires_grad_(backward), k.requires_grad_(backward)
    measure(
        functools.partial(outputs, None, q, k),
        functools.partial(outputs, "reference", q, k),
        exact=exact,
        memory=True,
        threads=threads,
        headline=False,
        shape="x".join(map(str, q.shape)),
        spans=spans,
        dtype=dtype,
        # q and k read; backward reads them again and writes two gradients
        bytes=(6 if backward else 2) * q.numel() * q.element_size(),
        flops=minimal_flops(q.shape, heads, backward),
    )

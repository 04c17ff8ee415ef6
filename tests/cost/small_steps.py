"""What the log notices, on operations that are known by hand: prints it as JSON, by function.

A script for a process of its own: ``count.start``.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import count

count.load_shim()

# ruff: noqa: E402

import torch
import torch.nn.functional as F

from fasttta.cost import gpu
from fasttta.cost.roofline import GPUS

N = 1024


def _gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=gpu.DEVICE)


def reads_a_value(x, w):
    return (x @ w).sum().item()


def decides_by_a_value(x, w):
    return x if (x @ w).amax() > 0 else w


def chooses_by_a_mask(x, w):
    return x[x[:, 0] > 0]


def synchronises(x, w):
    torch.cuda.synchronize()


def copies_to_the_host(x, w):
    return x.cpu()


def copies_from_the_host(x, w):
    return torch.ones(N).to(x.device)


def makes_a_constant(x, w):
    return x * torch.tensor([0.5] * N, device=x.device)


def copies_pageable_memory(x, w):
    return torch.ones(N).to(x.device, non_blocking=True)


def copies_pinned_memory(x, w):
    return torch.ones(N).pin_memory().to(x.device, non_blocking=True)


def indexes_with_the_host(x, w):
    return x[torch.arange(8)]


def multiplies_in_float32(x, w):
    return x.float() @ w.float()


def attends_in_float32(x, w):
    q = x.float().view(1, 8, N, N // 8)
    return F.scaled_dot_product_attention(q, q, q)


def computes_in_float64(x, w):
    return x.double() + 1


def differentiates_in_float32(x, w):
    y = x.float().requires_grad_()
    return torch.autograd.grad(F.linear(y, w.float()).sum(), y)


def captures_a_read(x, w):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (x @ w).sum().item()
    graph.replay()


def multiplies(x, w):
    return x @ w


def adds(x, w):
    return x + w


def adds_in_place(x, w):
    return x.add_(w)


def adds_into_a_place(x, w):
    return torch.add(x, w, out=torch.empty_like(x))


def multiplies_and_adds(x, w):
    return _gpu(N, N).addmm_(x, w)


def differentiates_a_layer_norm(x, w):
    y, row = x.detach().requires_grad_(), w[0].detach().requires_grad_()
    return torch.autograd.grad(F.layer_norm(y, (N,), row).sum(), y)


def adds_a_row(x, w):
    return x + w[0].expand_as(x)


def copies(x, w):
    return x.copy_(w)


def selects_rows(x, w):
    return x.index_select(0, _gpu(8, dtype=torch.int64))


def views(x, w):
    return x.view(2, -1).t()[0]


def updates_a_list(x, w):
    return torch._foreach_add_([_gpu(8) for _ in range(200)], 1.0)


def frees_one_of_two(x, w):
    first = x + w
    del first
    return x + w


def replays_a_graph(x, w):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x @ w
    for _ in range(3):
        graph.replay()


FUNCTIONS = [value for value in list(globals().values()) if getattr(value, "__module__", "") == (
    __name__) and not getattr(value, "__name__", "_").startswith("_")]  # fmt: skip

if __name__ == "__main__":
    gpu.pretend()
    results = {}
    for function in FUNCTIONS:
        with gpu.counting(half=True) as log:
            x, w = _gpu(N, N), _gpu(N, N)
            log.begin()
            kept = function(x, w)
        seconds = {name: sum(map(g.seconds, log.operations)) for name, g in GPUS.items()}
        results[function.__name__] = {
            "findings": [asdict(x) for x in log.findings], "peak": log.peak, "seconds": seconds,
            "operations": [asdict(x) for x in log.operations],
        }  # fmt: skip
    print(json.dumps(results))

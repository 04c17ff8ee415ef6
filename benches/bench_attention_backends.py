"""PyTorch's attention on a GPU at the shapes of the models: which backend runs, and its rate.

The encoders and the fusion block leave attention to ``scaled_dot_product_attention``, which chooses
among cuDNN's, flash and memory-efficient kernels. "chosen" is what it chooses, and the row names
the longest kernel; the others are asked for by name, and skipped where they cannot run.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDA = torch.cuda.is_available()
BACKENDS = {
    "chosen": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# batch, heads, tokens, channels
SHAPES = {"fusion of 32": (32, 12, 708, 64), "audio of 8": (8, 12, 512, 64)}


def maps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[3] ** -0.5).softmax(dim=-1) @ v


def asked_for(backend: str) -> contextlib.AbstractContextManager[None]:
    chosen = BACKENDS[backend]
    return contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen)


def longest_kernel(run) -> str:
    """The name of the kernel that takes most of a call's time."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return max(profile.key_averages(), key=lambda event: event.self_device_time_total).key


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def bench_attention_backends(precision, backend, direction, shape, device, full, measure):
    if not CUDA and backend != "chosen":
        pytest.skip("a backend of GPUs")
    batch, heads, tokens, channels = SHAPES[shape] if full else (2, 3, 17, 8)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, tokens, 3, heads, channels, generator=generator)
    q, k, v = packed.to(device, dtype).permute(2, 0, 3, 1, 4)  # views of a packed projection
    along = torch.randn(q.transpose(1, 2).shape, generator=generator).to(q).transpose(1, 2)
    backward = direction == "forward+backward"

    def outputs(of, inputs, along):
        out = of(*inputs)
        if not backward:
            return (out.detach(),)
        return out.detach(), *torch.autograd.grad(out, inputs, along)

    def ours():
        with asked_for(backend):
            return outputs(nnf.scaled_dot_product_attention, inputs, along)

    few = [x[:1].double().requires_grad_(backward) for x in (q, k, v)]
    exact = outputs(maps, few, along[:1].double())
    inputs = tuple(x.requires_grad_(backward) for x in (q, k, v))
    kernel = "none: no GPU"
    if CUDA:
        try:
            kernel = longest_kernel(ours)
        except RuntimeError as error:
            pytest.skip(f"{backend} cannot run {dtype}: {str(error).splitlines()[0]}")
    measure(
        ours,
        lambda: outputs(maps, inputs, along),
        exact=exact,
        # a kernel keeps the maps in more digits than the formula does, but rounds their products
        rounding=2**-6 if precision == "bf16" else 1e-5,
        memory=True,
        headline=False,
        shape="x".join(map(str, q.shape)),
        kernel=kernel,
        dtype=dtype,
        bytes=(12 if backward else 4) * q.numel() * q.element_size(),
        flops=(7 if backward else 2) * 2 * batch * heads * tokens**2 * channels,
    )

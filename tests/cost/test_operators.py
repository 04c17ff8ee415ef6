"""What operators declare that their kernels cost is what their launchers do, on tensors without
values at the sizes of real models."""

from __future__ import annotations

import pytest
import torch
from kernels_here import KERNELS, MODULES
from torch.utils._python_dispatch import TorchDispatchMode

from fasttta.cost.operation import FREE
from fasttta.ops import registry
from fasttta.ops.shared_prefix_attention import layout

BF16 = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _samples():
    q, k = meta(4, 12, 708, 64, dtype=BF16), meta(4, 12, 708, 64, dtype=BF16)
    for per_head in (False, True):
        options = [512, 196], 0.125, per_head
        moments = meta(*((4, 12, 2, 2) if per_head else (4, 2, 2)))
        yield "score_moments", (q, k, *options)
        yield "score_moments_backward", (moments, moments, q, k, moments, *options)
        yield "attention_bootstrap", (q, k, *options, False)
        backward = meta(4), q, k, moments, moments
        yield "attention_bootstrap_backward", (*backward, *options, False)
    tokens = meta(4, 12, 2, 2, 65, 64)  # kept by the forward
    yield "token_moments", (q, k, [512, 196])
    yield "attention_bootstrap", (q, k, *options, False, None, None, tokens)
    yield "attention_bootstrap_backward", (*backward, *options, False, None, None, tokens)
    for classes in (309, 10_000):  # of one program, and of several
        z, ones = meta(32, classes), meta(32)
        yield "entropy", (z,)
        yield "entropy_backward", (ones, z)
        yield "principal_entropy", (z, 8, 1e-6)
        yield "principal_entropy_backward", (ones, z, 8, 1e-6)
        yield "balance_entropy", (z, True)
        yield "adaptation_head", (z, 8, 1.0, 1.0, False, 1e-6, ones)
    for size in (14, 224):
        maps = meta(64, size, size)
        yield "total_variation", (maps,)
        yield "total_variation_backward", (meta(64), maps)
        yield "reliability_ensemble", (maps, meta(64, 37), 1.0)
    for mixed in (False, True):  # heads side by side in memory: the launcher packs them
        q = meta(64, 100, 8, 64).transpose(1, 2) if mixed else meta(64, 8, 100, 64)
        sums = meta(64, 8, 100)
        yield "flat_attention", (q, q, q, 0.125)
        yield "flat_attention_backward", (q, q, q, q, q, sums, sums, 0.125)
    packed = layout([4, 5, 6] * 12, "meta")
    for prefix in (5, 0):
        x, shared, lse = meta(2, 180, 512), meta(2, prefix, 512), meta(2, 8, 180)
        arguments = x, x, x, shared, shared
        yield "shared_prefix_attention", (*arguments, *packed, 8, 0.125)
        backward = x, *arguments, x, lse, *packed, 8, 0.125
        yield "shared_prefix_attention_backward", backward
    x, w = meta(8, 512, 3072, dtype=BF16), meta(768)
    for name in ("gelu", "quick_gelu"):
        yield name, (x,)
        yield f"{name}_backward", (x, x)
    x, branch, stats = meta(8, 708, 768), meta(8, 708, 768, dtype=BF16), meta(2, 8 * 708)
    yield "residual_layer_norm", (x, branch, w, w, 1e-5, BF16)
    for tuned in (False, True):
        yield (
            "residual_layer_norm_backward",
            (branch, x, x, stats, w, BF16, True, True, tuned),
        )
    yield "scaled_layer_norm", (x, branch, w, w, 1e-5)
    yield "scaled_rows", (branch, "gelu")


SAMPLES = list(_samples())


class _Launches(TorchDispatchMode):
    """Counts PyTorch's own kernels and those that ``launch.run`` starts."""

    count = 0

    def run(self, *_: object) -> None:
        self.count += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = func._schema.name.partition("::")[2] in FREE or func.is_view
        self.count += not free
        return func(*args, **(kwargs or {}))


def test_every_operator_with_kernels_declares_its_cost():
    registry.operations()
    missing = [name for name in KERNELS if registry.OPERATORS[name].cost is None]
    assert not missing, f"say cost= in define() of {', '.join(missing)}; see fasttta/cost/README.md"
    assert set(KERNELS) <= {name for name, _ in SAMPLES}, "add arguments of it to _samples"


@pytest.mark.parametrize(("name", "args"), SAMPLES, ids=[name for name, _ in SAMPLES])
def test_launches_are_as_declared(name, args, monkeypatch):
    launches = _Launches()
    monkeypatch.setattr(MODULES["launch"], "run", launches.run)
    with launches:
        KERNELS[name](*args)
    assert launches.count == registry.OPERATORS[name].cost(*args).launches


@pytest.mark.parametrize(("name", "args"), SAMPLES, ids=[name for name, _ in SAMPLES])
def test_a_share_is_of_a_rate(name, args):
    cost = registry.OPERATORS[name].cost(*args)
    assert cost.launches >= 1
    assert min(cost.flops, cost.workspace) >= 0
    assert 0 < cost.share <= 1

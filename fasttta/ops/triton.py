"""The Triton kernels, registered for CUDA under the operations' names.

Triton and the kernels are imported on the first call. What a kernel is not made for is computed by
the composite implementation: float64, scale 0, single heads of more than 64 channels, tensors whose
samples span 2^31 elements or whose batch exceeds 65535.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from ..kernels import plan
from . import composite

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOGITS = (
    "adaptation_head", "balance_entropy", "entropy", "entropy_backward", "principal_entropy",
    "principal_entropy_backward",
)  # fmt: skip
_MAPS = ("reliability_ensemble", "total_variation", "total_variation_backward")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels(module: str):
    return import_module(f"...kernels.{module}", __name__)


def _attention(per_head: bool):
    return _kernels("attention_bootstrap_per_head" if per_head else "attention_bootstrap")


def _far(x: Tensor) -> bool:
    """Whether 32 bits cannot hold an offset within a sample, or a grid's second axis the batch."""
    within = zip(x.shape[1:], x.stride()[1:], strict=True)
    return x.shape[0] > 65535 or sum((size - 1) * stride for size, stride in within) >= 2**31


def _typed(*tensors: Tensor | None) -> bool:
    return _installed() and all(x is None or x.dtype in _TYPES for x in tensors)


def _suits_scores(q: Tensor, k: Tensor, spans: list[int], scale: float, per_head: bool) -> bool:
    return (
        _typed(q, k)
        and q.dtype == k.dtype
        and scale != 0
        and not (_far(q) or _far(k))
        and plan.suits(spans, q.shape[3], per_head)
    )


def _suits_anchors(q: Tensor, spans: list[int], per_head: bool, *anchors: Tensor | None) -> bool:
    shape = (q.shape[1], len(spans)) if per_head else (len(spans),)
    return all(x is None or (x.shape == shape and x.dtype == torch.float32) for x in anchors)


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def score_moments(q, k, spans, scale, per_head):
    if not _suits_scores(q, k, spans, scale, per_head):
        return composite.score_moments(q, k, spans, scale, per_head)
    return _attention(per_head).score_moments(q, k, spans, scale)


def score_moments_backward(grad_mean, grad_std, q, k, std, spans, scale, per_head):
    statistics = grad_mean, grad_std, std
    if not (_suits_scores(q, k, spans, scale, per_head) and _typed(*statistics)):
        return composite.score_moments_backward(
            grad_mean, grad_std, q, k, std, spans, scale, per_head
        )
    grad_mean, grad_std, std = map(_dense, statistics)
    return _attention(per_head).score_moments_backward(grad_mean, grad_std, q, k, std, spans, scale)


def attention_bootstrap(
    q, k, spans, scale, per_head, pair_query, anchor_mean=None, anchor_std=None
):
    anchors = anchor_mean, anchor_std
    if not (
        _suits_scores(q, k, spans, scale, per_head) and _suits_anchors(q, spans, per_head, *anchors)
    ):
        return composite.attention_bootstrap(q, k, spans, scale, per_head, pair_query, *anchors)
    anchors = map(_dense, anchors)
    return _attention(per_head).attention_bootstrap(q, k, spans, scale, pair_query, *anchors)


def attention_bootstrap_backward(
    grad, q, k, mean, std, spans, scale, per_head, pair_query, anchor_mean=None, anchor_std=None
):
    anchors = anchor_mean, anchor_std
    if not (
        _suits_scores(q, k, spans, scale, per_head)
        and _typed(grad, mean, std)
        and _suits_anchors(q, spans, per_head, *anchors)
    ):
        return composite.attention_bootstrap_backward(
            grad, q, k, mean, std, spans, scale, per_head, pair_query, *anchors
        )
    mean, std, *anchors = map(_dense, (mean, std, *anchors))
    return _attention(per_head).attention_bootstrap_backward(
        grad, q, k, mean, std, spans, scale, pair_query, *anchors
    )


def _on_rows(module: str, rank: int, name: str, *args):
    """An operation on logits or maps: rows or maps are its tensors of that rank."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    rows = [x for x in tensors if x.ndim > 1]
    suits = _typed(*tensors) and all(x.numel() and not _far(x[:1]) for x in rows)
    suits = suits and rows[0].ndim == rank and (rank == 2 or rows[0].shape[0] <= 65535)
    return getattr(_kernels(module) if suits else composite, name)(*args)


KERNELS: dict[str, Callable] = {
    "score_moments": score_moments,
    "score_moments_backward": score_moments_backward,
    "attention_bootstrap": attention_bootstrap,
    "attention_bootstrap_backward": attention_bootstrap_backward,
    **{name: functools.partial(_on_rows, "adaptation_head", 2, name) for name in _LOGITS},
    **{name: functools.partial(_on_rows, "total_variation", 3, name) for name in _MAPS},
}


def _on_own_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be the tensors'."""

    def call(*args):
        x = next(x for x in args if isinstance(x, Tensor))
        if x.device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(x.device):
            return function(*args)

    return call


def register(library: torch.library.Library) -> None:
    """Registers every operation that has a kernel, for CUDA."""
    for name, function in KERNELS.items():
        library.impl(name, _on_own_device(function), "CUDA")


def refusal(name: str, tensors: Sequence[Tensor]) -> str | None:
    """Why an operation has no kernel for these tensors; None if it has."""
    if name not in KERNELS:
        return f"{name} has no Triton kernel"
    if not _installed():
        return "Triton is not installed"
    if not tensors and not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    for x in tensors:
        if x.device.type != "cuda":
            return f"it needs tensors on a CUDA device, found {x.device}"
        if x.dtype not in _TYPES:
            return f"it needs float16, bfloat16 or float32, found {x.dtype}"
    return None

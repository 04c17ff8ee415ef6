"""Definitions of the operations with PyTorch's dispatcher, which is the only registry.

The composite implementation serves every device (CompositeExplicitAutograd). Triton launchers are
registered for CUDA beside it; the C++ kernels are registered for CPU by their library, which the
first call on the CPU loads. Callers never change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import composite, native, triton
from .reference import wide

_ANCHORS = "Tensor? anchor_mean=None, Tensor? anchor_std=None"

_PACKED = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v"
_LAYOUT = "Tensor starts, Tensor tiles, int longest, int heads, float scale"

SCHEMAS = {
    "score_moments": "(Tensor q, Tensor k, int[] spans, float scale, bool per_head)"
    " -> (Tensor mean, Tensor std)",
    "score_moments_backward": "(Tensor grad_mean, Tensor grad_std, Tensor q, Tensor k, Tensor std,"
    " int[] spans, float scale, bool per_head) -> (Tensor, Tensor)",
    "attention_bootstrap": "(Tensor q, Tensor k, int[] spans, float scale, bool per_head,"
    f" bool pair_query, {_ANCHORS}) -> (Tensor loss, Tensor mean, Tensor std)",
    "attention_bootstrap_backward": "(Tensor grad, Tensor q, Tensor k, Tensor mean, Tensor std,"
    f" int[] spans, float scale, bool per_head, bool pair_query, {_ANCHORS}) -> (Tensor, Tensor)",
    "entropy": "(Tensor logits) -> Tensor",
    "entropy_backward": "(Tensor grad, Tensor logits) -> Tensor",
    "principal_entropy": "(Tensor logits, int k, float eps) -> Tensor",
    "principal_entropy_backward": "(Tensor grad, Tensor logits, int k, float eps) -> Tensor",
    "balance_entropy": "(Tensor logits, bool softmax_sum, Tensor? weight=None)"
    " -> (Tensor balance, Tensor grad)",
    "adaptation_head": "(Tensor logits, int k, float entropy_weight, float balance_weight,"
    " bool softmax_sum, float eps, Tensor? weight=None)"
    " -> (Tensor total, Tensor entropy, Tensor balance, Tensor grad)",
    "total_variation": "(Tensor maps) -> Tensor",
    "total_variation_backward": "(Tensor grad, Tensor maps) -> Tensor",
    "reliability_ensemble": "(Tensor maps, Tensor logits, float temperature)"
    " -> (Tensor probability, Tensor tv, Tensor weights)",
    "flat_attention": "(Tensor q, Tensor k, Tensor v, float scale)"
    " -> (Tensor out, Tensor top, Tensor rest)",
    "flat_attention_backward": "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor top,"
    " Tensor rest, float scale) -> (Tensor, Tensor, Tensor)",
    "shared_prefix_attention": f"({_PACKED}, {_LAYOUT}) -> (Tensor out, Tensor lse)",
    "shared_prefix_attention_backward": f"(Tensor grad, {_PACKED}, Tensor out, Tensor lse,"
    f" {_LAYOUT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}

# Parts of composite implementations that C++ has too; the composite ones call them where they suit.
_PARTS = {
    "head_moments": "(Tensor q, Tensor k, int[] spans, float scale) -> (Tensor mean, Tensor std)",
    "head_moments_backward": "(Tensor grad_mean, Tensor slope, Tensor q, Tensor k, int[] spans,"
    " float scale, bool self_blocks, Tensor(a!) grad_q, Tensor(b!) grad_k) -> ()",
    "block_moments": "(Tensor scores, int[] rows, int[] columns, float scale)"
    " -> (Tensor mean, Tensor std)",
    "block_moments_backward": "(Tensor grad_mean, Tensor slope, int[] rows, int[] columns,"
    " float scale, Tensor(a!) scores) -> ()",
}


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=wide(x[:0]).dtype)


def _moments(q, k, spans, scale, per_head, *rest):
    shape = (*q.shape[: 2 if per_head else 1], len(spans), len(spans))
    return _like(q, shape), _like(q, shape)


def _block_moments(scores, rows, columns, scale):
    shape = (scores.shape[0], len(rows), len(columns))
    return _like(scores, shape), _like(scores, shape)


def _bootstrap(q, k, spans, scale, per_head, *rest):
    return _like(q, (q.shape[0],)), *_moments(q, k, spans, scale, per_head)


def _with_grad(logits: Tensor, scalars: int) -> tuple[Tensor, ...]:
    values = tuple(_like(logits, ()) for _ in range(scalars))
    return *values, _like(logits, logits.shape)


def _ensemble(maps: Tensor, logits: Tensor, temperature: float) -> tuple[Tensor, ...]:
    per_map = tuple(_like(maps, maps.shape[:1]) for _ in range(2))
    return _like(logits, logits.shape[1:]), *per_map


def _prefix_attention(q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, scale):
    return q.new_empty(q.shape), _like(q, (q.shape[0], heads, q.shape[1]))


# What torch.compile traces in place of the work: shapes, types and strides of the results.
_FAKES: dict[str, Callable[..., Any]] = {
    "score_moments": _moments,
    "score_moments_backward": lambda gm, gs, q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
    "attention_bootstrap": _bootstrap,
    "attention_bootstrap_backward": lambda g, q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
    "head_moments": lambda q, k, spans, scale: _moments(q, k, spans, scale, True),
    "head_moments_backward": lambda *_: None,
    "block_moments": _block_moments,
    "block_moments_backward": lambda *_: None,
    "entropy": lambda logits: _like(logits, logits.shape[:-1]),
    "entropy_backward": lambda grad, logits: logits.new_empty(logits.shape),
    "principal_entropy": lambda logits, *_: _like(logits, logits.shape[:-1]),
    "principal_entropy_backward": lambda grad, logits, *_: logits.new_empty(logits.shape),
    "balance_entropy": lambda logits, *_: _with_grad(logits, 1),
    "adaptation_head": lambda logits, *_: _with_grad(logits, 3),
    "total_variation": lambda maps: _like(maps, maps.shape[:1]),
    "total_variation_backward": lambda grad, maps: maps.new_empty(maps.shape),
    "reliability_ensemble": _ensemble,
    "flat_attention": lambda q, k, v, _: (
        v.new_empty(k.shape),
        _like(k, k.shape[:3]),
        _like(k, k.shape[:3]),
    ),
    "flat_attention_backward": lambda grad, q, k, v, *_: tuple(
        x.new_empty(x.shape) for x in (q, k, v)
    ),
    "shared_prefix_attention": _prefix_attention,
    "shared_prefix_attention_backward": lambda grad, *tensors: tuple(
        x.new_empty(x.shape) for x in tensors[:5]
    ),
}


def _composite(name: str) -> Callable[..., Any]:
    """An operation's composite implementation, which on the CPU makes way for the C++ kernel:
    once that is registered the dispatcher no longer comes here."""
    serve = getattr(composite, name)
    if name not in native.NAMES:
        return serve

    def call(*args):
        if args[0].device.type == "cpu" and native.load():
            return getattr(torch.ops.fasttta, name)(*args)
        return serve(*args)

    return call


LIBRARY = torch.library.Library("fasttta", "DEF")
for _name, _schema in (SCHEMAS | _PARTS).items():
    LIBRARY.define(_name + _schema)
    if _name in SCHEMAS:
        LIBRARY.impl(_name, _composite(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fasttta::{_name}", _FAKES[_name], lib=LIBRARY)
triton.register(LIBRARY)

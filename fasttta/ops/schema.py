"""Definitions of the operations with PyTorch's dispatcher, which is the only registry.

The composite implementation serves every device (CompositeExplicitAutograd); a C++ or Triton one
is added by registering it for CPU or CUDA under the same name, and callers never change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import composite
from .reference import wide

_ANCHORS = "Tensor? anchor_mean=None, Tensor? anchor_std=None"

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
    "adaptation_head": "(Tensor logits, int k, bool softmax_sum, float eps, Tensor? weight=None)"
    " -> (Tensor entropy, Tensor balance, Tensor grad_entropy, Tensor grad_balance)",
}


def _like_logits(logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    return logits.new_empty(shape, dtype=wide(logits[:0]).dtype)


def _moments(q, k, spans, scale, per_head, *rest):
    shape = (*q.shape[: 2 if per_head else 1], len(spans), len(spans))
    return _like_logits(q, shape), _like_logits(q, shape)


def _bootstrap(q, k, spans, scale, per_head, *rest):
    return _like_logits(q, (q.shape[0],)), *_moments(q, k, spans, scale, per_head)


def _with_grads(logits: Tensor, count: int) -> tuple[Tensor, ...]:
    values = tuple(_like_logits(logits, ()) for _ in range(count))
    return *values, *(_like_logits(logits, logits.shape) for _ in range(count))


# What torch.compile traces in place of the work: shapes, types and strides of the results.
_FAKES = {
    "score_moments": _moments,
    "score_moments_backward": lambda gm, gs, q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
    "attention_bootstrap": _bootstrap,
    "attention_bootstrap_backward": lambda g, q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
    "entropy": lambda logits: _like_logits(logits, logits.shape[:-1]),
    "entropy_backward": lambda grad, logits: torch.empty_like(logits),
    "principal_entropy": lambda logits, *_: _like_logits(logits, logits.shape[:-1]),
    "principal_entropy_backward": lambda grad, logits, *_: torch.empty_like(logits),
    "balance_entropy": lambda logits, *_: _with_grads(logits, 1),
    "adaptation_head": lambda logits, *_: _with_grads(logits, 2),
}

LIBRARY = torch.library.Library("fasttta", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, getattr(composite, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fasttta::{_name}", _FAKES[_name], lib=LIBRARY)

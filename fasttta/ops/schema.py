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
_HEAD = "int k, float entropy_weight, float balance_weight, bool softmax_sum, float eps"

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
    "balance_entropy": "(Tensor logits, bool softmax_sum, Tensor? weight=None) -> Tensor",
    "balance_entropy_backward": "(Tensor grad, Tensor logits, bool softmax_sum,"
    " Tensor? weight=None) -> Tensor",
    "adaptation_head": f"(Tensor logits, {_HEAD}, Tensor? weight=None)"
    " -> (Tensor total, Tensor entropy, Tensor balance)",
    "adaptation_head_backward": "(Tensor grad_total, Tensor grad_entropy, Tensor grad_balance,"
    f" Tensor logits, {_HEAD}, Tensor? weight=None) -> Tensor",
}


def _like_logits(logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    return logits.new_empty(shape, dtype=wide(logits[:0]).dtype)


def _moments(q, k, spans, scale, per_head, *rest):
    shape = (*q.shape[: 2 if per_head else 1], len(spans), len(spans))
    return _like_logits(q, shape), _like_logits(q, shape)


def _bootstrap(q, k, spans, scale, per_head, *rest):
    return _like_logits(q, (q.shape[0],)), *_moments(q, k, spans, scale, per_head)


def _scalars(logits, *rest):
    return tuple(_like_logits(logits, ()) for _ in range(3))


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
    "balance_entropy": lambda logits, *_: _like_logits(logits, ()),
    "balance_entropy_backward": lambda grad, logits, *_: torch.empty_like(logits),
    "adaptation_head": _scalars,
    "adaptation_head_backward": lambda gt, ge, gb, logits, *_: torch.empty_like(logits),
}

LIBRARY = torch.library.Library("fasttta", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, getattr(composite, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fasttta::{_name}", _FAKES[_name], lib=LIBRARY)

"""Covariances and means of a head's tokens, with which moments of each head begin.

Both directions need them: attention_bootstrap's forward keeps them, so that its backward reads
every token once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import score_moments_default as in_pytorch
from .cost import Cost
from .registry import define, result_like
from .score_moments import cost_of_tokens, no_triton_scores

SCHEMA = "token_moments(Tensor q, Tensor k, int[] spans) -> Tensor tokens"


def _fake(q, k, spans):
    d = q.shape[3]
    return result_like(q, (*q.shape[:2], 2, len(spans), d + 1, d))


def _default(q: Tensor, k: Tensor, spans: list[int]) -> Tensor:
    """Of q, then k [B, H, T, d], of each of M modalities: [B, H, 2, M, d + 1, d], a population
    covariance [d, d] and below it the mean token [d], at least in float32."""
    tokens = _fake(q, k, spans)
    for n, x in enumerate((q, k)):
        for m, (mean, covariance) in enumerate(in_pytorch.token_covariances(x, spans)):
            tokens[:, :, n, m, :-1] = covariance
            tokens[:, :, n, m, -1:] = mean
    return tokens


def _no_triton(q: Tensor, k: Tensor, spans: Sequence[int]) -> str | None:
    return no_triton_scores(q, k, spans, 1.0, True)


def keeps_tokens(q: Tensor, k: Tensor, spans: Sequence[int], per_head: bool) -> bool:
    """Whether attention_bootstrap computes them beforehand, for both directions.

    On a GPU, where kernels use them, and if they take less memory than q and k, which are kept
    too: 26 MB beside 70 MB with 32 samples of a ViT-B in bfloat16. Else each direction computes
    its own.
    """
    if not (per_head and q.is_cuda) or _no_triton(q, k, spans):
        return False
    tokens, d = q.shape[2:]
    return len(spans) * (d + 1) * 4 <= tokens * q.element_size()


def _cost(q: Tensor, k: Tensor, spans: Sequence[int]) -> Cost:
    return cost_of_tokens(q)


define(
    SCHEMA,
    _fake,
    _default,
    kernels="score_moments_per_head",
    no_triton=_no_triton,
    cost=_cost,
)

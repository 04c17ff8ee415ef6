"""Ensembles of views: agreement of their features, weighted means of their predictions, and the
resizing of their attention maps. All are batched over B episodes of N views each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity_weights(
    features: Tensor, neighbours: int, temperature: float, drop_self: Sequence[bool] | None = None
) -> Tensor:
    """softmax of each view's mean cosine similarity to its nearest neighbours: [B, N].

    Args:
        features: [B, N, E], normalised.
        neighbours: at most N - 1 are taken.
        drop_self: None: a view is never a neighbour of itself. The official code leaves it out only
            where the float product is at least 1, which rounding decides for about half of the
            views; a pattern [N] of True (left out) and False (kept) reproduces one such run.

    Source: R-TPT (Sheng et al., CVPR 2025) and its code.
    """
    n = features.shape[1]
    if n == 1:
        return features.new_ones(features.shape[:2])
    similarity = features @ features.transpose(1, 2)
    left_out = torch.eye(n, dtype=torch.bool, device=features.device)
    if drop_self is not None:
        left_out &= _flags(drop_self, features.device)
    similarity = similarity.masked_fill(left_out, -torch.inf)
    score = similarity.topk(min(neighbours, n - 1), dim=-1).values.mean(-1)
    return (score / temperature).softmax(-1)


def _flags(values: Sequence[bool], device: torch.device) -> Tensor:
    """bool [N] on a device from the bits of integers: a tensor of values of the host would be
    copied there, which waits for all work before it and cannot be captured."""
    parts = []
    for start in range(0, len(values), 32):
        part = values[start : start + 32]
        bits = sum(1 << i for i, value in enumerate(part) if value)
        parts.append((bits >> torch.arange(len(part), device=device)) & 1)
    return torch.cat(parts).bool()


def ensemble_log_probabilities(logits: Tensor, weights: Tensor) -> Tensor:
    """log of the weighted mean of predictions: [B, N, C], [B, N] -> [B, C]."""
    log_w = weights.log()[..., None]  # -inf for a view with weight 0
    return torch.logsumexp(logits.log_softmax(-1) + log_w, 1)


def ensemble_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of logits: [B, N, C], [B, N] -> [B, C]."""
    return torch.einsum("bn,bnc->bc", weights, logits)


def sharpen(maps: Tensor, threshold: float) -> Tensor:
    """What lies above a threshold, scaled to maximum 1 and squared: [N, R, R], for Grad-CAM."""
    maps = (maps - threshold).clamp_min(0)
    return (maps / (maps.amax((1, 2), keepdim=True) + 1e-8)).square()


def upsampled(maps: Tensor, resolution: int) -> Tensor:
    """[N, G, G] -> [N, R, R], bilinear on pixel centres."""
    size = (resolution, resolution)
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]

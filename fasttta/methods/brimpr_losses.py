"""The losses of BriMPR, for any number of modalities."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .base import weighted_mean

EPS = 1e-6  # F.pairwise_distance adds it to every component of a difference


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a - b + EPS, dim=-1)


def discrepancy(
    features: Tensor, std: Tensor, mean: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Distance of a batch's first two moments from those of source data, layer by layer.

    Args:
        features: [B, N, D].
        std, mean: [N, D] of source data.
        weight: [B], 1 for samples that count, else 0; None: all count.

    Returns:
        [N]: |std_s - std_t + eps| + |mean_s - mean_t + eps|, standard deviations over n - 1. One
        sample has no spread: of it the second summand alone.
    """
    if weight is None:
        centre = _distance(mean, features.mean(dim=0))
        return centre if len(features) < 2 else _distance(std, features.std(dim=0)) + centre
    n, weight = weight.sum(), weight[:, None, None]
    average = torch.where(weight > 0, features, 0).sum(dim=0) / n
    squares = torch.where(weight > 0, features - average, 0).square().sum(dim=0)
    variance = squares / (n - 1).clamp_min(1)
    # the root of 0 has no gradient; torch.std gives it 0
    spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
    return torch.where(n > 1, _distance(std, spread), 0) + _distance(mean, average)


def shares(discrepancies: Sequence[Tensor]) -> list[Tensor]:
    """Weights (0-d each) of the terms of ``recombination``, from the modalities' discrepancies (0-d
    each): a modality that is closer to source data gets a larger weight. They sum to 1. With two
    modalities, each gets the relative discrepancy of the other."""
    total = torch.stack(list(discrepancies)).detach().sum()
    others = len(discrepancies) - 1
    return [(1 - d.detach() / total) / others for d in discrepancies]


def teacher(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities [B, C] that predictions with a masked modality are pulled towards: the
    prediction from all tokens, softened by a temperature (0-d). Without gradient."""
    return (logits.detach() / temperature).softmax(dim=-1)


def recombination(
    target: Tensor, masked: Tensor, share: Tensor, weight: Tensor | None = None,
    rows: slice = slice(None),
) -> Tensor:  # fmt: skip
    """Cross entropy of a prediction with one modality masked to the teacher's, times its share.

    Args:
        target: [B, C], of ``teacher``.
        masked: [b, C], of these rows; at temperature 1. share: 0-d, of ``shares``.

    Returns:
        0-d: the rows' part of the mean over the batch.
    """
    values = -(target[rows] * masked.log_softmax(dim=-1)).sum(dim=-1)
    if weight is None:
        return share * values.sum() / len(target)
    return share * torch.where(weight[rows] > 0, values, 0).sum() / weight.sum()


def contrast(
    representations: Sequence[Tensor], temperature: float, weight: Tensor | None = None
) -> Tensor:
    """Each sample's modalities against those of other samples, the mean over ordered pairs.

    Args:
        representations: [B, D] of each modality alone.
        temperature: of the cosine similarities.
    """
    unit = [nnf.normalize(x, dim=-1) for x in representations]
    terms = []
    for a, b in itertools.permutations(unit, 2):
        scores = a @ b.T / temperature  # [B, B]
        if weight is not None:  # a sample that does not count is compared with itself only
            same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
            both = (weight.unsqueeze(1) * weight) > 0
            scores = torch.where(both, scores, torch.where(same, 0.0, -torch.inf))
        terms.append(weighted_mean(-scores.log_softmax(dim=-1).diagonal(), weight))
    return torch.stack(terms).mean()

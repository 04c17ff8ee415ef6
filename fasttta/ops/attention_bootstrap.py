"""The attention bootstrapping loss on score statistics. The default implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import gaussian_kl
from .score_moments import moments_backward, score_moments


def _anchors(
    mean: Tensor,
    std: Tensor,
    pair_query: bool,
    anchor_mean: Tensor | None,
    anchor_std: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mean and std that each block [.., i, j] is matched with: those of (j, j), or of (i, i)."""
    mean_s = mean.diagonal(dim1=-2, dim2=-1) if anchor_mean is None else anchor_mean
    std_s = std.diagonal(dim1=-2, dim2=-1) if anchor_std is None else anchor_std
    dim = -1 if pair_query else -2
    return mean_s.unsqueeze(dim), std_s.unsqueeze(dim)


def attention_bootstrap(
    q: Tensor,
    k: Tensor,
    spans: list[int],
    scale: float,
    per_head: bool,
    pair_query: bool,
    anchor_mean: Tensor | None = None,
    anchor_std: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, std = score_moments(q, k, spans, scale, per_head)
    mean_s, std_s = _anchors(mean, std, pair_query, anchor_mean, anchor_std)
    cross = ~torch.eye(len(spans), dtype=torch.bool, device=q.device)
    loss = torch.where(cross, gaussian_kl(mean, std, mean_s, std_s), 0).sum((-2, -1))
    return (loss.mean(dim=1) if per_head else loss), mean, std


def attention_bootstrap_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    mean: Tensor,
    std: Tensor,
    spans: list[int],
    scale: float,
    per_head: bool,
    pair_query: bool,
    anchor_mean: Tensor | None = None,
    anchor_std: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    mean_s, std_s = _anchors(mean, std, pair_query, anchor_mean, anchor_std)
    grad = (grad[:, None] / q.shape[1] if per_head else grad)[..., None, None].to(mean.dtype)
    cross = ~torch.eye(len(spans), dtype=torch.bool, device=q.device)
    used = cross & (grad != 0)  # a sample of weight 0 may have undefined statistics
    variance_s = std_s.square()
    grad_mean = torch.where(used, grad * (mean - mean_s) / variance_s, 0)
    grad_std = torch.where(used, grad * (std / variance_s - 1 / std), 0)
    return moments_backward(grad_mean, grad_std, q, k, std, spans, scale, per_head, False)

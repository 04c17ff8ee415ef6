"""Every operation in plain PyTorch, differentiated by autograd: what the others are compared with.

Attention statistics are the official formulation: all heads' T x T score maps, their mean over
heads, slices of it. Half-precision inputs are computed in float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # it computes with what is here
    from .shared_prefix_attention import Layout


def wide(x: Tensor) -> Tensor:
    """x in the precision statistics and losses are computed in: at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def log(p: Tensor) -> Tensor:
    """ln p of probabilities, 0 (value and gradient) where p is 0: p ln p ends there. nan stays."""
    return torch.where(p == 0, 0, torch.log(torch.where(p == 0, 1, p)))


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(N(mean_p, std_p^2) || N(mean_q, std_q^2)), elementwise."""
    squares = std_p.square() + (mean_p - mean_q).square()
    return torch.log(std_q / std_p) + squares / (2 * std_q.square()) - 0.5


def flat_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = scale * (wide(q) @ wide(k).transpose(-2, -1))
    share = scores.flatten(-2).softmax(dim=-1).view_as(scores)
    return (k.shape[-2] * (share @ wide(v))).to(v.dtype)


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor,
    tiles: Tensor, longest: int, heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """One sequence after the other, each with the prefix in front of it."""
    dtype, last = q.dtype, q.shape[1] != k.shape[1]
    q, k, v, prefix_k, prefix_v = (
        wide(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v, prefix_k, prefix_v)
    )
    found = []
    for n, (start, stop) in enumerate(pairwise(starts.tolist())):
        keys = torch.cat((prefix_k, k[:, :, start:stop]), dim=2)
        values = torch.cat((prefix_v, v[:, :, start:stop]), dim=2)
        queries = q[:, :, n : n + 1] if last else q[:, :, start:stop]
        scores = scale * (queries @ keys.transpose(-2, -1))
        later = torch.ones_like(scores, dtype=torch.bool).triu(
            1 + scores.shape[-1] - scores.shape[-2]
        )
        found.append(scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ values)
    return torch.cat(found, dim=2).transpose(1, 2).flatten(2).to(dtype)


def causal_with_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix: Layout, packed: Layout, heads: int, scale: float
) -> Tensor:
    """Of the prefix's tokens, which lie in front, and of the packed ones after them."""
    n, none = prefix.longest, k[:, :0]
    (q0, q1), (k0, k1), (v0, v1) = ((x[:, :n], x[:, n:]) for x in (q, k, v))
    front = shared_prefix_attention(q0, k0, v0, none, none, *prefix, heads, scale)
    return torch.cat(
        (front, shared_prefix_attention(q1, k1, v1, k0, v0, *packed, heads, scale)), dim=1
    )


def score_moments(
    q: Tensor, k: Tensor, spans: list[int], scale: float, per_head: bool
) -> tuple[Tensor, Tensor]:
    scores = scale * (wide(q) @ wide(k).transpose(-2, -1))  # [B, H, T, T]
    if not per_head:
        scores = scores.mean(dim=1)  # [B, T, T]
    blocks = [row.split(spans, dim=-1) for row in scores.split(spans, dim=-2)]
    mean = torch.stack([torch.stack([b.mean((-2, -1)) for b in row], -1) for row in blocks], -2)
    std = torch.stack([torch.stack([b.std((-2, -1)) for b in row], -1) for row in blocks], -2)
    return mean, std


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
    loss = torch.zeros_like(mean[..., 0, 0])
    for i in range(len(spans)):
        for j in range(len(spans)):
            if i != j:
                a = i if pair_query else j
                mean_s = mean[..., a, a].detach() if anchor_mean is None else anchor_mean[..., a]
                std_s = std[..., a, a].detach() if anchor_std is None else anchor_std[..., a]
                loss = loss + gaussian_kl(mean[..., i, j], std[..., i, j], mean_s, std_s)
    return (loss.mean(dim=1) if per_head else loss), mean, std


def entropy(logits: Tensor) -> Tensor:
    log_p = wide(logits).log_softmax(dim=-1)
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0, log_p)).sum(dim=-1)


def principal_entropy(logits: Tensor, k: int, eps: float) -> Tensor:
    logits = wide(logits)
    index = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    p = logits.softmax(dim=-1).gather(-1, index)
    return -(p * log(p + eps)).sum(dim=-1)


def balance_entropy(logits: Tensor, softmax_sum: bool, weight: Tensor | None = None) -> Tensor:
    p = wide(logits).softmax(dim=-1)
    if weight is not None:
        p = p * weight.to(p.dtype).unsqueeze(-1)
    if softmax_sum:
        q = p.sum(dim=0).softmax(dim=0)
    else:
        q = p.sum(dim=0) / (p.shape[0] if weight is None else weight.to(p.dtype).sum())
    return -(q * log(q)).sum()


def adaptation_head(
    logits: Tensor,
    k: int,
    entropy_weight: float,
    balance_weight: float,
    softmax_sum: bool,
    eps: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    per_sample = principal_entropy(logits, k, eps)
    if weight is None:
        principal = per_sample.mean()
    else:
        weight = weight.to(per_sample.dtype)
        principal = (per_sample * weight).sum() / weight.sum()
    balance = balance_entropy(logits, softmax_sum, weight)
    return entropy_weight * principal - balance_weight * balance, principal, balance


def total_variation(maps: Tensor) -> Tensor:
    x = wide(maps)
    return x.diff(dim=1).abs().sum((1, 2)) + x.diff(dim=2).abs().sum((1, 2))


def reliability_weights(tv: Tensor, temperature: float) -> Tensor:
    return (wide(tv) / -temperature).softmax(dim=0)


@torch.no_grad()
def reliability_ensemble(
    maps: Tensor, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    tv = total_variation(maps)
    weights = reliability_weights(tv, temperature)
    p = wide(logits).softmax(dim=-1)
    return weights.to(p.dtype) @ p, tv, weights

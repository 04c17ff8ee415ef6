"""Losses on logits: PyTorch calls, analytic backward. The default implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import log, wide


def entropy(logits: Tensor) -> Tensor:
    log_p = wide(logits).log_softmax(dim=-1)
    p = log_p.exp()
    return -torch.where(p == 0, 0, p * log_p).sum(dim=-1)


def entropy_backward(grad: Tensor, logits: Tensor) -> Tensor:
    log_p = wide(logits).log_softmax(dim=-1)
    p = log_p.exp()
    plogp = torch.where(p == 0, 0, p * log_p)
    total = plogp.sum(dim=-1, keepdim=True)  # -entropy
    return (-grad.unsqueeze(-1) * (plogp - p * total)).to(logits.dtype).contiguous()


def _top(logits: Tensor, k: int) -> Tensor:
    """Mask of the k largest logits of each row, ties to the lowest index."""
    if k >= logits.shape[-1]:
        return torch.ones_like(logits, dtype=torch.bool)
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    selected = logits >= threshold
    if logits.device.type == "cpu" and selected.sum() == k * logits.shape[0]:
        return selected  # no ties; on a GPU the question would wait for the device
    above = logits > threshold
    tied = selected & ~above
    return above | (tied & (tied.cumsum(dim=-1) <= k - above.sum(dim=-1, keepdim=True)))


def _principal(logits: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """p, -ln(p + eps) on the selected classes (0 elsewhere), the selection."""
    p = logits.softmax(dim=-1)
    selected = _top(logits, k)
    return p, torch.where(selected, -log(p + eps), 0), selected


def principal_entropy(logits: Tensor, k: int, eps: float) -> Tensor:
    p, surprise, _ = _principal(wide(logits), k, eps)
    return (p * surprise).sum(dim=-1)


def _principal_grad(p: Tensor, surprise: Tensor, selected: Tensor, eps: float) -> Tensor:
    """d principal entropy / d logits, row by row: p (g - <p, g>), g = -ln(p+e) - p/(p+e)."""
    share = torch.where(selected & (p + eps != 0), p / (p + eps), 0)
    weighted = p * (surprise - share)
    return weighted - p * weighted.sum(dim=-1, keepdim=True)


def principal_entropy_backward(grad: Tensor, logits: Tensor, k: int, eps: float) -> Tensor:
    parts = _principal(wide(logits), k, eps)
    return (grad.unsqueeze(-1) * _principal_grad(*parts, eps)).to(logits.dtype).contiguous()


def _class_mass(p: Tensor, softmax_sum: bool, weight: Tensor | None) -> Tensor:
    """Class distribution [C] of the batch whose entropy is the balance term."""
    total = p.sum(dim=0) if weight is None else weight @ p
    if softmax_sum:
        return total.softmax(dim=0)
    return total / (p.shape[0] if weight is None else weight.sum())


def _balance(p: Tensor, softmax_sum: bool, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The balance entropy of predictions p [n, C] and its gradient [n, C] on their logits.

    Form "mean": p (h - <p, h>) w / sum w with h = -ln m; "softmax-sum": h = m (-ln m - entropy).
    """
    m = _class_mass(p, softmax_sum, weight)
    h = -log(m)
    value = m @ h
    h = m * (h - value) if softmax_sum else h / (p.shape[0] if weight is None else weight.sum())
    grad = p * (h - (p @ h).unsqueeze(-1))
    return value, grad if weight is None else grad * weight.unsqueeze(-1)


def balance_entropy(
    logits: Tensor, softmax_sum: bool, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    p = wide(logits).softmax(dim=-1)
    value, grad = _balance(p, softmax_sum, None if weight is None else weight.to(p.dtype))
    return value, grad.contiguous()


def adaptation_head(
    logits: Tensor,
    k: int,
    entropy_weight: float,
    balance_weight: float,
    softmax_sum: bool,
    eps: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total, mean principal entropy, balance entropy, and the gradient [n, C] of the total: the
    softmax and the selection are shared, so value and gradient cost little more than the value."""
    z = wide(logits)
    parts = _principal(z, k, eps)
    p, surprise, _ = parts
    rows = _principal_grad(*parts, eps)
    if weight is None:
        principal = (p * surprise).sum() / p.shape[0]
        rows = rows / p.shape[0]
    else:
        weight = weight.to(p.dtype)
        share = weight / weight.sum()
        principal = (share @ (p * surprise)).sum()
        rows = rows * share.unsqueeze(-1)
    balance, columns = _balance(p, softmax_sum, weight)
    total = entropy_weight * principal - balance_weight * balance
    grad = entropy_weight * rows - balance_weight * columns
    return total, principal, balance, grad.contiguous()

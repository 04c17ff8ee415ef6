"""The default implementation of every operation: PyTorch calls, analytic backward.

Memory of the attention statistics beyond inputs and outputs is one sample's scores (2 MB at
T = 708 in float32), or 1 MiB where several samples fit into that. Scores are centred on their
block's mean before squares are summed, so nothing cancels (raw sums of squares lose 1.6e-5 of the
variance at mean = 10 std in float32).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .reference import gaussian_kl, log, wide

_TILE_ELEMENTS = 2**18  # 1 MiB of float32


def _bounds(spans: list[int]) -> list[slice]:
    ends = [0]
    for count in spans:
        ends.append(ends[-1] + count)
    return [slice(a, b) for a, b in pairwise(ends)]


def _chunks(q: Tensor) -> list[slice]:
    """Slices of the batch whose scores fit into the tile, at least one sample each."""
    batch, tokens = q.shape[0], q.shape[2]
    step = max(1, _TILE_ELEMENTS // (tokens * tokens))
    return [slice(i, min(i + step, batch)) for i in range(0, batch, step)]


def _merged(x: Tensor) -> Tensor:
    """[b, H, T, d] -> [b, T, H d]; a view where the heads of a token lie together (packed qkv)."""
    return wide(x).transpose(1, 2).flatten(2)


def _split_into(out: Tensor, x: Tensor) -> None:
    """Writes [b, T, H d] into [b, H, T, d]."""
    out.copy_(x.unflatten(2, (out.shape[1], out.shape[3])).transpose(1, 2))


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=-2, keepdim=True)
    return x - mean, mean


# --------------------------------------------------------------------------- score moments


def score_moments(
    q: Tensor, k: Tensor, spans: list[int], scale: float, per_head: bool
) -> tuple[Tensor, Tensor]:
    batch, heads = q.shape[:2]
    m, dtype = len(spans), wide(q[:0]).dtype
    shape = (batch, heads, m, m) if per_head else (batch, m, m)
    mean = torch.empty(shape, dtype=dtype, device=q.device)
    std = torch.empty_like(mean)
    moments = _moments_per_head if per_head else _moments_head_mean
    c = scale if per_head else scale / heads
    for part in _chunks(q):
        moments(q[part], k[part], spans, c, mean[part], std[part])
    return mean, std


def _moments_head_mean(
    q: Tensor, k: Tensor, spans: list[int], c: float, mean: Tensor, std: Tensor
) -> None:
    """Tiles: at T = 708 < H d = 768 cheaper than Gram matrices (0.77 against 1.67 GFLOP)."""
    bounds = _bounds(spans)
    q, k = _merged(q), _merged(k)  # [b, T, D]
    for i, rows in enumerate(bounds):
        for j, columns in enumerate(bounds):
            block = (q[:, rows] @ k[:, columns].transpose(1, 2)).flatten(1)  # [b, N], scores / c
            block_mean = block.mean(dim=1)
            block -= block_mean.unsqueeze(1)
            variance = block.square_().sum(dim=1) / (block.shape[1] - 1)
            mean[:, i, j] = c * block_mean
            std[:, i, j] = abs(c) * variance.sqrt()


def _covariances(x: Tensor, bounds: list[slice]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per span: centred tokens [b, H, n, d], mean [b, H, 1, d], covariance [b, H, d, d]."""
    found = []
    for part in bounds:
        centred, centre = _centre(wide(x[:, :, part]))
        found.append((centred, centre, centred.transpose(-2, -1) @ centred / centred.shape[-2]))
    return found


def _moments_per_head(
    q: Tensor, k: Tensor, spans: list[int], c: float, mean: Tensor, std: Tensor
) -> None:
    """Gram matrices: at d = 64 six times fewer operations than tiles.

    var = c^2 (q' C_K q + k' C_Q k + <C_Q, C_K>) with mean tokens q, k and population covariances;
    no term is negative.
    """
    bounds = _bounds(spans)
    keys = _covariances(k, bounds)
    for i, (_, q_mean, q_cov) in enumerate(_covariances(q, bounds)):
        for j, (_, k_mean, k_cov) in enumerate(keys):
            count = spans[i] * spans[j]
            variance = (
                (q_mean @ k_cov @ q_mean.transpose(-2, -1))[..., 0, 0]
                + (k_mean @ q_cov @ k_mean.transpose(-2, -1))[..., 0, 0]
                + (q_cov * k_cov).sum((-2, -1))
            )
            mean[:, :, i, j] = c * (q_mean * k_mean).sum(-1)[..., 0]
            std[:, :, i, j] = abs(c) * (variance.clamp_min(0) * (count / (count - 1))).sqrt()


def score_moments_backward(
    grad_mean: Tensor,
    grad_std: Tensor,
    q: Tensor,
    k: Tensor,
    std: Tensor,
    spans: list[int],
    scale: float,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    return _moments_backward(grad_mean, grad_std, q, k, std, spans, scale, per_head, True)


def _moments_backward(
    grad_mean: Tensor,
    grad_std: Tensor,
    q: Tensor,
    k: Tensor,
    std: Tensor,
    spans: list[int],
    scale: float,
    per_head: bool,
    self_blocks: bool,
) -> tuple[Tensor, Tensor]:
    """dL/dS_ij = alpha + beta (S_ij - mean) in each block of N scores, alpha = g_mean / N and
    beta = g_std / ((N - 1) std); then dq = dL/dS k and dk = dL/dS' q, tile by tile."""
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    # a constant block has std 0 and no direction: gradient 0, as torch.std has it
    slope = torch.where(std > 0, grad_std / std, 0)
    backward = _backward_per_head if per_head else _backward_head_mean
    c = scale if per_head else scale / q.shape[1]
    for part in _chunks(q):
        backward(
            q[part], k[part], spans, c, grad_mean[part], slope[part], self_blocks,
            grad_q[part], grad_k[part],
        )  # fmt: skip
    return grad_q, grad_k


def _coefficients(
    grad_mean: Tensor, slope: Tensor, spans: list[int], c: float, i: int, j: int
) -> tuple[Tensor, Tensor]:
    """c alpha and c^2 beta of block (i, j), to be broadcast over its two token axes."""
    count = spans[i] * spans[j]
    alpha = grad_mean[..., i, j] * (c / count)
    beta = slope[..., i, j] * (c * c / (count - 1))
    return alpha[..., None, None], beta[..., None, None]


def _backward_head_mean(
    q: Tensor,
    k: Tensor,
    spans: list[int],
    c: float,
    grad_mean: Tensor,
    slope: Tensor,
    self_blocks: bool,
    grad_q: Tensor,
    grad_k: Tensor,
) -> None:
    bounds = _bounds(spans)
    q, k = _merged(q), _merged(k)  # [b, T, D]
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    for i, rows in enumerate(bounds):
        for j, columns in enumerate(bounds):
            if i == j and not self_blocks:
                continue
            grad = q[:, rows] @ k[:, columns].transpose(1, 2)  # scores / c
            grad -= grad.mean((1, 2), keepdim=True)
            alpha, beta = _coefficients(grad_mean, slope, spans, c, i, j)
            grad.mul_(beta).add_(alpha)
            dq[:, rows] += grad @ k[:, columns]
            dk[:, columns] += grad.transpose(1, 2) @ q[:, rows]
    _split_into(grad_q, dq)
    _split_into(grad_k, dk)


def _backward_per_head(
    q: Tensor,
    k: Tensor,
    spans: list[int],
    c: float,
    grad_mean: Tensor,
    slope: Tensor,
    self_blocks: bool,
    grad_q: Tensor,
    grad_k: Tensor,
) -> None:
    """dq_i = c n_j [alpha k + beta c (C_K q_i + ((q_i - q).k) k)], k and q the mean tokens; the
    product K'K q_i - n (q.k) k, equal on paper, cancels."""
    bounds = _bounds(spans)
    queries, keys = _covariances(q, bounds), _covariances(k, bounds)

    def side(own: list, other: list, a: int, transpose: bool) -> Tensor:
        centred, centre, _ = own[a]  # [b, H, n, d]
        constant, matrix = 0, 0
        for o in range(len(spans)):
            if a == o and not self_blocks:
                continue
            block = (o, a) if transpose else (a, o)
            alpha, beta = _coefficients(grad_mean, slope, spans, c, *block)
            _, mean, cov = other[o]
            # C q_i = C (q_i - q) + C q: the centred part is a product, the rest a constant row
            constant = constant + spans[o] * (alpha * mean + beta * (centre @ cov))
            matrix = matrix + spans[o] * beta * (cov + mean.transpose(-2, -1) @ mean)
        if isinstance(matrix, int):
            return torch.zeros_like(centred)
        return centred @ matrix + constant

    for a, rows in enumerate(bounds):
        grad_q[:, :, rows] = side(queries, keys, a, False).to(grad_q.dtype)
        grad_k[:, :, rows] = side(keys, queries, a, True).to(grad_k.dtype)


# --------------------------------------------------------------------------- attention bootstrap


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
    return _moments_backward(grad_mean, grad_std, q, k, std, spans, scale, per_head, False)


# --------------------------------------------------------------------------- heads on logits


def entropy(logits: Tensor) -> Tensor:
    log_p = wide(logits).log_softmax(dim=-1)
    p = log_p.exp()
    return -torch.where(p == 0, 0, p * log_p).sum(dim=-1)


def entropy_backward(grad: Tensor, logits: Tensor) -> Tensor:
    log_p = wide(logits).log_softmax(dim=-1)
    p = log_p.exp()
    plogp = torch.where(p == 0, 0, p * log_p)
    total = plogp.sum(dim=-1, keepdim=True)  # -entropy
    return (-grad.unsqueeze(-1) * (plogp - p * total)).to(logits.dtype)


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
    return (grad.unsqueeze(-1) * _principal_grad(*parts, eps)).to(logits.dtype)


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
    return _balance(p, softmax_sum, None if weight is None else weight.to(p.dtype))


def adaptation_head(
    logits: Tensor, k: int, softmax_sum: bool, eps: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean principal entropy, balance entropy, and the gradients [n, C] of both: the softmax and
    the selection are shared, so value and gradient together cost little more than the value."""
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
    return principal, balance, rows, columns

"""Attention statistics in PyTorch's calls, forward and backward, without a T x T map of the batch.

The default implementation of ``score_moments`` and ``attention_bootstrap``. Memory beyond inputs
and outputs is one sample's scores (2 MB at T = 708 in float32), or 1 MiB where several samples fit
into that; per head also the batch's d x d covariances, or, where the C++ kernel of a head's moments
serves, a thread's q and k of one head. Scores are centred before squares are summed, so nothing
cancels (raw sums of squares lose 1.6e-5 of the variance at mean = 10 std in float32). On a CPU C++
does that, which goes over memory once, or twice for gradients, where PyTorch's calls do four times.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, permutations

import torch
from torch import Tensor

from . import native
from .registry import define, ops, result_like

_TILE_ELEMENTS = 2**18  # 1 MiB of float32
_WIDEST = 256  # channels of a head in C++: covariances that stay in the cache


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
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.detach().to(wide).transpose(1, 2).flatten(2)


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _target(grad: Tensor, like: Tensor) -> Tensor:
    """Where to write [b, T, H d]: into grad [b, H, T, d] where type and layout allow."""
    merged = grad.transpose(1, 2).flatten(2)
    direct = grad.dtype == like.dtype and _shares(merged, grad)
    return merged if direct else torch.empty_like(like, memory_format=torch.contiguous_format)


def _split_into(out: Tensor, x: Tensor) -> None:
    """Writes [b, T, H d] into [b, H, T, d]."""
    out.copy_(x.unflatten(2, (out.shape[1], out.shape[3])).transpose(1, 2))


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=-2, keepdim=True)
    return x - mean, mean


def no_cpp(*tensors: Tensor) -> str | None:
    """Says why the C++ kernel of each head's moments is not made for these [B, H, T, d]; None: it
    is, and it is there."""
    if any(x.device.type != "cpu" for x in tensors):
        return "it needs tensors on the CPU"
    if any(x.stride(3) != 1 for x in tensors):
        return "it needs a token's channels next to each other"
    if not 0 < tensors[0].shape[3] <= _WIDEST:
        return f"it needs 1 to {_WIDEST} channels a head, found {tensors[0].shape[3]}"
    if native.loaded or native.load():
        return None
    return f"the C++ kernels are not there: {native.attempt().reason}"


def score_moments(
    q: Tensor, k: Tensor, spans: list[int], scale: float, per_head: bool
) -> tuple[Tensor, Tensor]:
    """``score_moments_reference`` of q and k [B, H, T, d], without its memory."""
    if per_head and not no_cpp(q, k):
        return ops.head_moments(q, k, spans, scale)
    batch, heads = q.shape[:2]
    m, dtype = len(spans), torch.promote_types(q.dtype, torch.float32)
    shape = (batch, heads, m, m) if per_head else (batch, m, m)
    mean = torch.empty(shape, dtype=dtype, device=q.device)
    std = torch.empty_like(mean)
    if per_head:
        _moments_per_head(q, k, spans, scale, mean, std)
    else:
        for part in _chunks(q):
            mean[part], std[part] = _moments_head_mean(q[part], k[part], spans, scale / heads)
    return mean, std


def _blocks(
    scores: Tensor, rows: list[int], columns: list[int]
) -> Iterator[tuple[int, int, Tensor]]:
    """(i, j, block) of scores [b, R, C] in spans."""
    for i, some in enumerate(_bounds(rows)):
        for j, part in enumerate(_bounds(columns)):
            yield i, j, scores[:, some, part]


def _block_moments(
    scores: Tensor, rows: list[int], columns: list[int], c: float
) -> tuple[Tensor, Tensor]:
    """Mean and std [b, M, N] of c times the blocks of scores [b, R, C], which are written over."""
    if scores.device.type == "cpu" and (native.loaded or native.load()):
        return ops.block_moments(scores, rows, columns, c)
    mean = scores.new_empty(scores.shape[0], len(rows), len(columns))
    std = torch.empty_like(mean)
    for i, j, block in _blocks(scores, rows, columns):
        block_mean = block.mean((1, 2), keepdim=True)
        block -= block_mean
        variance = block.square_().sum((1, 2)) / (rows[i] * columns[j] - 1)
        mean[:, i, j] = c * block_mean[:, 0, 0]
        std[:, i, j] = abs(c) * variance.sqrt()
    return mean, std


def _block_gradients(
    grad_mean: Tensor, slope: Tensor, rows: list[int], columns: list[int], c: float, scores: Tensor
) -> None:
    """Writes the gradient of scores [b, R, C] over them, from those of their blocks' moments."""
    if scores.device.type == "cpu" and (native.loaded or native.load()):
        ops.block_moments_backward(grad_mean, slope, rows, columns, c, scores)
        return
    for i, j, block in _blocks(scores, rows, columns):
        alpha, beta = _coefficients(grad_mean, slope, rows[i] * columns[j], c, i, j)
        block -= block.mean((1, 2), keepdim=True)
        block.mul_(beta).add_(alpha)


def _moments_head_mean(q: Tensor, k: Tensor, spans: list[int], c: float) -> tuple[Tensor, Tensor]:
    """Scores: at T = 708 < H d = 768 cheaper than Gram matrices (0.77 against 1.67 GFLOP). All
    blocks in one product: 15 % faster than one each (two threads, Xeon 2.5 GHz)."""
    scores = _merged(q) @ _merged(k).transpose(1, 2)  # [b, T, T], / c
    return _block_moments(scores, spans, spans, c)


def _covariances(x: Tensor, bounds: list[slice]) -> list[tuple[Tensor, Tensor]]:
    """Per span: mean token [B, H, 1, d] and population covariance [B, H, d, d]."""
    batch, heads, _, d = x.shape
    moments = []
    dtype = torch.promote_types(x.dtype, torch.float32)
    for part in bounds:
        tokens = x[:, :, part].detach()
        centre = torch.empty(batch, heads, 1, d, dtype=dtype, device=x.device)
        covariance = centre.new_empty(batch, heads, d, d)
        for some in _chunks(x):
            centred, centre[some] = _centre(tokens[some].to(dtype))
            covariance[some] = centred.transpose(-2, -1) @ centred
        moments.append((centre, covariance.div_(tokens.shape[2])))
    return moments


def token_covariances(x: Tensor, spans: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Of x [B, H, T, d], per span: mean token [B, H, 1, d], population covariance [B, H, d, d]."""
    return _covariances(x, _bounds(spans))


def _moments_per_head(
    q: Tensor, k: Tensor, spans: list[int], c: float, mean: Tensor, std: Tensor
) -> None:
    """Gram matrices: at d = 64 six times fewer operations than tiles.

    var = c^2 (q' C_K q + k' C_Q k + <C_Q, C_K>) with mean tokens q, k and population covariances;
    no term is negative.
    """
    bounds = _bounds(spans)
    keys = _covariances(k, bounds)
    for i, (q_mean, q_cov) in enumerate(_covariances(q, bounds)):
        for j, (k_mean, k_cov) in enumerate(keys):
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
    """Gradients on q and k [B, H, T, d], from those of all blocks' moments."""
    return moments_backward(grad_mean, grad_std, q, k, std, spans, scale, per_head, True)


def moments_backward(
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
    """Gradients on q and k, from those of the moments, of cross blocks alone if not self_blocks.

    dL/dS_ij = alpha + beta (S_ij - mean) in each block of N scores, alpha = g_mean / N and
    beta = g_std / ((N - 1) std); then dq = dL/dS k and dk = dL/dS' q, tile by tile.
    """
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    # a constant block has std 0 and no direction: gradient 0, as torch.std has it
    slope = torch.where(std > 0, grad_std / std, 0)
    if per_head and not no_cpp(q, k, grad_q, grad_k):
        ops.head_moments_backward(grad_mean, slope, q, k, spans, scale, self_blocks, grad_q, grad_k)
    elif per_head:
        _backward_per_head(q, k, spans, scale, grad_mean, slope, self_blocks, grad_q, grad_k)
    else:
        for part in _chunks(q):
            _backward_head_mean(
                q[part], k[part], spans, scale / q.shape[1], grad_mean[part], slope[part],
                self_blocks, grad_q[part], grad_k[part],
            )  # fmt: skip
    return grad_q, grad_k


def _coefficients(
    grad_mean: Tensor, slope: Tensor, count: int, c: float, i: int, j: int
) -> tuple[Tensor, Tensor]:
    """c alpha and c^2 beta of the scores of block (i, j), to be broadcast over its token axes."""
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
    bounds, m = _bounds(spans), len(spans)
    if self_blocks:
        tiles = [(slice(0, m), slice(0, m))]  # of spans
    else:
        tiles = [(slice(i, i + 1), slice(j, j + 1)) for i, j in permutations(range(m), 2)]
    q, k = _merged(q), _merged(k)  # [b, T, D]
    dq, dk = _target(grad_q, q), _target(grad_k, k)
    begun = set()

    def add(side: str, i: int, out: Tensor, a: Tensor, b: Tensor) -> None:
        if (side, i) in begun:
            out.baddbmm_(a, b)
        else:
            torch.bmm(a, b, out=out)
            begun.add((side, i))

    for i, j in tiles:
        rows = slice(bounds[i][0].start, bounds[i][-1].stop)
        columns = slice(bounds[j][0].start, bounds[j][-1].stop)
        scores = q[:, rows] @ k[:, columns].transpose(1, 2)  # / c
        _block_gradients(grad_mean[:, i, j], slope[:, i, j], spans[i], spans[j], c, scores)
        add("q", i.start, dq[:, rows], scores, k[:, columns])
        add("k", j.start, dk[:, columns], scores.transpose(1, 2), q[:, rows])
        del scores  # before the next are made
    for out, merged in ((grad_q, dq), (grad_k, dk)):
        if not begun:  # one modality alone has no cross block
            merged.zero_()
        if not _shares(merged, out):
            _split_into(out, merged)


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

    def write(grad: Tensor, x: Tensor, of_x: list, other: list, a: int, transpose: bool) -> None:
        centre, _ = of_x[a]
        constant, matrix = 0, 0  # [B, H, 1, d], [B, H, d, d]
        for o in range(len(spans)):
            if a == o and not self_blocks:
                continue
            block = (o, a) if transpose else (a, o)
            alpha, beta = _coefficients(grad_mean, slope, spans[a] * spans[o], c, *block)
            mean, cov = other[o]
            # C q_i = C (q_i - q) + C q: the centred part is a product, the rest a constant row
            constant = constant + spans[o] * (alpha * mean + beta * (centre @ cov))
            matrix = matrix + spans[o] * beta * (cov + mean.transpose(-2, -1) @ mean)
        for some in _chunks(x):
            out = grad[some][:, :, bounds[a]]
            if isinstance(matrix, int):
                out.zero_()
                continue
            tokens = x[some][:, :, bounds[a]].detach()
            centred = tokens.to(centre.dtype) - centre[some]
            torch.add(centred @ matrix[some], constant[some], out=out)

    for a in range(len(spans)):
        write(grad_q, q, queries, keys, a, False)
        write(grad_k, k, keys, queries, a, True)


def _fake_block_moments(scores, rows, columns, scale):
    shape = (scores.shape[0], len(rows), len(columns))
    return result_like(scores, shape), result_like(scores, shape)


def _fake_head_moments(q, k, spans, scale):
    shape = (*q.shape[:2], len(spans), len(spans))
    return result_like(q, shape), result_like(q, shape)


define(
    "head_moments(Tensor q, Tensor k, int[] spans, float scale) -> (Tensor mean, Tensor std)",
    _fake_head_moments,
    cpp=True,
)
define(
    "head_moments_backward(Tensor grad_mean, Tensor slope, Tensor q, Tensor k, int[] spans,"
    " float scale, bool self_blocks, Tensor(a!) grad_q, Tensor(b!) grad_k) -> ()",
    lambda *_: None,
    cpp=True,
)
define(
    "block_moments(Tensor scores, int[] rows, int[] columns, float scale)"
    " -> (Tensor mean, Tensor std)",
    _fake_block_moments,
    cpp=True,
)
define(
    "block_moments_backward(Tensor grad_mean, Tensor slope, int[] rows, int[] columns,"
    " float scale, Tensor(a!) scores) -> ()",
    lambda *_: None,
    cpp=True,
)

"""The attention bootstrapping loss and its gradients, on the kernels of score moments.

The launches that finish the moments compute the loss too, and those of the gradients begin at the
loss: what is of the loss alone lies in score_blocks.py.

Source: ABPEM, attention bootstrapping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import score_moments, score_moments_per_head


def attention_bootstrap(
    q: Tensor, k: Tensor, spans: list[int], scale: float, per_head: bool, pair_query: bool,
    anchor_mean: Tensor | None = None, anchor_std: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss [B], and mean and std [B, M, M], or [B, H, M, M] per head, of q, k [B, H, T, d].

    Anchors [M], or [H, M] per head, replace the moments of the self blocks. Per head: tokens are
    ``token_moments`` of q and k, if they are there already.
    """
    shape = q.shape[: 2 if per_head else 1]
    loss = torch.empty(shape, dtype=torch.float32, device=q.device)
    options = q, k, spans, scale, loss, pair_query, anchor_mean, anchor_std
    if per_head:
        moments = score_moments_per_head.moments_and_loss(*options, tokens)
        return loss.mean(dim=1), *moments
    return loss, *score_moments.moments_and_loss(*options)


def attention_bootstrap_backward(
    grad: Tensor, q: Tensor, k: Tensor, mean: Tensor, std: Tensor, spans: list[int],
    scale: float, per_head: bool, pair_query: bool, anchor_mean: Tensor | None = None,
    anchor_std: Tensor | None = None, tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, dk [B, H, T, d] of the cross blocks, from the gradient [B] of the loss; tokens as in
    ``attention_bootstrap``.

    The workspace of the head mean, 20 % of a float32 map's bytes at bf16, is freed on return.
    """
    options = q, k, mean, std, spans, scale, grad, None, None, pair_query, anchor_mean, anchor_std
    if per_head:
        return score_moments_per_head.gradients(*options, tokens)
    return score_moments.gradients(*options)

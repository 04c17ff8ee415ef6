"""CLIP's vision transformer, the blocks of both towers, and A-TPT's attention maps.

The maps say which patches decide the predicted class. All views go through one batched pass, with
gradients of the last two blocks only. Shapes: N views, T = 1 + G*G tokens (the class token first),
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.layers import ResidualAttentionBlock, embed_patches, may_fuse, normed
from ..blocks.residual import added, advances

EPS = 1e-8
ROLLOUTS = ("code", "paper", "gar")


class Transformer(nn.Module):
    """The blocks of a tower, ``resblocks``."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(dim, heads, hidden, activation) for _ in range(depth)
        )

    @property
    def blocks(self) -> list[ResidualAttentionBlock]:
        """``resblocks``, with their type."""
        return cast("list[ResidualAttentionBlock]", list(self.resblocks))


def advance(blocks: Sequence[ResidualAttentionBlock], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Runs the blocks on tokens [N, T, D]; a block that is not ours, or has hooks, is called.

    Returns:
        The residual stream and what is still to be added to it, [N, T, D] each; None: nothing.
    """
    branch = None
    for block in blocks:
        if may_fuse(x, block) and advances(block):
            x, branch = block.advance(x, branch)
        else:
            x, branch = block(x if branch is None else x + branch), None
    return x, branch


class PatchConv(nn.Conv2d):
    """Non-overlapping patches as one matrix product, in ``compute_dtype``."""

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, G*G, D], row by row."""
        return embed_patches(x, self, self.compute_dtype)


class VisionTransformer(nn.Module):
    """Patches, class token, blocks; the image's feature is read off the class token.

    Args:
        resolution: R, pixels a side.
        patch: pixels of a patch a side.
        embed_dim: E, of the joint space.
    """

    def __init__(
        self,
        resolution: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        embed_dim: int,
        activation: str = "quick_gelu",
        patch_bias: bool = False,
    ) -> None:
        super().__init__()
        self.resolution, self.grid = resolution, resolution // patch
        self.conv1 = PatchConv(3, dim, patch, patch, bias=patch_bias)
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.positional_embedding = nn.Parameter(torch.zeros(self.grid**2 + 1, dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = Transformer(dim, depth, heads, hidden, activation)
        self.proj = nn.Parameter(torch.zeros(dim, embed_dim))

    def embed(self, x: Tensor) -> Tensor:
        """Normalised pixels [N, 3, R, R] -> tokens [N, T, D] that enter the first block."""
        x = self.conv1(x).to(self.positional_embedding.dtype)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat((first, x), 1) + self.positional_embedding)

    def finish(self, cls: Tensor, branch: Tensor | None = None) -> Tensor:
        """Class tokens [N, D] after the last block, and what is still to be added to them (None:
        nothing) -> features [N, E], not normalised."""
        return normed(self.ln_post, None, cls, branch)[1] @ self.proj

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels [N, 3, R, R] -> features [N, E], not normalised."""
        *blocks, last = self.transformer.blocks
        # of the last block only the class token is read: 7 % of a ViT-B/16's forward
        x, n = last.before_attention(*advance(blocks, self.embed(x)))
        (q,), (k, v) = last.attn.project(n[:, :1], "q"), last.attn.project(n, "kv")
        q, k, v = map(last.attn.split, (q, k, v))
        out = last.attn.combine(F.scaled_dot_product_attention(q, k, v, scale=last.attn.scale))
        return self.finish(*(y[:, 0] for y in last.after_attention(x[:, :1], out)))

    def attention_maps(self, x: Tensor, text: Tensor, scale: Tensor, rollout: str) -> AttentionMaps:
        """Maps of normalised pixels [N, 3, R, R], from the last two blocks (all of them: "gar").

        Args:
            text: [C, E], or one list of classes a view [N, C, E]; normalised.
            scale: factor of the cosines, 0-d.
            rollout: one of ``ROLLOUTS``.
        """
        if rollout == "gar":
            return _gradient_rollout(self, x, text, scale)
        return _refined(self, x, text, scale, rollout)


@dataclass
class AttentionMaps:
    """Attention of N views to their own top class.

    Attributes:
        rows: [N, G*G], raw: neither clipped nor scaled.
        features: [N, E] of the views, not normalised.
        logits: [N, C].
        inner_prev, inner_last: [N, T] inner products that the token weights of the last two blocks
            are made of; None without them.
        grid: [N, G, G], rows cut at their 0.99-quantile ("code", Grad-CAM) and scaled to [0, 1).
    """

    rows: Tensor
    features: Tensor
    logits: Tensor
    inner_prev: Tensor | None = None
    inner_last: Tensor | None = None
    grid: Tensor | None = None

    @property
    def w_prev(self) -> Tensor | None:
        """Token weights [N, T] of the last block but one, sum 1 (or 0)."""
        return None if self.inner_prev is None else token_weights(self.inner_prev)

    @property
    def w_last(self) -> Tensor | None:
        """Token weights [N, T] of the last block, sum 1 (or 0)."""
        return None if self.inner_last is None else token_weights(self.inner_last)

    @classmethod
    def cat(cls, parts: list[AttentionMaps]) -> AttentionMaps:
        """The maps of several pieces of the views as one."""

        def joined(name: str) -> Any:
            column = [getattr(part, name) for part in parts]
            return None if column[0] is None else torch.cat(column)

        return cls(**{f.name: joined(f.name) for f in fields(cls)})


def top_score(features: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the views' top logits, the classes chosen without gradient; and the logits [N, C].

    Args:
        features: [N, E], not normalised.
        text: [C, E], or one list of classes a view [N, C, E]; normalised.
    """
    unit = features / features.norm(dim=-1, keepdim=True)
    logits = scale * torch.einsum("ne,nce->nc" if text.ndim == 3 else "ne,ce->nc", unit, text)
    return logits.amax(-1).sum(), logits


def _attend(block: ResidualAttentionBlock, n: Tensor) -> tuple[Tensor, Tensor]:
    """ln_1's output [N, T, D] -> attention output [N, T, D] and probabilities [N, H, T, T]."""
    q, k, v = map(block.attn.split, block.attn.project(n))
    p = (q @ k.transpose(-1, -2) * block.attn.scale).softmax(-1)
    return block.attn.combine(p @ v), p


def _refined(
    visual: VisionTransformer, x: Tensor, text: Tensor, scale: Tensor, rollout: str
) -> AttentionMaps:
    *early, previous, last = visual.transformer.blocks
    with torch.no_grad():
        x = visual.embed(x)
        x, n_prev = previous.before_attention(*advance(early, x))
    with torch.enable_grad():
        n_prev = n_prev.detach().requires_grad_()
        out, p_prev = _attend(previous, n_prev)
        middle = x + out  # by itself: the gradient at it is asked for
        x_last = torch.add(*previous.after_attention(middle))
        mean_prev = p_prev.detach().mean(1)
        del p_prev

        # the last block as a function of its normalised tokens and of the class token itself
        tokens = x_last.detach()
        n_last = last.before_attention(tokens)[1].detach().requires_grad_()
        cls = tokens[:, :1].clone().requires_grad_()
        k, v = last.attn.project(n_last, "kv")
        q, k, v = map(last.attn.split, (*last.attn.project(n_last[:, :1], "q"), k, v))
        p = (q @ k.transpose(-1, -2) * last.attn.scale).softmax(-1)
        after = last.after_attention(cls, last.attn.combine(p @ v))
        features = visual.finish(*(y[:, 0] for y in after))
        score, logits = top_score(features, text, scale)
        g_n, g_cls = torch.autograd.grad(score, (n_last, cls))
    with torch.no_grad():
        q_all = last.attn.split(last.attn.project(n_last, "q")[0])
        mean_last = (q_all @ k.transpose(-1, -2) * last.attn.scale).softmax(-1).mean(1)
        norm = last.ln_1
        inner_last = layernorm_inner(tokens, norm.eps, norm.weight, g_n)
        inner_last[:, 0] += (tokens[:, 0] * g_cls[:, 0]).sum(-1)
        g_tokens = layernorm_backward(tokens, norm.eps, norm.weight, g_n)
        g_tokens[:, 0] += g_cls[:, 0]
    g_middle, g_prev = torch.autograd.grad(x_last, (middle, n_prev), g_tokens)
    with torch.no_grad():
        norm = previous.ln_1
        # through the residual, and what LayerNorm's epsilon lets through of the attention path
        inner_prev = (x * g_middle).sum(-1)
        inner_prev += layernorm_inner(x, norm.eps, norm.weight, g_prev)
        master = x.dtype
        mean_prev, mean_last = mean_prev.to(master), mean_last.to(master)
        formula, eps = (rollout_code, EPS) if rollout == "code" else (rollout_paper, 0.0)
        rows = formula(
            mean_prev, mean_last, token_weights(inner_prev, eps), token_weights(inner_last, eps)
        )
        return AttentionMaps(rows, features.detach(), logits.detach(), inner_prev, inner_last)


def _gradient_rollout(
    visual: VisionTransformer, x: Tensor, text: Tensor, scale: Tensor
) -> AttentionMaps:
    with torch.enable_grad():
        x, waiting, probabilities = visual.embed(x).detach().requires_grad_(), None, []
        for block in visual.transformer.blocks:
            x, n = block.before_attention(x, waiting)
            out, p = _attend(block, n)
            probabilities.append(p)
            x, waiting = block.after_attention(x, out)
        features = visual.finish(added(x[:, 0], None if waiting is None else waiting[:, 0]))
        score, logits = top_score(features, text, scale)
        gradients = torch.autograd.grad(score, probabilities)
    with torch.no_grad():
        rows = rollout_gradients([p.detach() for p in probabilities], list(gradients))
    return AttentionMaps(rows.to(features.dtype), features.detach(), logits.detach())


def token_weights(inner: Tensor, eps: float = 0.0) -> Tensor:
    """Inner products <token, gradient> [N, T] -> their positive parts with sum 1 (or 0).

    Args:
        eps: added to the sum; the official code has 1e-8, the paper none.
    """
    inner = inner.clamp_min(0)
    total = inner.sum(-1, keepdim=True) + eps
    return inner / (total if eps else total.masked_fill(total == 0, 1))


def layernorm_inner(x: Tensor, norm_eps: float, weight: Tensor, grad: Tensor) -> Tensor:
    """<x, dS/dx> [N, T] where S sees x only through a LayerNorm, from the gradient at its output.

    With h = weight * grad and xh = (x - mean) / sigma it is eps / sigma² <xh, h>: the scale of x
    cannot matter but for the LayerNorm's epsilon. Computed as <x, dS/dx> by autograd in float32
    the two terms cancel to rounding noise (9 to 29 % off on a ViT-B/16; 3e-6 here).

    Args:
        x: [N, T, D] input of the LayerNorm.
        weight: [D] of the LayerNorm.
        grad: [N, T, D] dS / d(output).
    """
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1) + norm_eps
    return norm_eps * (centred * (weight * grad)).sum(-1) / variance**1.5


def layernorm_backward(x: Tensor, norm_eps: float, weight: Tensor, grad: Tensor) -> Tensor:
    """dS/dx [N, T, D] from dS / d(LayerNorm output)."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    xh, h = centred * rstd, weight * grad
    return rstd * (h - h.mean(-1, keepdim=True) - xh * (h * xh).mean(-1, keepdim=True))


def rollout_code(prev: Tensor, last: Tensor, w_prev: Tensor, w_last: Tensor) -> Tensor:
    """The official code's refined attention: class-token row [N, T-1] over the patches.

    Args:
        prev, last: [N, T, T] head-mean attention of the last two blocks.
        w_prev, w_last: [N, T] token weights (``token_weights(..., eps=1e-8)``).

    Each layer: columns scaled by the weights, plus identity, rows normalised; then the average
    (1/2, 1) / 3/2, rows normalised, and once more the last layer in front.
    """
    prev, last = (
        _rows_to_one(_plus_identity(a * w[:, None])) for a, w in ((prev, w_prev), (last, w_last))
    )
    mean = _rows_to_one((0.5 * prev + last) / (1.5 + EPS))
    return (last[:, :1] @ mean)[:, 0, 1:]


def rollout_paper(prev: Tensor, last: Tensor, w_prev: Tensor, w_last: Tensor) -> Tensor:
    """The paper's formula: no row normalisation, plain average of the two layers. As above."""
    prev, last = (_plus_identity(a * w[:, None]) for a, w in ((prev, w_prev), (last, w_last)))
    return (last[:, :1] @ ((prev + last) / 2))[:, 0, 1:]


def rollout_gradients(probabilities: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Plain gradient attention rollout over all layers: class-token row [N, T-1].

    Args:
        probabilities, gradients: [N, H, T, T] each, A and dS/dA, first block first.

    Product over the layers of I + mean over heads of (dS/dA * A)+ (Chefer et al., ICCV 2021).
    """
    *layers, last = zip(probabilities, gradients, strict=True)
    row = _positive(*last)[:, :1]
    for pair in reversed(layers):
        row = row @ _positive(*pair)
    return row[:, 0, 1:]


def _positive(a: Tensor, g: Tensor) -> Tensor:
    """I + mean over heads of (dS/dA * A)+, [N, T, T]."""
    return _plus_identity((a * g).clamp_min(0).mean(1))


def normalise_map(rows: Tensor, clip: float | None = None) -> Tensor:
    """Patch rows [N, P] cut at their ``clip``-quantile (linear interpolation), then min-max to
    [0, 1); an even map becomes 0."""
    if clip is not None:
        rows = torch.minimum(rows, torch.quantile(rows, clip, dim=1, keepdim=True))
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return (rows - low) / (high - low + EPS)


def _plus_identity(a: Tensor) -> Tensor:
    return a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _rows_to_one(a: Tensor) -> Tensor:
    return a / (a.sum(-1, keepdim=True) + EPS)

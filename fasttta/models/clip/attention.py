"""Which pixels decide the predicted class: one batched pass over all views, with gradients of the
last two blocks only (vision transformers), or Grad-CAM (ResNets)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .layers import Block
from .resnet import ModifiedResNet
from .rollout import (
    EPS,
    layernorm_backward,
    layernorm_inner,
    rollout_code,
    rollout_gradients,
    rollout_paper,
    token_weights,
)
from .vision import VisionTransformer


@dataclass
class AttentionMaps:
    """Attention of N views to their own top class.

    Attributes:
        rows: [N, G*G], raw: neither clipped nor scaled.
        features: [N, E] of the views, not normalised.
        logits: [N, C].
        w_prev, w_last: [N, T] token weights of the last two blocks, sum 1; None without them.
        grid: [N, G, G], rows cut at their 0.99-quantile ("code", Grad-CAM) and scaled to [0, 1).
    """

    rows: Tensor
    features: Tensor
    logits: Tensor
    w_prev: Tensor | None = None
    w_last: Tensor | None = None
    grid: Tensor | None = None

    @classmethod
    def cat(cls, parts: list[AttentionMaps]) -> AttentionMaps:
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


def attention_maps(
    visual: VisionTransformer | ModifiedResNet,
    x: Tensor,
    text: Tensor,
    scale: Tensor,
    rollout: str = "code",
) -> AttentionMaps:
    """Maps of normalised pixels x [N, 3, R, R]; ResNets have Grad-CAM whatever ``rollout`` is."""
    if isinstance(visual, ModifiedResNet):
        return _grad_cam(visual, x, text, scale)
    if rollout == "gar":
        return _gradient_rollout(visual, x, text, scale)
    return _refined(visual, x, text, scale, rollout)


def _attend(block: Block, n: Tensor) -> tuple[Tensor, Tensor]:
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
        for block in early:
            x = block(x)
        n_prev = previous.ln_1(x)
    with torch.enable_grad():
        n_prev = n_prev.detach().requires_grad_()
        out, p_prev = _attend(previous, n_prev)
        middle = x + out
        x_last = middle + previous.mlp(previous.ln_2(middle))
        mean_prev = p_prev.detach().mean(1)
        del p_prev

        # the last block as a function of its normalised tokens and of the class token itself
        tokens = x_last.detach()
        n_last = last.ln_1(tokens).detach().requires_grad_()
        cls = tokens[:, :1].clone().requires_grad_()
        k, v = last.attn.project(n_last, "kv")
        q, k, v = map(last.attn.split, (*last.attn.project(n_last[:, :1], "q"), k, v))
        p = (q @ k.transpose(-1, -2) * last.attn.scale).softmax(-1)
        after = cls + last.attn.combine(p @ v)
        features = visual.finish((after + last.mlp(last.ln_2(after)))[:, 0])
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
        return AttentionMaps(
            rows, features.detach(), logits.detach(),
            token_weights(inner_prev), token_weights(inner_last),
        )  # fmt: skip


def _gradient_rollout(
    visual: VisionTransformer, x: Tensor, text: Tensor, scale: Tensor
) -> AttentionMaps:
    with torch.enable_grad():
        x, probabilities = visual.embed(x).detach().requires_grad_(), []
        for block in visual.transformer.blocks:
            out, p = _attend(block, block.ln_1(x))
            probabilities.append(p)
            x = x + out
            x = x + block.mlp(block.ln_2(x))
        features = visual.finish(x[:, 0])
        score, logits = top_score(features, text, scale)
        gradients = torch.autograd.grad(score, probabilities)
    with torch.no_grad():
        rows = rollout_gradients([p.detach() for p in probabilities], list(gradients))
    return AttentionMaps(rows.to(features.dtype), features.detach(), logits.detach())


def _grad_cam(visual: ModifiedResNet, x: Tensor, text: Tensor, scale: Tensor) -> AttentionMaps:
    """relu(sum over channels of weight * map), weight = spatial mean of dS / d(map)."""
    with torch.no_grad():
        maps = visual.features(x)
    with torch.enable_grad():
        maps = maps.detach().requires_grad_()
        features = visual.attnpool(maps)
        score, logits = top_score(features, text, scale)
        (gradient,) = torch.autograd.grad(score, maps)
    with torch.no_grad():
        weight = gradient.mean((2, 3), keepdim=True)
        rows = (weight * maps).sum(1).clamp_min(0).flatten(1)
    return AttentionMaps(rows, features.detach(), logits.detach())

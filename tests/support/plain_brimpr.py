"""BriMPR written out as published: prompts run through every block, nothing is shared.

And what its tests start from: statistics, token ids, prompts that matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

import fasttta
from fasttta.models import CAVMAE

LETTERS = {"audio": "a", "video": "v"}
TERMS = ("alignment", "recombination", "contrast")


def _attention(attn, x: Tensor) -> Tensor:
    b, t, dim = x.shape
    q, k, v = attn.qkv(x).reshape(b, t, 3, attn.heads, dim // attn.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(b, t, dim))


def _block(block, x: Tensor, suffix: str = "") -> Tensor:
    x = x + _attention(block.attn, getattr(block, f"norm1{suffix}")(x))
    return x + block.mlp(getattr(block, f"norm2{suffix}")(x))


def _encoder(model: CAVMAE, letter: str, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D] -> tokens, and features [B, blocks, D]; prompts are put before the tokens
    of each block and sliced off behind it."""
    blocks, features = getattr(model, f"blocks_{letter}"), []
    for i, block in enumerate(blocks):
        n = prompts.shape[1]
        x = _block(block, torch.cat((prompts[i].expand(len(x), -1, -1), x), dim=1))[:, n:]
        norm = blocks[i + 1].norm1 if i + 1 < len(blocks) else model.blocks_u[0].norm1
        features.append(norm(x).mean(dim=1))
    return x, torch.stack(features, dim=1)


def _fused(model: CAVMAE, x: Tensor, suffix: str = "") -> Tensor:
    for block in model.blocks_u:
        x = _block(block, x, suffix)
    return getattr(model, f"norm{suffix}")(x).mean(dim=1)


def _distance(features: Tensor, std: Tensor, mean: Tensor) -> Tensor:
    return (
        nnf.pairwise_distance(std, features.std(dim=0))
        + nnf.pairwise_distance(mean, features.mean(dim=0))
    ).mean()


def plain(model: CAVMAE, prompts, stats, inputs, keep, *, tau=0.07, a=0.2, b=5.0):
    """Losses by name (their total as ``"total"``) and the prediction [B, C].

    Args:
        prompts: [blocks, n, D] by modality; stats: SourceStats; inputs, keep: audio and video.
    """
    complete, masked, distance = {}, {}, {}
    for (name, letter), x, ids in zip(LETTERS.items(), inputs, keep, strict=True):
        embed = model.embed_audio if name == "audio" else model.embed_video
        tokens = embed(x)
        complete[name], features = _encoder(model, letter, tokens, prompts[name])
        kept = torch.stack([row[i.long()] for row, i in zip(tokens, ids, strict=True)])
        masked[name], _ = _encoder(model, letter, kept, prompts[name])
        distance[name] = _distance(features, *getattr(stats, name))
    joint = _fused(model, torch.cat(tuple(complete.values()), dim=1).detach())
    logits = model.mlp_head(joint)
    students = {
        "audio": torch.cat((masked["audio"], complete["video"]), dim=1),
        "video": torch.cat((complete["audio"], masked["video"]), dim=1),
    }
    moved = _distance(joint.unsqueeze(1), *stats.joint).detach()
    teacher = (logits.detach() / (1 + a / (1 + torch.exp(b - moved)))).softmax(dim=-1)
    both = (distance["audio"] + distance["video"]).detach()
    recombination = sum(
        (1 - distance[name].detach() / both)
        * nnf.cross_entropy(model.mlp_head(_fused(model, tokens)), teacher)
        for name, tokens in students.items()
    )
    alone = [
        nnf.normalize((_fused(model, x) + _fused(model, x, f"_{LETTERS[name]}")) / 2)
        for name, x in complete.items()
    ]
    scores, target = alone[0] @ alone[1].T / tau, torch.arange(len(joint))
    losses = {
        "alignment": distance["audio"] + distance["video"],
        "recombination": recombination,
        "contrast": (nnf.cross_entropy(scores, target) + nnf.cross_entropy(scores.T, target)) / 2,
    }
    return {**losses, "total": sum(losses.values())}, logits


def stats_for(depth, dim=12, seed=0, dtype=torch.float64):
    """Random source statistics of a model with so many blocks per encoder."""
    generator = torch.Generator().manual_seed(seed)

    def pair(n):
        mean = torch.randn(n, dim, generator=generator, dtype=dtype)
        return torch.rand(n, dim, generator=generator, dtype=dtype) + 0.1, mean

    return fasttta.SourceStats(audio=pair(depth[0]), video=pair(depth[1]), joint=pair(1))


def some_ids(batch, tokens, kept, seed=0):
    """Random ids [batch, kept] of the tokens that a mask keeps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, tokens, generator=generator).argsort(dim=1)[:, :kept]


def with_prompts(adapted, seed=3):
    """The adapted model with prompts that matter, and these."""
    generator = torch.Generator().manual_seed(seed)
    values = {n: torch.randn(x.shape, generator=generator) / 3 for n, x in adapted.tuned.items()}
    adapted.load_tuned(values)
    return {n.removeprefix("prompts."): x.requires_grad_() for n, x in adapted.tuned.items()}

"""A whole step of BriMPR against the official computation, written out here in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

import fasttta
from fasttta.models import CAVMAE

CUDA = torch.cuda.is_available()
BATCH = 64 if CUDA else 4
LETTERS = {"audio": "a", "video": "v"}


class OfficialStep:
    """BriMPR as its code computes it: four streams of prompts and tokens through all blocks, seven
    passes through the fusion block, attention materialised, autograd, torch.optim.Adam.

    The fusion block projects q, k and v apart when it sees all tokens; there the code also averages
    the attention map over samples and heads, which nothing reads. Prompts are put before the tokens
    of every block and sliced off behind it; a feature's LayerNorm is computed again by its block.
    Its host synchronisations and the two accuracies of the contrast term are left out.

    Args:
        precision: "bf16": forward under autocast.
    """

    def __init__(
        self,
        model: CAVMAE,
        prompts: dict[str, Tensor],
        stats: fasttta.SourceStats,
        precision: str = "fp32",
    ) -> None:
        self.precision = precision
        self.model, self.stats = copy.deepcopy(model).requires_grad_(False), stats
        self.prompts = {n: x.clone().requires_grad_(True) for n, x in prompts.items()}
        self.optimizer = torch.optim.Adam(list(self.prompts.values()), lr=1e-4)

    def _attention(self, attn, x: Tensor, whole: bool) -> Tensor:
        b, t, dim = x.shape
        if whole:
            rows = zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True)
            qkv = torch.cat([nnf.linear(x, weight, bias) for weight, bias in rows], dim=-1)
        else:
            qkv = attn.qkv(x)
        q, k, v = qkv.reshape(b, t, 3, attn.heads, dim // attn.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * attn.scale).softmax(dim=-1)  # [B, H, T, T]
        if whole:
            self.shown = weights.mean(dim=(0, 1))
        return attn.proj((weights @ v).transpose(1, 2).reshape(b, t, dim))

    def _block(self, block, x: Tensor, suffix: str = "", whole: bool = False) -> Tensor:
        x = x + self._attention(block.attn, getattr(block, f"norm1{suffix}")(x), whole)
        h = getattr(block, f"norm2{suffix}")(x)
        return x + block.mlp.fc2(nnf.gelu(block.mlp.fc1(h)))

    def _encode(self, letter: str, x: Tensor, prompts: Tensor, pool: bool):
        """Tokens [B, T, D] -> tokens, and (pool) features [B, blocks, D]."""
        blocks, features, n = getattr(self.model, f"blocks_{letter}"), [], prompts.shape[1]
        norms = [block.norm1 for block in blocks[1:]] + [self.model.blocks_u[0].norm1]
        for block, own, norm in zip(blocks, prompts, norms, strict=True):
            x = self._block(block, torch.cat((own.expand(len(x), -1, -1), x), dim=1))[:, n:]
            if pool:
                features.append(norm(x).mean(dim=1))
        return x, torch.stack(features, dim=1) if pool else None

    def _fused(self, x: Tensor, suffix: str = "", whole: bool = False) -> Tensor:
        for block in self.model.blocks_u:
            x = self._block(block, x, suffix, whole)
        return getattr(self.model, f"norm{suffix}")(x).mean(dim=1)

    def _distance(self, features: Tensor, name: str) -> Tensor:
        std, mean = getattr(self.stats, name)
        return (
            nnf.pairwise_distance(std, features.std(dim=0))
            + nnf.pairwise_distance(mean, features.mean(dim=0))
        ).mean()

    def _tokens(self, name: str, x: Tensor) -> Tensor:
        model = self.model
        if name == "audio":
            x = model.patch_embed_a.proj(x.unsqueeze(1).transpose(2, 3))
            position, modality = model.pos_embed_a, model.modality_a
        else:
            x = model.patch_embed_v.proj(x)
            position, modality = model.pos_embed_v, model.modality_v
        return x.flatten(2).transpose(1, 2) + position + modality

    def losses(self, inputs: tuple[Tensor, ...], keep: tuple[Tensor, ...]):
        """(logits, total loss)."""
        model, whole, masked, distance = self.model, {}, {}, {}
        for (name, letter), x, ids in zip(LETTERS.items(), inputs, keep, strict=True):
            tokens, prompts = self._tokens(name, x), self.prompts[name]
            whole[name], features = self._encode(letter, tokens, prompts, True)
            kept = tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
            masked[name], _ = self._encode(letter, kept, prompts, False)
            distance[name] = self._distance(features, name)
        joint = self._fused(torch.cat(tuple(whole.values()), dim=1).detach(), whole=True)
        logits = model.mlp_head(joint)
        moved = self._distance(joint.unsqueeze(1), "joint")
        teacher = (logits / (1 + 0.2 / (1 + torch.exp(5 - moved)))).softmax(dim=-1)
        students = {
            "audio": torch.cat((masked["audio"], whole["video"]), dim=1),
            "video": torch.cat((whole["audio"], masked["video"]), dim=1),
        }
        total = both = distance["audio"] + distance["video"]
        for name, tokens in students.items():
            share = 1 - distance[name].detach() / both.detach()
            total = total + share * nnf.cross_entropy(model.mlp_head(self._fused(tokens)), teacher)
        alone = [
            nnf.normalize((self._fused(x) + self._fused(x, f"_{LETTERS[name]}")) / 2)
            for name, x in whole.items()
        ]
        scores, target = alone[0] @ alone[1].T / 0.07, torch.arange(len(joint), device=joint.device)
        contrast = nnf.cross_entropy(scores, target) + nnf.cross_entropy(scores.T, target)
        return logits, total + contrast / 2

    def __call__(self, inputs: tuple[Tensor, ...], keep: tuple[Tensor, ...]):
        """(logits, total loss, gradients of the prompts of both modalities)."""
        kind, low = inputs[0].device.type, self.precision == "bf16"
        with torch.autocast(kind, torch.bfloat16, enabled=low):
            logits, total = self.losses(inputs, keep)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return (
            logits.detach().float(),
            total.detach(),
            *(x.grad.clone() for x in self.prompts.values()),
        )


def _flops(model: CAVMAE, samples: int, kept: tuple[int, int]) -> int:
    """Multiplications and additions of the matrix products at least: distinct tokens once through
    the encoders, the fusion block's passes, and backward the products with frozen weights once and
    those of attention twice."""
    dim, (ta, tv) = model.dim, model.spans

    def block(tokens: int, backward: bool = True) -> int:
        linear, attention = 2 * tokens * 12 * dim * dim, 4 * tokens * tokens * dim
        return linear * (2 if backward else 1) + attention * (3 if backward else 1)

    encoders = len(model.blocks_a) * (block(ta) + block(kept[0])) + len(model.blocks_v) * (
        block(tv) + block(kept[1])
    )
    fused = block(ta + tv, False) + block(kept[0] + tv) + block(ta + kept[1])
    return samples * (encoders + fused + 2 * (block(ta) + block(tv)))


@pytest.mark.long
@pytest.mark.parametrize(
    "precision",
    [
        # where a CPU has no products in bf16 they are emulated, and say nothing
        pytest.param("bf16", marks=pytest.mark.skipif(not CUDA, reason="measured on a GPU")),
        "fp32",
    ],
)
def bench_brimpr(precision, full, device, measure, threads):
    torch.manual_seed(0)
    sizes = {} if full else {
        "dim": 12, "num_heads": 3, "audio_tokens": 6, "video_tokens": 4, "depth": (1, 2, 1),
        "patch_audio": (4, 2), "patch_video": (3, 3),
    }  # fmt: skip
    model = CAVMAE(50, **sizes).eval().to(device)
    for embedding in (model.modality_a, model.modality_v):
        torch.nn.init.normal_(embedding)  # the modalities apart
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    batch = BATCH if full else 3
    shapes = ((1024, 128), (3, 224, 224)) if full else ((6, 8), (3, 6, 6))
    inputs = tuple(drawn(batch, *shape) for shape in shapes)
    keep = tuple(
        torch.rand(batch, n, generator=generator).argsort(dim=1)[:, : n // 2].to(device)
        for n in model.spans
    )
    stats = fasttta.SourceStats(
        **{n: (drawn(*s).abs() / 4, drawn(*s) / 4) for n, s in model.feature_shapes().items()}
    )
    adapted = fasttta.adapt(model, "brimpr", source_stats=stats, precision=precision)
    started = {n.removeprefix("prompts."): x for n, x in adapted.tuned.items()}
    official, exact = (OfficialStep(model, started, stats, x) for x in (precision, "fp32"))
    limits = {"tolerance": 1e-3, "official": "fp32"}
    if precision == "bf16":
        limits = {
            "exact": lambda: exact(inputs, keep),
            "rounding": 2**-6,  # gradients of loss terms that nearly cancel, in bf16
            "official": "bf16 autocast",
        }

    def ours():
        result = adapted.step(*inputs, keep=keep, trace=True)
        return result.logits, result.losses["total"], *result.grads.values()

    measure(
        ours,
        lambda: official(inputs, keep),
        **limits,
        rounds=20 if CUDA else 3,
        warmup=3 if CUDA else 0,  # the check has run both
        queued=False,
        memory=True,
        samples=batch,
        threads=threads,
        shape=f"batch {batch}",
        engine=adapted.engine,
        headline=True,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        flops=_flops(model, batch, tuple(ids.shape[1] for ids in keep)),
        bytes=sum(x.nbytes for x in (*inputs, *model.parameters())),
    )

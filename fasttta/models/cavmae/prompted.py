"""CAV-MAE with deep prompts in its encoders, and the streams that BriMPR compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ... import trace
from ...ops.softmax_attention import attend
from ...protocols import FusionDefaults, FusionModel, Slot, Streams
from ..blocks.layers import (
    Linear,
    ModalityBlock,
    QueriesAndKeys,
    SelfAttention,
    advance_blocks,
    samples_at_once,
)
from ..blocks.residual import mean_over_tokens, normalised, product_type, split_heads
from .chunked_loss import chunked_loss
from .prompt_attention import prompt_attention, query_and_keys


class Encoders(FusionModel, Protocol):
    """The parts of a ``CAVMAE`` that its form with prompts uses."""

    blocks_a: nn.ModuleList
    blocks_v: nn.ModuleList
    blocks_u: nn.ModuleList
    norm: nn.LayerNorm
    mlp_head: nn.Sequential

    def embed_audio(self, audio: Tensor) -> Tensor:
        """Audio [B, frames, mel bins] -> the tokens [B, Ta, D] that enter the encoder."""

    def embed_video(self, video: Tensor) -> Tensor:
        """Video [B, 3, rows, columns] -> the tokens [B, Tv, D] that enter the encoder."""

    def pool(self, tokens: Tensor, modality: str = "") -> tuple[Tensor, QueriesAndKeys]:
        """Tokens [B, T, D] through fusion blocks, LayerNorm and mean: [B, D]; and q, k, scale."""


class _Stream(NamedTuple):
    """Tokens after an encoder, as they are and after the fusion block's first LayerNorm."""

    tokens: Tensor  # [B, T, D]
    normed: Tensor  # [B, T, D]


class PromptedCAVMAE(FusionDefaults, nn.Module):
    """A CAV-MAE in which each encoder block sees its prompts before the modality's tokens.

    A block's output at its prompts is dropped, so prompts need no query, no attention output and no
    MLP: only keys and values. No sample changes these, so each layer computes them once for all
    streams. Exact: ViT-B, batch 4, fp32: the same features within 7e-7.

    Args:
        model: a ``CAVMAE``; its weights are shared.
        prompts: ``"audio"`` and ``"video"``, [blocks, n, D] each; n may be 0.

    Source: BriMPR (Li and Feng, AAAI 2026) and its official code; deep visual prompts are those of
    Jia et al., ECCV 2022.
    """

    def __init__(self, model: Encoders, prompts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.prompts = nn.ParameterDict({name: nn.Parameter(x) for name, x in prompts.items()})

    @property
    def num_classes(self) -> int | None:
        """C."""
        return self.model.num_classes

    @property
    def num_heads(self) -> int:
        """Heads of every attention layer."""
        return self.model.num_heads

    @property
    def spans(self) -> tuple[int, ...]:
        """Token counts (Ta, Tv) of the fused sequence."""
        return self.model.spans

    @property
    def input_names(self) -> tuple[str, ...]:
        """Audio and video."""
        return self.model.input_names

    def source_value(self, start: Tensor) -> Tensor:
        """Prompts [blocks, 0, D]: the source model has none."""
        return start[:, :0]

    def check_inputs(self, *inputs: Tensor) -> None:
        """As ``CAVMAE.check_inputs``."""
        self.model.check_inputs(*inputs)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """As ``CAVMAE.set_compute_dtype``."""
        self.model.set_compute_dtype(dtype)

    def tunable(self, group: str) -> dict[str, Slot]:
        """``"prompts"``: ``prompts.audio`` and ``prompts.video``; else as ``CAVMAE.tunable``."""
        if group == "prompts":
            return {f"prompts.{name}": Slot(f"prompts.{name}") for name in self.input_names}
        slots = self.model.tunable(group)
        return {name: Slot(f"model.{slot.parameter}", slot.rows) for name, slot in slots.items()}

    def layers(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Inputs -> tokens [B, Ta + Tv, D] and each modality's pooled features [B, blocks, D].

        The feature of block i is the mean over its output tokens after the LayerNorm that block
        i + 1 begins with (of the last block: the LayerNorm that the fusion block begins with).
        """
        streams = [
            self._encode(name, self._embed(name, x), self._prompt_keys(name))
            for name, x in zip(self.input_names, inputs, strict=True)
        ]
        tokens = torch.cat([stream.tokens for stream, _ in streams], dim=1)
        return tokens, tuple(pooled for _, pooled in streams if pooled is not None)  # all are there

    def encode(self, *inputs: Tensor) -> Tensor:
        """Inputs -> tokens [B, Ta + Tv, D]; with empty prompts as the CAV-MAE encodes them."""
        if not any(x.numel() for x in self.prompts.values()):
            return self.model.encode(*inputs)
        with trace.span("encode"):
            return self.layers(*inputs)[0]

    def fuse(self, tokens: Tensor) -> Tensor:
        """As ``CAVMAE.fuse``."""
        return self.model.fuse(tokens)

    def fuse_attention(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """As ``CAVMAE.fuse_attention``."""
        return self.model.fuse_attention(tokens)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Audio [B, frames, mel bins], video [B, 3, rows, columns] -> logits [B, C]."""
        self.check_inputs(*inputs)
        return self.fuse(self.encode(*inputs))

    def streams(self, *inputs: Tensor) -> Streams:
        """The features and logits that BriMPR's losses are made of.

        Every distinct token is encoded once, and projected to the fusion block's q, k, v once: the
        official code projects 2478 token rows a sample where 1062 are distinct (512 + 196 tokens,
        half of them masked). The LayerNorm after a block serves its feature and the next block.
        Masked streams run when their loss is asked for, on a CPU about a sample at a time, and
        their gradients are computed at once: only the graph of unmasked streams is kept.

        Args:
            inputs: one for each modality. After them may stand, for each modality, the ids [B, K]
                (int64) of the tokens that it keeps when it is masked; without ids nothing is
                masked.
        """
        names = self.input_names
        inputs, keep = inputs[: len(names)], inputs[len(names) :]
        embedded = [self._embed(name, x) for name, x in zip(names, inputs, strict=True)]
        keys = [self._prompt_keys(name) for name in names]
        encoded: list[_Stream] = []
        features, head = [], self.model.mlp_head
        for name, x, prompt_keys in zip(names, embedded, keys, strict=True):
            with trace.span(f"streams {name}"):
                stream, pooled = self._encode(name, x, prompt_keys)
                encoded.append(stream)
                assert pooled is not None
                features.append(pooled)
        qkv = self._fusion[0].attn.qkv
        with trace.span("fuse"):
            unmasked = [(x.tokens, qkv(x.normed)) for x in encoded]
            with torch.no_grad():
                joint = self._fused([(x.detach(), y.detach()) for x, y in unmasked])
                logits = head(joint)
        batch, size = len(joint), samples_at_once(unmasked[0][0])

        def masked(i: int, loss: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, Tensor]:
            def part(rows: slice, prompt_keys: list[Tensor], others: list[Tensor]):
                streams = list(zip(others[::2], others[1::2], strict=True))
                if keep:
                    ids = keep[i][rows].unsqueeze(-1).expand(-1, -1, embedded[i].shape[2])
                    kept = embedded[i][rows].gather(1, ids)
                    with trace.span(f"streams {names[i]}"):
                        stream, _ = self._encode(names[i], kept, prompt_keys, pool=False)
                    streams.insert(i, (stream.tokens, qkv(stream.normed)))
                with trace.span("fuse"):
                    logits = head(self._fused(streams))
                return loss(logits, rows), (logits,)

            others = [x for j, pair in enumerate(unmasked) if j != i or not keep for x in pair]
            value, (logits,) = chunked_loss(part, keys[i] if keep else (), others, batch, size)
            return value, logits

        def alone(
            loss: Callable[[list[Tensor]], Tensor],
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            def part(rows: slice, none: list[Tensor], parts: list[Tensor]):
                pairs = zip(names, parts[::2], parts[1::2], strict=True)
                with trace.span("fuse"):
                    features = [
                        (self._fused([(x, y)]) + self.model.pool(x, name[0])[0]) / 2
                        for name, x, y in pairs
                    ]
                return loss(features), tuple(features)

            return chunked_loss(part, (), [x for pair in unmasked for x in pair], batch, batch)

        return Streams(logits, joint, tuple(features), masked, alone)

    def _embed(self, name: str, x: Tensor) -> Tensor:
        return (self.model.embed_audio if name == "audio" else self.model.embed_video)(x)

    def _blocks(self, name: str) -> Sequence[ModalityBlock]:
        blocks = self.model.blocks_a if name == "audio" else self.model.blocks_v
        return cast("Sequence[ModalityBlock]", blocks)

    @property
    def _fusion(self) -> Sequence[ModalityBlock]:
        return cast("Sequence[ModalityBlock]", self.model.blocks_u)

    def _prompt_keys(self, name: str) -> list[Tensor]:
        """Keys and values of each block's prompts, [n, 2 D]."""
        return [
            _rows(block.attn.qkv, _before(block, prompts)[1], 1, 3)
            for block, prompts in zip(self._blocks(name), self.prompts[name].unbind(0), strict=True)
        ]

    def _encode(
        self, name: str, x: Tensor, prompt_keys: Sequence[Tensor], pool: bool = True
    ) -> tuple[_Stream, Tensor | None]:
        """A modality's encoder on tokens [B, T, D]; pool: also features [B, blocks, D]."""
        blocks, pooled = self._blocks(name), []
        x, normed = _before(blocks[0], x)
        nexts = [*blocks[1:], self._fusion[0]]
        for block, keys, following in zip(blocks, prompt_keys, nexts, strict=True):
            x, branch = _after(block, x, _attend_with(block.attn, normed, keys))
            x, normed = _before(following, x, branch)
            if pool:
                pooled.append(mean_over_tokens(normed, x.dtype))
        return _Stream(x, normed), torch.stack(pooled, dim=1) if pool else None

    def _fused(self, streams: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Streams (tokens [B, T, D], their q, k, v [B, T, 3 D] in the first fusion block) one after
        the other -> pooled [B, D]."""
        x, packed = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]
                     for parts in zip(*streams, strict=True))  # fmt: skip
        first, *others = self._fusion
        q, k, v = _heads(first.attn, packed, 3)
        x, branch = _after(first, x, _attend(first.attn, q, k, v))
        x, waiting, _ = advance_blocks(others, x, branch)
        return mean_over_tokens(normalised(self.model.norm, x, waiting)[1])


def _before(block: ModalityBlock, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + branch [B, T, D] (None: nothing waits to be added), and the block's first LayerNorm."""
    return normalised(block.norm1, x, branch, product_type(block.attn, "qkv"))


def _after(block: ModalityBlock, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """x and the attention's output, added, and what the MLP returns, which waits; [B, T, D]."""
    x, n = normalised(block.norm2, x, branch, product_type(block.mlp, "fc1"))
    return x, block.mlp(n)


def _rows(packed: Linear, x: Tensor, first: int, last: int) -> Tensor:
    """The projections ``first`` to ``last`` (q 0, k 1, v 2) of a packed layer.

    With q apart from k and v, the backward pass keeps no packed product of which it needs a part.
    """
    dim = packed.in_features
    return packed.part(x, slice(first * dim, last * dim))


def _heads(attn: SelfAttention, packed: Tensor, n: int) -> tuple[Tensor, ...]:
    """[B, T, n D] -> n tensors [B, H, T, d]."""
    b, t, dim = packed.shape
    return split_heads(packed.view(b, t, n, attn.heads, dim // (n * attn.heads)))


def _attend(attn: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, T, d] each -> the layer's output [B, T, D]."""
    out = attend(q, k, v, attn.scale)
    return attn.proj(out.transpose(1, 2).flatten(2))


def _attend_with(attn: SelfAttention, normed: Tensor, prompt_keys: Tensor) -> Tensor:
    """Attention of tokens [B, T, D] over themselves and over prompts' keys and values [n, 2 D]."""
    normed = normed.to(prompt_keys.dtype)  # once for both products
    q, kv = query_and_keys(attn.qkv, normed)
    return attn.proj(prompt_attention(q, kv, prompt_keys, attn.heads, attn.scale))

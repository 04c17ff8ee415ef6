"""CLIP's text tower on a list of classes: only the tokens that matter, each computed once.

The tower is causal, so no token after a prompt's end token changes its feature, and the tokens that
all prompts begin with have the same hidden states for all classes. Both savings are exact:
ImageNet's 1000 prompts are 4,170 tokens instead of 77,000 (77 for each; the official code has 40).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import native
from ...ops.shared_prefix_attention import Layout, causal_with_prefix, shared_prefix_attention
from ...ops.shared_prefix_attention import layout as layout_of
from ..blocks.layers import ResidualAttentionBlock, normed
from .vision_transformer import Transformer

# Tokens in one pass. CPU: at 1000 classes (2 cores, width 512) a tenth faster than 512, as fast as
# 2048, and 243 MiB beyond the weights at its peak; GPU: one pass up to ImageNet's size.
_TOKENS = {"cpu": 1024, "cuda": 8192}
# The tokens that all classes begin with are repeated for each class, up to so many in all: one
# attention in place of two and their joining, nine kernels fewer a block, forward and backward (99
# of A-TPT's 1,286 on 37 classes). Products of so few rows take as long as those of half as many.
_REPEATED = {"cpu": 0, "cuda": 512}
# Activations that may be kept until (for the initial prompt, after) use: on a GPU a share of its
# memory. 1000 classes of 18 tokens need 6.2 GiB at width 512. Where they are not kept, the tower is
# run forward again for the gradient, 0.32 TFLOP.
_KEEP_BYTES, _KEEP_SHARE = 256 * 2**20, 1 / 16


class Linearised(NamedTuple):
    """Text features and their derivative: ``pullback`` takes dL/d(features) [B, C, E] to
    dL/d(prompt) [B, n, D]; features may have B = 1 where all prompts are the same."""

    features: Tensor  # [B, C, E], not normalised
    pullback: Callable[[Tensor], Tensor]


class TextTower(Protocol):
    """The parts of a model that ``Prompts`` uses."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: nn.Parameter


@dataclass
class Chunk:
    """Some classes of similar length; their tokens after the shared ones, without padding.

    Attributes:
        classes: [c] class indices.
        tokens: [S, D] embeddings with positions, class after class.
        last: [c] packed row of the end token.
        layout: of the packed rows.
    """

    classes: Tensor
    tokens: Tensor
    last: Tensor
    layout: Layout


@dataclass
class Repeated:
    """All classes, each with the shared tokens in front of it.

    Attributes:
        order: [C P + S] for each row the place of its token among the shared ones, once for every
            class, and after them the chunk's.
        chunk: the same classes; its tokens are those of ``order``.
    """

    order: Tensor
    chunk: Chunk


class Prompts:
    """Class prompts [SOT, prompt, rest, class, ..., EOT] as a function of the prompt's embeddings.

    Args:
        model: a CLIP, or another model with a text tower of the same kind.
        ids: [C, L] int64.
        ends: [C] where each row's end token is; tokens after it do not matter.
        length: n, tokens after SOT that the prompt replaces, the same in all rows; 0: none.
    """

    def __init__(self, model: TextTower, ids: Tensor, ends: Tensor, length: int = 0) -> None:
        self.model, self.length = model, length
        # on the host, once a class list
        device = model.positional_embedding.device
        stops: list[int] = (ends + 1).tolist()
        rows: list[list[int]] = [row[:n] for row, n in zip(ids.tolist(), stops, strict=True)]
        self.prefix = min(_common(rows), min(stops) - 1)  # a token is left for every class
        order = sorted(range(len(rows)), key=lambda i: stops[i])
        self.count = len(rows)
        with torch.inference_mode(False), torch.no_grad():
            self.ids = torch.tensor(rows[0][: self.prefix], device=device)
            self.position = torch.tensor(order, device=device).argsort()
            self.shared = layout_of([self.prefix], device) if self.prefix else None
            self.initial = self._embedded(self.ids[1 : 1 + length]).clone()  # [n, D]
            self.chunks = list(self._chunks(rows, order, device))
            self.repeated = self._repeated([stops[i] for i in order], device)
        self._first: Linearised | None = None
        self._versions: list[int] = []  # of the weights that it holds for

    def start_at(self, prompt: Tensor) -> None:
        """Takes another initial prompt [n, D]."""
        self.initial, self._first = prompt.detach().to(self.initial, copy=True), None

    def _embedded(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.model.token_embedding.weight)

    def _chunks(
        self, rows: list[list[int]], order: list[int], device: torch.device
    ) -> Iterator[Chunk]:
        limit, start, p = _TOKENS[device.type if device.type in _TOKENS else "cpu"], 0, self.prefix
        while start < len(order):
            stop, total = start, 0
            while stop < len(order) and (total := total + len(rows[order[stop]]) - p) <= limit:
                stop += 1
            stop = max(stop, start + 1)
            suffixes = [rows[i][p:] for i in order[start:stop]]
            yield self._chunk(suffixes, order[start:stop], device)
            start = stop

    def _chunk(self, suffixes: list[list[int]], classes: list[int], device: torch.device) -> Chunk:
        lengths = [len(row) for row in suffixes]
        flat = torch.tensor([token for row in suffixes for token in row], device=device)
        places = torch.tensor([self.prefix + j for n in lengths for j in range(n)], device=device)
        tokens = self._embedded(flat) + self.model.positional_embedding[places]
        layout = layout_of(lengths, device)
        last = layout.starts[1:].long() - 1
        return Chunk(torch.tensor(classes, device=device), tokens, last, layout)

    def _repeated(self, stops: list[int], device: torch.device) -> Repeated | None:
        """Sequences of these lengths, the shared tokens included; None: too many tokens."""
        p, c = self.prefix, len(stops)
        if not self._at_once or c * p > _REPEATED["cuda" if self.position.is_cuda else "cpu"]:
            return None
        (chunk,), order, end = self.chunks, [], c * p
        for i, stop in enumerate(stops):
            order += [*range(i * p, (i + 1) * p), *range(end, end + stop - p)]
            end += stop - p
        layout = layout_of(stops, device)
        last = layout.starts[1:].long() - 1
        return Repeated(
            torch.tensor(order, device=device), Chunk(chunk.classes, chunk.tokens, last, layout)
        )

    def _each(self, prompt: Tensor, repeated: Repeated) -> Tensor:
        """Features [B, c, E] of classes that begin with the shared tokens, one copy each."""
        chunk, start = repeated.chunk, self._start(prompt)
        both = (start.repeat(1, self.count, 1), chunk.tokens.expand(len(prompt), -1, -1))
        x = torch.cat(both, 1).index_select(1, repeated.order)
        none = x.new_empty((len(x), 0, x.shape[2]))
        blocks = self.model.transformer.blocks
        dtype = blocks[0].attn.compute_dtype or x.dtype
        nothing = none.to(dtype)
        return self._suffix(chunk, [(nothing, nothing)] * len(blocks), x)

    def _start(self, prompt: Tensor) -> Tensor:
        """Prompts [B, n, D] -> embeddings [B, P, D] of the shared tokens."""
        n, fixed = self.length, self._embedded(self.ids).expand(len(prompt), -1, -1)
        x = torch.cat((fixed[:, :1], prompt, fixed[:, 1 + n :]), 1) if n else fixed
        return x + self.model.positional_embedding[: self.prefix]

    def _whole(self, prompt: Tensor) -> Tensor:
        """Features [B, c, E] where there is one chunk: its tokens and the shared ones go through in
        one pass, which reads the weights once and starts half as many kernels on a GPU."""
        model, (chunk,), p = self.model, self.chunks, self.prefix
        assert self.shared is not None  # as _at_once says
        *blocks, last = model.transformer.blocks
        x = torch.cat((self._start(prompt), chunk.tokens.expand(len(prompt), -1, -1)), 1)
        branch = None
        for block in blocks:
            attn = block.attn
            x, n = block.before_attention(x, branch)
            q, k, v = attn.project(n)
            out = causal_with_prefix(q, k, v, self.shared, chunk.layout, attn.heads, attn.scale)
            x, branch = block.after_attention(x, attn.out_proj(out))
        x, n = last.before_attention(x, branch)
        pairs = [(y[:, :p], y[:, p:]) for y in last.attn.project(n, "kv")]
        shared, suffix = zip(*pairs, strict=True)
        return self._ends(chunk, x[:, p:], n[:, p:], suffix, shared)

    def _prefix(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Prompts [B, n, D] -> keys and values [B, P, D] of the shared tokens by block."""
        x, branch, cached = self._start(prompt), None, []
        *blocks, last = self.model.transformer.blocks
        for block in blocks:
            x, n = block.before_attention(x, branch)
            q, k, v = block.attn.project(n)
            cached.append((k, v))
            q, k, v = map(block.attn.split, (q, k, v))
            out = block.attn.combine(_causal(q, k, v, block.attn.scale))
            x, branch = block.after_attention(x, out)
        k, v = last.attn.project(last.before_attention(x, branch)[1], "kv")
        cached.append((k, v))
        return cached

    def _suffix(
        self, chunk: Chunk, cached: list[tuple[Tensor, Tensor]], tokens: Tensor | None = None
    ) -> Tensor:
        """Features [B, c, E] of a chunk's classes after the shared tokens' keys and values.
        ``tokens``: in place of the chunk's."""
        *blocks, last = self.model.transformer.blocks
        x = chunk.tokens.expand(len(cached[0][0]), -1, -1) if tokens is None else tokens
        branch = None
        for block, shared in zip(blocks, cached, strict=False):
            x, n = block.before_attention(x, branch)
            q, *kv = block.attn.project(n)
            x, branch = block.after_attention(x, self._attended(block, chunk, q, kv, shared))
        x, n = last.before_attention(x, branch)
        return self._ends(chunk, x, n, last.attn.project(n, "kv"), cached[-1])

    def _attended(
        self,
        block: ResidualAttentionBlock,
        chunk: Chunk,
        q: Tensor,
        kv: Sequence[Tensor],
        shared: Sequence[Tensor],
    ) -> Tensor:
        """The attention output at q [B, n, D], a chunk's tokens or its end tokens, projected."""
        attn, (k, v), (prefix_k, prefix_v) = block.attn, kv, shared
        out = shared_prefix_attention(
            q, k, v, prefix_k, prefix_v, *chunk.layout, attn.heads, attn.scale
        )
        return attn.out_proj(out)

    def _ends(
        self, chunk: Chunk, x: Tensor, n: Tensor, kv: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Tensor:
        """The last block at the end tokens alone, which are the only ones that are read.

        Args:
            x: [B, S, D], tokens of the chunk before the block.
            n: [B, S, D], the same after ln_1.
            kv: keys and values [B, S, D] of the chunk.
            shared: keys and values [B, P, D] of the shared tokens.

        Returns:
            Features [B, c, E].
        """
        model, last = self.model, self.model.transformer.blocks[-1]
        x = x.index_select(1, chunk.last)
        (q,) = last.attn.project(n.index_select(1, chunk.last), "q")
        x, branch = last.after_attention(x, self._attended(last, chunk, q, kv, shared))
        return normed(model.ln_final, None, x, branch)[1] @ model.text_projection

    def features(self, prompt: Tensor | None = None) -> Tensor:
        """Text features [B, C, E] of prompts [B, n, D] (None: the initial one, B = 1), not
        normalised; differentiable where autograd is on."""
        prompt = self.initial[None] if prompt is None else prompt
        groups = prompt.split(self._together) if len(prompt) else [prompt]
        parts = []
        for group in groups:
            if self._at_once:
                repeated = self.repeated
                parts.append(self._each(group, repeated) if repeated else self._whole(group))
                continue
            cached = self._prefix(group)
            parts.append(torch.cat([self._suffix(chunk, cached) for chunk in self.chunks], 1))
        return torch.cat(parts).index_select(1, self.position)

    @property
    def _at_once(self) -> bool:
        return len(self.chunks) == 1 and self.shared is not None

    @property
    def _together(self) -> int:
        """Prompts in one pass."""
        limit = _TOKENS[self.position.device.type if self.position.is_cuda else "cpu"]
        return max(1, limit // (self.prefix + max(len(chunk.tokens) for chunk in self.chunks)))

    def linearise(self, prompt: Tensor | None = None) -> Linearised:
        """Features and pullback at prompts [B, n, D]; None: the initial prompt, for any number of
        cotangents, kept for the next call.

        Where activations do not fit, chunks of classes are computed again in the backward pass, so
        that its peak is that of one chunk.
        """
        if prompt is not None:
            return self._kept(prompt) if self._fits(len(prompt)) else self._again(prompt)
        versions = self.versions()
        if self._first is None or versions != self._versions:  # the graph is of other weights
            start = self.initial[None]
            self._first = self._kept(start) if self._fits(1) else self._again(start)
            self._versions = versions
        return self._first

    def versions(self) -> list[int]:
        """How often each weight of the tower has been written to."""
        return [x._version for x in self._weights() if not x.is_inference()]

    def _weights(self) -> Iterator[Tensor]:
        yield from self.model.transformer.parameters()
        yield from self.model.ln_final.parameters()
        yield self.model.text_projection

    def _fits(self, prompts: int) -> bool:
        # values that a token, channel and block save for the backward pass: more where QuickGELU is
        # several operations
        saved = 10 if self.initial.device.type == "cpu" and native.load() else 15
        tokens = prompts * (self.prefix + sum(len(chunk.tokens) for chunk in self.chunks))
        x, blocks = self.initial, len(self.model.transformer.blocks)
        return saved * tokens * blocks * x.shape[-1] * x.element_size() <= _kept_bytes(x.device)

    def _again(self, prompt: Tensor) -> Linearised:
        with torch.no_grad():
            features = self.features(prompt)
        return Linearised(features, lambda cotangent: self._pullback(prompt, cotangent))

    def _kept(self, prompt: Tensor) -> Linearised:
        """Keeps the graph: a third less work than to compute it again, where memory allows it."""
        with torch.enable_grad():
            leaf = prompt.detach().clone().requires_grad_()
            features = self.features(leaf)

        def pullback(cotangent: Tensor) -> Tensor:
            # one prompt for all cotangents, or one each
            pieces = [cotangent] if len(leaf) > 1 else cotangent.split(1)
            rows = [
                torch.autograd.grad(features, leaf, piece, retain_graph=True)[0] for piece in pieces
            ]
            return torch.cat(rows)

        return Linearised(features.detach(), pullback)

    def _pullback(self, prompt: Tensor, cotangent: Tensor) -> Tensor:
        """Chunk by chunk to the shared keys and values, then once through the shared tokens.
        prompt [1 or B, n, D], cotangent [B, C, E] -> [B, n, D]."""
        if len(prompt) == 1 < len(cotangent):
            return torch.cat([self._pullback(prompt, row[None]) for row in cotangent])
        if len(prompt) > self._together:
            groups = zip(prompt.split(self._together), cotangent.split(self._together), strict=True)
            return torch.cat([self._pullback(*group) for group in groups])
        with torch.enable_grad():
            leaf = prompt.detach().clone().requires_grad_()
            if self._at_once:
                return torch.autograd.grad(self.features(leaf), leaf, cotangent)[0]
            cached = [x for pair in self._prefix(leaf) for x in pair]
            ends = [x.detach().requires_grad_() for x in cached]
            pairs = list(zip(ends[::2], ends[1::2], strict=True))
            total = [torch.zeros_like(x) for x in ends]
            for chunk in self.chunks:
                features = self._suffix(chunk, pairs)
                row = cotangent.index_select(1, chunk.classes)
                for x, g in zip(total, torch.autograd.grad(features, ends, row), strict=True):
                    x.add_(g)
            return torch.autograd.grad(cached, leaf, total)[0]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of a few tokens [B, H, P, d]. On a CPU it is written out: for so few tokens
    the flash kernel takes one and a half times as long."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    scores = q @ (k * scale).transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def _common(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )


def _kept_bytes(device: torch.device) -> float:
    """Bytes of activations that may be kept."""
    if device.type != "cuda":
        return _KEEP_BYTES
    return max(_KEEP_BYTES, _KEEP_SHARE * torch.cuda.get_device_properties(device).total_memory)

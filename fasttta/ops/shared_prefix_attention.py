"""Causal attention of packed sequences that begin alike, where no kernel computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.shared_prefix_attention_plan import TILE_TOKENS
from .reference import wide


class Layout(NamedTuple):
    """Where packed sequences lie.

    Attributes:
        starts: [C + 1] int32, first token of each sequence, and their count (``cu_seqlens``).
        tiles: [n + 1] int32, first sequence of each tile, and C. Tiles are what kernels take at
            once: at most 64 tokens, or a single sequence.
        longest: tokens.
    """

    starts: Tensor
    tiles: Tensor
    longest: int


def layout(lengths: Sequence[int], device: torch.device | str | None = None) -> Layout:
    """Of sequences of so many tokens."""
    starts, tiles = [0], [0]
    for n, length in enumerate(lengths):
        if n > tiles[-1] and starts[-1] + length - starts[tiles[-1]] > TILE_TOKENS:
            tiles.append(n)
        starts.append(starts[-1] + length)
    tiles.append(len(lengths))
    first, split = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, tiles))
    return Layout(first, split, max(lengths))


class _Padded:
    """Packed rows as sequences of one length: the way there and back."""

    def __init__(self, q: Tensor, k: Tensor, starts: Tensor, longest: int, heads: int) -> None:
        tokens, device = k.shape[1], k.device
        self.heads, self.count, self.longest = heads, len(starts) - 1, longest
        self.last = q.shape[1] != tokens  # queries are the sequences' last tokens alone
        self.full = self.count * longest == tokens
        column, lengths = torch.arange(longest, device=device), starts.diff()
        self.real = column < lengths[:, None]  # [C, L]
        self.rows = torch.where(self.real, starts[:-1, None] + column, 0).flatten()
        each = torch.arange(self.count, device=device)
        each = each.repeat_interleave(lengths, output_size=tokens)  # sequence of a row
        self.places = (
            each * longest - starts.index_select(0, each) + torch.arange(tokens, device=device)
        )

    def tokens(self, x: Tensor) -> Tensor:
        """[B, S, H d] -> [B, C, H, L, d], filled up with 0."""
        if not self.full:
            x = x.index_select(1, self.rows).masked_fill_(~self.real.view(-1, 1), 0)
        return x.unflatten(1, (self.count, -1)).unflatten(-1, (self.heads, -1)).transpose(2, 3)

    def queries(self, x: Tensor) -> Tensor:
        """[B, Q, H d] -> [B, C, H, L or 1, d]"""
        if not self.last:
            return self.tokens(x)
        return x.unsqueeze(2).unflatten(-1, (self.heads, -1)).transpose(2, 3)

    def keys(self, prefix: Tensor, x: Tensor) -> Tensor:
        """[B, P, H d] and [B, S, H d] -> [B, C, H, P + L, d]"""
        shared = prefix.unflatten(-1, (self.heads, -1)).transpose(1, 2).unsqueeze(1)
        return torch.cat((shared.expand(-1, self.count, -1, -1, -1), self.tokens(x)), dim=3)

    def hidden(self, prefix: int) -> Tensor:
        """Scores [C, 1, L or 1, P + L] that a query does not have."""
        if self.last:
            seen = torch.nn.functional.pad(self.real, (prefix, 0), value=True)
            return ~seen[:, None, None]
        shape = self.longest, prefix + self.longest
        return ~torch.ones(shape, dtype=torch.bool, device=self.rows.device).tril(prefix)

    def packed(self, x: Tensor) -> Tensor:
        """[B, C, H, L, d] -> [B, S, H d]"""
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)
        return x if self.full else x.index_select(1, self.places)

    def packed_queries(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(3).flatten(1, 2) if self.last else self.packed(x)


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor,
    tiles: Tensor, longest: int, heads: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sequences filled up to the longest one."""
    dtype = q.dtype
    q, k, v, prefix_k, prefix_v = map(wide, (q, k, v, prefix_k, prefix_v))
    pad = _Padded(q, k, starts, longest, heads)
    p = (scale * pad.queries(q)) @ pad.keys(prefix_k, k).transpose(-2, -1)
    p.masked_fill_(pad.hidden(prefix_k.shape[1]), -torch.inf)
    lse = p.logsumexp(dim=-1)  # [B, C, H, L or 1]
    out = pad.packed_queries(p.softmax(dim=-1) @ pad.keys(prefix_v, v))
    lse = pad.packed_queries(lse.unsqueeze(-1)).transpose(1, 2)
    return out.to(dtype).contiguous(), lse.contiguous()


def shared_prefix_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor,
    lse: Tensor, starts: Tensor, tiles: Tensor, longest: int, heads: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, shared = q.dtype, prefix_k.shape[1]
    grad, q, k, v, prefix_k, prefix_v, out = map(wide, (grad, q, k, v, prefix_k, prefix_v, out))
    pad = _Padded(q, k, starts, longest, heads)
    mean = (grad * out).unflatten(-1, (heads, -1)).sum(-1)  # [B, Q, H]
    up, mean = pad.queries(grad), pad.queries(mean)
    q, k = scale * pad.queries(q), pad.keys(prefix_k, k)
    p = q @ k.transpose(-2, -1)
    p.masked_fill_(pad.hidden(shared), -torch.inf)
    p.sub_(pad.queries(lse.transpose(1, 2))).exp_()
    ds = p * (up @ pad.keys(prefix_v, v).transpose(-2, -1) - mean)
    dq = pad.packed_queries(scale * (ds @ k))
    found = [dq]
    for own, other in ((ds, q), (p, up)):
        found.append(own.transpose(-2, -1) @ other)  # [B, C, H, P + L, d]
    dq, dk, dv = found
    dk_own, dv_own = (pad.packed(x[..., shared:, :]) for x in (dk, dv))
    dk_shared, dv_shared = (x[..., :shared, :].sum(1).transpose(1, 2).flatten(2) for x in (dk, dv))
    dq, dk, dv, dk_shared, dv_shared = (
        x.to(dtype).contiguous() for x in (dq, dk_own, dv_own, dk_shared, dv_shared)
    )
    return dq, dk, dv, dk_shared, dv_shared

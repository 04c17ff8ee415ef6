"""Causal attention of packed sequences that all begin with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import trace
from ..kernels.shared_prefix_attention_plan import TILE_TOKENS, widest_head
from . import triton
from .cost import Cost, with_copies
from .registry import (
    define,
    differentiate,
    ops,
    public,
    refuse_second_derivative,
    result_like,
    wide,
)

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v"
_LAYOUT = "Tensor starts, Tensor tiles, int longest, int heads, float scale"
SCHEMA = f"shared_prefix_attention({_TENSORS}, {_LAYOUT}) -> (Tensor out, Tensor lse)"
BACKWARD_SCHEMA = (
    f"shared_prefix_attention_backward(Tensor grad, {_TENSORS}, Tensor out, Tensor lse, {_LAYOUT})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_prefix_k, Tensor grad_prefix_v)"
)


class Layout(NamedTuple):
    """Where packed sequences lie.

    Attributes:
        starts: [C + 1] int32, first token of each sequence, and their count (``cu_seqlens``).
        tiles: [n + 1] int32, first sequence of each tile, and C. Tiles are what kernels take at
            once: at most 64 tokens, or a single sequence.
        longest: tokens of the longest sequence.
    """

    starts: Tensor
    tiles: Tensor
    longest: int


def layout(lengths: Sequence[int], device: torch.device | str | None = None) -> Layout:
    """Packs sequences of these lengths in tokens, at least one, as many to a tile as fit."""
    starts, tiles = [0], [0]
    for n, length in enumerate(lengths):
        if n > tiles[-1] and starts[-1] + length - starts[tiles[-1]] > TILE_TOKENS:
            tiles.append(n)
        starts.append(starts[-1] + length)
    tiles.append(len(lengths))
    first, split = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, tiles))
    return Layout(first, split, max(lengths))


def _fake(q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, scale):
    return q.new_empty(q.shape), result_like(q, (q.shape[0], heads, q.shape[1]))


def _fake_backward(grad, q, k, v, prefix_k, prefix_v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, prefix_k, prefix_v))


def shared_prefix_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor,
    tiles: Tensor, longest: int, heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """One sequence after the other, each with the prefix in front of it.

    Args:
        q: [B, S, H d], or [B, C, H d] of every sequence's last token alone. k, v: [B, S, H d].
        prefix_k, prefix_v: [B, P, H d].
        starts, tiles, longest: a ``Layout`` of C sequences of S tokens in all.
        heads: H. scale: factor of q·k.

    Returns:
        [B, S, H d] or [B, C, H d], in the type of q.
    """
    dtype, last = q.dtype, q.shape[1] != k.shape[1]
    q, k, v, prefix_k, prefix_v = (
        wide(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v, prefix_k, prefix_v)
    )
    outputs = []
    for n, (start, stop) in enumerate(pairwise(starts.tolist())):
        keys = torch.cat((prefix_k, k[:, :, start:stop]), dim=2)
        values = torch.cat((prefix_v, v[:, :, start:stop]), dim=2)
        queries = q[:, :, n : n + 1] if last else q[:, :, start:stop]
        scores = scale * (queries @ keys.transpose(-2, -1))
        later = torch.ones_like(scores, dtype=torch.bool).triu(
            1 + scores.shape[-1] - scores.shape[-2]
        )
        outputs.append(scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ values)
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2).to(dtype)


def causal_with_prefix_reference(
    q: Tensor, k: Tensor, v: Tensor, prefix: Layout, packed: Layout, heads: int, scale: float
) -> Tensor:
    """``causal_with_prefix`` in two calls of the reference: [B, P + S, H d]."""
    n, none = prefix.longest, k[:, :0]
    (q0, q1), (k0, k1), (v0, v1) = ((x[:, :n], x[:, n:]) for x in (q, k, v))
    front = shared_prefix_attention_reference(q0, k0, v0, none, none, *prefix, heads, scale)
    back = shared_prefix_attention_reference(q1, k1, v1, k0, v0, *packed, heads, scale)
    return torch.cat((front, back), dim=1)


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, scale):
        tensors = q, k, v, prefix_k, prefix_v
        with trace.span("shared_prefix_attention"):
            out, lse = ops.shared_prefix_attention(*tensors, starts, tiles, longest, heads, scale)
        ctx.save_for_backward(*tensors, out, lse, starts, tiles)
        ctx.options = longest, heads, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("shared_prefix_attention")
        with trace.span("shared_prefix_attention_backward"):
            grads = ops.shared_prefix_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None, None


class _CausalWithPrefix(torch.autograd.Function):
    """Of the prefix's tokens too, which lie in front of the packed ones."""

    @staticmethod
    def forward(*arguments):
        # one parameter for all: torch.compile leaves ctx out where a call without gradients has as
        # many arguments as forward has parameters, which those with some in a tuple may come to
        ctx, q, k, v, prefix, packed, heads, scale = arguments
        n, none = prefix.longest, k[:, :0]
        (q0, q1), (k0, k1), (v0, v1) = ((x[:, :n], x[:, n:]) for x in (q, k, v))
        with trace.span("shared_prefix_attention"):
            out0, lse0 = ops.shared_prefix_attention(q0, k0, v0, none, none, *prefix, heads, scale)
            out1, lse1 = ops.shared_prefix_attention(q1, k1, v1, k0, v0, *packed, heads, scale)
        out = torch.cat((out0, out1), dim=1)
        ctx.save_for_backward(q, k, v, out, lse0, lse1)
        ctx.prefix, ctx.packed, ctx.options = prefix, packed, (heads, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("shared_prefix_attention")
        q, k, v, out, lse0, lse1 = ctx.saved_tensors
        n = ctx.prefix.longest
        up0, q0, k0, v0, out0 = (x[:, :n] for x in (grad, q, k, v, out))
        up1, q1, k1, v1, out1 = (x[:, n:] for x in (grad, q, k, v, out))
        none, backward = k0[:, :0], ops.shared_prefix_attention_backward
        with trace.span("shared_prefix_attention_backward"):
            dq1, dk1, dv1, dk, dv = backward(
                up1, q1, k1, v1, k0, v0, out1, lse1, *ctx.packed, *ctx.options
            )
            dq0, dk0, dv0, _, _ = backward(
                up0, q0, k0, v0, none, none, out0, lse0, *ctx.prefix, *ctx.options
            )
        pairs = ((dq0, dq1), (dk0.add_(dk), dk1), (dv0.add_(dv), dv1))
        return *(torch.cat(pair, dim=1) for pair in pairs), None, None, None, None


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor,
    tiles: Tensor, longest: int, heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """``functional.shared_prefix_attention`` of checked arguments, those of the reference."""
    arguments = q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, scale
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return shared_prefix_attention_reference(*arguments)
    return _SharedPrefixAttention.apply(*arguments)


def causal_with_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix: Layout, packed: Layout, heads: int, scale: float
) -> Tensor:
    """Causal attention of a prefix, and ``shared_prefix_attention`` of the tokens after it.

    Args:
        q, k, v: [B, P + S, H d], the prefix's tokens and then the packed ones.
        prefix, packed: the layout of a single sequence of P tokens, and of the packed ones.
        heads: H. scale: factor of q·k.

    Returns:
        [B, P + S, H d].
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return causal_with_prefix_reference(q, k, v, prefix, packed, heads, scale)
    return _CausalWithPrefix.apply(q, k, v, prefix, packed, heads, scale)


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


def _default(
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


def _default_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor,
    lse: Tensor, starts: Tensor, tiles: Tensor, longest: int, heads: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    def formula(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        layout = starts, tiles, longest
        return _default(q, k, v, prefix_k, prefix_v, *layout, heads, scale)[0]

    return differentiate(formula, q, k, v, prefix_k, prefix_v, wanted=5, upstream=grad)[1]


def _no_triton(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor,
    tiles: Tensor, longest: int, heads: int, scale: float, *others: Tensor,
) -> str | None:  # fmt: skip
    tensors = q, k, v, prefix_k, prefix_v, *others
    if reason := triton.unsuitable(*tensors):
        return reason
    types = [x.dtype for x in tensors]
    if len(set(types)) > 1:
        return f"it needs tensors of one dtype, found {types}"
    if starts.dtype != torch.int32 or tiles.dtype != torch.int32:
        return f"it needs starts and tiles in int32, found {starts.dtype} and {tiles.dtype}"
    if longest > TILE_TOKENS:
        return f"it needs sequences of at most {TILE_TOKENS} tokens, found {longest}"
    d, widest = q.shape[2] // heads, widest_head(q.dtype == torch.bfloat16)
    if d > widest:
        return f"it needs heads of at most {widest} channels in {q.dtype}, found {d}"
    if len(q) * heads > triton.MOST_SAMPLES:
        return f"it needs at most {triton.MOST_SAMPLES} heads, found {len(q)} samples of {heads}"
    return None


def _no_triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor,
    lse: Tensor, starts: Tensor, tiles: Tensor, longest: int, heads: int, scale: float,
) -> str | None:  # fmt: skip
    layout = starts, tiles, longest, heads, scale
    reason = _no_triton(q, k, v, prefix_k, prefix_v, *layout, grad, out)
    return reason or triton.unsuitable(lse)


def _rows(x: Tensor) -> Tensor:
    """x [B, n, H d] with channels next to each other, as the kernels read tokens."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, scale):
    tensors = (_rows(x) for x in (q, k, v, prefix_k, prefix_v))
    return triton.kernels("shared_prefix_attention").shared_prefix_attention(
        *tensors, starts.contiguous(), tiles.contiguous(), longest, heads, scale
    )


def _launch_backward(
    grad, q, k, v, prefix_k, prefix_v, out, lse, starts, tiles, longest, heads, scale
):
    tensors = (_rows(x) for x in (q, k, v, prefix_k, prefix_v))
    return triton.kernels("shared_prefix_attention").shared_prefix_attention_backward(
        grad.contiguous(), *tensors, out.contiguous(), lse.contiguous(), starts.contiguous(),
        tiles.contiguous(), longest, heads, scale,
    )  # fmt: skip


def _flops(q: Tensor, k: Tensor, prefix_k: Tensor, longest: int) -> int:
    """Of scores and sums; a token sees about half of its sequence, the last one all of it."""
    seen = prefix_k.shape[1] + (longest if q.shape[1] != k.shape[1] else (longest + 1) // 2)
    return 4 * q.numel() * seen


def _cost(q, k, v, prefix_k, prefix_v, starts, tiles, longest, heads, scale) -> Cost:
    return Cost(flops=_flops(q, k, prefix_k, longest), share=0.3)


def _cost_backward(
    grad, q, k, v, prefix_k, prefix_v, out, lse, starts, tiles, longest, heads, scale
) -> Cost:
    partial = 2 * (len(tiles) - 1) * prefix_k.numel() * 4  # of the prefix, a sum for each tile
    flops = 5 * _flops(q, k, prefix_k, longest) // 2
    cost = Cost(2 if partial else 1, flops, share=0.15, workspace=2 * partial)
    return with_copies(cost, grad, out, lse)


define(
    SCHEMA,
    _fake,
    _default,
    cpp=True,
    kernels="shared_prefix_attention",
    no_triton=_no_triton,
    launch=_launch,
    cost=_cost,
)
define(
    BACKWARD_SCHEMA,
    _fake_backward,
    _default_backward,
    cpp=True,
    kernels="shared_prefix_attention",
    no_triton=_no_triton_backward,
    launch=_launch_backward,
    cost=_cost_backward,
)
public("shared_prefix_attention", shared_prefix_attention, shared_prefix_attention_reference)

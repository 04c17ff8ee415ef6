"""Frozen transformer blocks in float8: weights quantised once, activations token by token.

A weight has a scale for each output channel, activations one for each token (``ops.scaled_rows``);
products are bfloat16. LayerNorms are computed in float32 and quantised in the same pass, so are
GELUs; the residual stream and attention stay as they are. The blocks stand in a working copy in
place of those that they are made from, so that of a quantised weight no other form is kept there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...ops.scaled_layer_norm import scaled_layer_norm
from ...ops.scaled_product import MULTIPLE, scaled_product
from ...ops.scaled_rows import NO_GRADIENT, ScaledRows, scaled_rows
from ...ops.softmax_attention import attend
from ..copies import CALLED
from .layers import (
    MLP,
    FeedForward,
    Linear,
    ModalityBlock,
    PackedAttention,
    QueriesAndKeys,
    ResidualAttentionBlock,
    SelfAttention,
)

_COMPUTE = torch.bfloat16
#: the modules that a block has a form in float8 of, each of exactly this class
_PARTS: dict[type[nn.Module], dict[str, type[nn.Module]]] = {
    ModalityBlock: {
        "attn": SelfAttention, "attn.qkv": Linear, "attn.proj": Linear, "mlp": MLP,
        "mlp.fc1": Linear, "mlp.fc2": Linear, "norm1": nn.LayerNorm, "norm2": nn.LayerNorm,
    },
    ResidualAttentionBlock: {
        "attn": PackedAttention, "attn.out_proj": Linear, "mlp": FeedForward,
        "mlp.c_fc": Linear, "mlp.c_proj": Linear, "ln_1": nn.LayerNorm, "ln_2": nn.LayerNorm,
    },
}  # fmt: skip


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(NO_GRADIENT)


def _normed(norm: nn.LayerNorm, x: Tensor, branch: Tensor | None) -> tuple[Tensor, ScaledRows]:
    """x plus a branch, and its LayerNorm in float8."""
    _refuse_gradient(x)
    return scaled_layer_norm(x, branch, norm.weight, norm.bias, norm.eps)


class QuantisedLinear(nn.Module):
    """A frozen linear layer in float8: [..., in] -> [..., out] in bfloat16.

    Buffers: ``weight`` [out, in] e4m3, ``weight_scale`` [out, 1] float32, ``bias`` [out] bfloat16.

    Args:
        weight: [out, in], multiples of 16; not kept.
        bias: [out] or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rows = scaled_rows(weight.detach())
        self.register_buffer("weight", rows.values)
        self.register_buffer("weight_scale", rows.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().to(_COMPUTE))

    def forward(self, x: Tensor | ScaledRows, add: Tensor | None = None) -> Tensor:
        """The product [..., out] of x [..., in], or its sum with ``add``."""
        product = self.part(x, slice(None))
        return product if add is None else add + product

    def part(self, x: Tensor | ScaledRows, rows: slice) -> Tensor:
        """x [..., in] -> the output channels ``rows`` of the product."""
        if isinstance(x, Tensor):
            _refuse_gradient(x)
            x = scaled_rows(x)
        weight = ScaledRows(self.weight, self.weight_scale)[rows]
        bias = None if self.bias is None else self.bias[rows]
        return scaled_product(x, weight, bias, _COMPUTE)


class QuantisedMLP(nn.Module):
    """Two linear layers in float8 around an activation, which is quantised in the same pass.

    Args:
        first, second: the layers in their precision.
        activation: ``"gelu"`` or ``"quick_gelu"``.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear, activation: str) -> None:
        super().__init__()
        self.fc1 = QuantisedLinear(first.weight, first.bias)
        self.fc2 = QuantisedLinear(second.weight, second.bias)
        self.activation = activation

    def forward(self, x: Tensor | ScaledRows, add: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D], plus ``add``."""
        return self.fc2(scaled_rows(self.fc1(x), self.activation), add=add)


class QuantisedSelfAttention(SelfAttention):
    """CAV-MAE's attention with its projections in float8; made from that in another precision."""

    def __init__(self, attention: SelfAttention) -> None:
        nn.Module.__init__(self)
        self.heads, self.scale = attention.heads, attention.scale
        for name in ("qkv", "proj"):
            linear = cast(nn.Linear, getattr(attention, name))
            setattr(self, name, QuantisedLinear(linear.weight, linear.bias))

    def forward(
        self, x: Tensor | ScaledRows, add: Tensor | None = None
    ) -> tuple[Tensor, QueriesAndKeys]:
        """As ``SelfAttention.forward``."""
        b, t, dim = (x if isinstance(x, Tensor) else x.values).shape
        qkv = self.qkv(cast(Tensor, x)).view(b, t, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, d], views of the packed product
        out = attend(q, k, v, self.scale).transpose(1, 2).reshape(b, t, dim)
        return self.proj(out, add=add), QueriesAndKeys(q, k, self.scale)


class QuantisedModalityBlock(ModalityBlock):
    """CAV-MAE's block in float8; made from one in another precision, LayerNorms are shared."""

    def __init__(self, block: ModalityBlock) -> None:
        nn.Module.__init__(self)
        for name, norm in block.named_children():
            if isinstance(norm, nn.LayerNorm):
                setattr(self, name, norm)
        self.attn = QuantisedSelfAttention(block.attn)
        self.mlp = cast(Any, QuantisedMLP(block.mlp.fc1, block.mlp.fc2, "gelu"))

    def forward(self, x: Tensor, modality: str = "") -> tuple[Tensor, QueriesAndKeys]:
        """As ``ModalityBlock.forward``."""
        x, branch, attention = self.advance(x, None, modality)
        return x + branch, attention

    def advance(
        self, x: Tensor, branch: Tensor | None, modality: str = ""
    ) -> tuple[Tensor, Tensor, QueriesAndKeys]:
        """Runs the block on x + branch but leaves the addition of what its MLP returns to the
        LayerNorm that follows. None: no branch waits.

        Returns:
            The residual stream and what is to be added to it, [B, T, D] each, and the queries and
            keys.
        """
        suffix = f"_{modality}" if modality else ""
        x, rows = _normed(getattr(self, f"norm1{suffix}"), x, branch)
        branch, attention = self.attn(cast(Tensor, rows))
        x, rows = _normed(getattr(self, f"norm2{suffix}"), x, branch)
        return x, self.mlp(cast(Tensor, rows)), attention


class QuantisedPackedAttention(PackedAttention):
    """CLIP's attention with its projections in float8; made from that in another precision."""

    def __init__(self, attention: PackedAttention) -> None:
        nn.Module.__init__(self)
        self.heads, self.scale = attention.heads, attention.scale
        self.in_proj = QuantisedLinear(attention.in_proj_weight, attention.in_proj_bias)
        out = attention.out_proj
        self.out_proj = cast(Any, QuantisedLinear(out.weight, out.bias))

    def project(self, x: Tensor | ScaledRows, which: str = "qkv") -> list[Tensor]:
        """As ``PackedAttention.project``."""
        dim, first = self.in_proj.in_features, "qkv".index(which)
        product = self.in_proj.part(x, slice(first * dim, (first + len(which)) * dim))
        return list(product.chunk(len(which), -1))


class QuantisedResidualAttentionBlock(ResidualAttentionBlock):
    """CLIP's block in float8; made from one in another precision, LayerNorms are shared."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        nn.Module.__init__(self)
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.attn = QuantisedPackedAttention(block.attn)
        mlp = block.mlp
        self.mlp = cast(Any, QuantisedMLP(mlp.c_fc, mlp.c_proj, mlp.activation))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """As ``ResidualAttentionBlock.forward``."""
        x, branch = self.advance(x, None, causal)
        return x + branch

    def advance(
        self, x: Tensor, branch: Tensor | None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As ``ResidualAttentionBlock.advance``."""
        x, rows = self.before_attention(x, branch)
        return self.after_attention(x, self.attn(cast(Tensor, rows), causal=causal))

    def before_attention(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Any]:
        """x + branch, [B, T, D] each, and its first LayerNorm in float8; None: no branch waits."""
        return _normed(self.ln_1, x, branch)

    def after_attention(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + branch, [B, T, D] each, the attention's output, and what the MLP returns, which is
        still to be added."""
        x, rows = _normed(self.ln_2, x, branch)
        return x, self.mlp(cast(Tensor, rows))


def unsuitable(block: nn.Module) -> str | None:
    """Why a block has no form in float8; None if it has one."""
    parts = _PARTS.get(type(block))
    if parts is None:
        return f"a block is a {type(block).__name__}, which has no form in float8"
    for path, kind in parts.items():
        part = block.get_submodule(path)
        if type(part) is not kind:
            return f"{path} of a block is a {type(part).__name__}, which has no form in float8"
    for module in block.modules():
        if any(vars(module).get(kind) for kind in CALLED):
            return f"a hook of {type(module).__name__} belongs to the model, float8 would skip it"
    for name, x in block.named_parameters():
        if x.ndim == 2 and any(size % MULTIPLE for size in x.shape):
            return (
                f"products in float8 need widths that are multiples of {MULTIPLE}, {name} of a "
                f"block is {list(x.shape)}"
            )
    return None


def quantised(block: nn.Module) -> nn.Module:
    """A frozen block's form in float8; of one for which ``unsuitable`` returned None."""
    with torch.no_grad():
        if isinstance(block, ModalityBlock):
            return QuantisedModalityBlock(block).eval()
        return QuantisedResidualAttentionBlock(cast(ResidualAttentionBlock, block)).eval()

"""RAda's head: a learned mask over the rational matrix of image and class features."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...files import check_weights
from ...ops.flat_attention import flat_attentions
from ..state_dicts import floating, named_tensors

_FIRST = "q_proj1.weight"
_ENDINGS = ("_proj1", "_proj2", "_proj3", "k_proj", "v_proj", "out_proj")


class RationalHead(nn.Module):
    """logit_k = scale * sum over d of mask[k, d] * f_d * h_kd, with f and h of unit length.

    The mask is relu(1 + attention), an attention of the K classes over each other for every image,
    on the rational matrix R[k, d] = f_d * h_kd; its last projection starts at 0, so that a fresh
    head gives the scores ``scale * f·h`` of the source model. Three kinds of queries share keys
    and values: of the image (one row for all classes: a row softmax), of the classes (the same
    rows for all images) and of R. Exact, and without a K x K tensor; R is stored once.

    Args:
        dim: D, the width of the features.
        heads: attention heads; must divide D.
        temperature: of the softmax.
        scale_multiplier: of the scale inside the attention (CoOp + RAda: 4).
        dtype: of the parameters; None: torch's default.

    Parameters: ``q_proj1``, ``q_proj2``, ``q_proj3``, ``k_proj``, ``v_proj``, ``out_proj``, Linear
    [D, D] with bias each, as in the official code, whose heads ``load_state_dict`` and
    ``from_checkpoint`` take; the ``alpha`` that they have besides computes nothing and is ignored.

    Source: Chen et al., "One Last Attention for Your Vision-Language Model", ICCV 2025, and its
    official code.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        temperature: float = 1.0,
        scale_multiplier: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: needed a positive integer")
        if dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}")
        for name, factor in (("temperature", temperature), ("scale_multiplier", scale_multiplier)):
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
                raise ValueError(f"{name}={factor!r}: needed a number above 0")
        self.dim, self.heads = dim, heads
        self.temperature, self.scale_multiplier = float(temperature), float(scale_multiplier)
        self.q_proj1, self.q_proj2, self.q_proj3 = (
            nn.Linear(dim, dim, dtype=dtype) for _ in range(3)
        )
        self.k_proj, self.v_proj = (nn.Linear(dim, dim, dtype=dtype) for _ in range(2))
        self.out_proj = nn.Linear(dim, dim, dtype=dtype)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_checkpoint(
        cls, path_or_state_dict: str | os.PathLike | Mapping[str, Tensor], **options: Any
    ) -> RationalHead:
        """The head of a file or state dict, official ones included; D follows from shapes.

        Names may carry any prefix, and other tensors may stand beside them.

        Args:
            path_or_state_dict: as ``CAVMAE.from_checkpoint`` takes it.
            options: ``heads``, ``temperature``, ``scale_multiplier``, which files do not hold.

        Raises:
            FileNotFoundError, TypeError, ValueError: no such file; it is damaged or holds code, no
                head or several, or tensors that are no finite floating point weights.
        """
        state, what = named_tensors(path_or_state_dict)
        prefixes = [name[: -len(_FIRST)] for name in state if name.endswith(_FIRST)]
        prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
        if len(prefixes) != 1:
            raise ValueError(
                f"{what}: needed one rational head, found {len(prefixes)} names that end in "
                f"{_FIRST} among {len(state)}: {', '.join(list(state)[:4])}"
            )
        (prefix,) = prefixes
        weights = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
        weights = {n: x for n, x in weights.items() if n.split(".")[0].endswith(_ENDINGS)}
        weights = floating(weights, what, copy=isinstance(path_or_state_dict, Mapping))
        first = weights[_FIRST]
        if first.ndim != 2 or not first.numel():
            raise ValueError(f"{what}: {prefix}{_FIRST} has shape {list(first.shape)}")
        head = cls(first.shape[0], **options).to(first.dtype)
        head.load_state_dict(weights)
        return head

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``nn.Module.load_state_dict``; an official head's unused ``alpha`` is ignored.

        Raises:
            ValueError: names are missing or unknown (unless ``strict`` is off), shapes are others,
                values are not finite; then nothing is changed.
        """
        state = {name: x for name, x in state_dict.items() if name != "alpha"}
        check_weights(state, "the state dict of a rational head")
        expected = self.state_dict()
        odd = sorted(state.keys() ^ expected.keys()) if strict else []
        odd += [n for n, x in state.items() if n in expected and x.shape != expected[n].shape]
        if odd:
            shapes = [f"{n} {list(state[n].shape)}" if n in state else f"no {n}" for n in odd[:6]]
            raise ValueError(
                f"this is not the state dict of a rational head of width {self.dim}: found "
                f"{', '.join(shapes)}"
            )
        return super().load_state_dict(state, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}alpha", None)  # of a head inside another module
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: float | Tensor,
        bias: float | Tensor | None = None,
        return_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, K], and with ``return_mask`` the mask [B, K, D].

        Args:
            image: [B, D], of any length.
            text: [K, D], of any length: class texts, prototypes or rows of a linear classifier.
            scale: exp(logit_scale) or 1 / temperature; inside the attention it is detached.
            bias: added to the logits (SigLIP).

        Raises:
            ValueError, TypeError: shapes or types do not fit, fewer than 2 classes, a feature
                without length (told on the CPU only; elsewhere it gives NaN).
        """
        rational, mask = self._masked(image, text, scale)
        logits = scale * (mask * rational).sum(dim=-1)
        if bias is not None:
            logits = logits + bias
        return (logits, mask) if return_mask else logits

    def deviation(
        self, image: Tensor, text: Tensor, scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the mask adds to the cosines, sum over d of (mask[k, d] - 1) * f_d * h_kd: [B, K],
        exactly 0 of a fresh head; and the mask. Arguments and errors as of ``forward``."""
        rational, mask = self._masked(image, text, scale)
        return ((mask - 1) * rational).sum(dim=-1), mask

    def _masked(self, image: Tensor, text: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """The rational matrix and its mask, [B, K, D] each."""
        self._check(image, text, scale)
        image = image / image.norm(dim=-1, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        rational = image.unsqueeze(1) * text  # [B, K, D]
        inner = scale.detach() if isinstance(scale, Tensor) else scale
        inner = inner * self.scale_multiplier
        k, v, q3 = (
            self._split(_scaled(proj, rational, inner))
            for proj in (self.k_proj, self.v_proj, self.q_proj3)
        )
        q1 = self._split(_scaled(self.q_proj1, image.unsqueeze(1), inner**0.5))  # [B, H, 1, d]
        q2 = self._split(_scaled(self.q_proj2, text.unsqueeze(0), inner**0.5))  # [1, H, K, d]
        factor = (self.dim // self.heads) ** -0.5 / self.temperature
        # queries that are alike for all rows: the flattened softmax is that of one row
        mean = ((factor * (q1 @ k.transpose(-2, -1))).softmax(dim=-1)) @ v
        attended = mean + flat_attentions((q2, q3), k, v, factor)
        out = self.out_proj((attended / 3).transpose(1, 2).flatten(2))
        return rational, F.relu(1 + out)

    def _split(self, x: Tensor) -> Tensor:
        """[B, K, D] -> [B, H, K, d], laid out so that no product needs a copy of its own."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()

    def _check(self, image: Tensor, text: Tensor, scale: float | Tensor) -> None:
        weight = self.out_proj.weight
        for name, x, layout in (("image", image, "[B, D]"), ("text", text, "[K, D]")):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor {layout}, found {type(x).__name__}")
            if x.ndim != 2 or x.shape[1] != self.dim or not len(x):
                raise ValueError(
                    f"{name} must be {layout} with D = {self.dim}, found {list(x.shape)}"
                )
            if x.dtype != weight.dtype or x.device != weight.device:
                raise TypeError(
                    f"{name} is {x.dtype} on {x.device}, the head {weight.dtype} on "
                    f"{weight.device}; convert one: {name}.to(head.out_proj.weight)"
                )
            if x.device.type == "cpu" and not x.detach().any(dim=1).all():
                row = int((~x.detach().any(dim=1)).nonzero()[0])
                raise ValueError(f"row {row} of {name} is zero: it has no direction to compare")
        if len(text) < 2:
            raise ValueError(f"text has {len(text)} class, needed at least 2 to tell apart")
        if isinstance(scale, Tensor) and scale.numel() != 1:
            raise ValueError(f"scale must be one number, found shape {list(scale.shape)}")
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not isinstance(scale, Tensor) and not (number and 0 < scale < float("inf")):
            raise ValueError(f"scale={scale!r}: needed a finite number above 0")


def _scaled(proj: nn.Linear, x: Tensor, factor: float | Tensor) -> Tensor:
    """proj(factor * x); the factor goes to the weight, so that x is not stored twice."""
    return F.linear(x, proj.weight * factor, proj.bias)


class FeatureAdapter(nn.Module):
    """x + relu(W2 relu(W1 x)), the adapter that RAda is combined with (CLIP-Adapter's form).

    Args:
        dim: D.
        reduction: D divided by the width between the two layers.
    """

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False), nn.ReLU(),
            nn.Linear(dim // reduction, dim, bias=False), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x + self.fc(x)

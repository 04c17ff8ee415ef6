"""What a method may ask of a model, and what the two exchange."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Slot(NamedTuple):
    """Where a tuned tensor lies: a parameter of the module, or rows [start, stop) of one."""

    parameter: str
    rows: tuple[int, int] | None = None


@runtime_checkable
class FusionModel(Protocol):
    """A model of several modalities that is cut into ``encode`` (frozen for some methods) and
    ``fuse``, whose attention runs over all modalities' tokens."""

    num_classes: int

    @property
    def spans(self) -> tuple[int, ...]:
        """Token counts of the fused sequence, one a modality."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, for messages."""

    def check_inputs(self, *inputs: Tensor) -> None:
        """Raises ValueError or TypeError, naming the input, if a batch cannot be used."""

    def encode(self, *inputs: Tensor) -> Tensor:
        """Inputs -> tokens [B, T, D]."""

    def fuse(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] -> logits [B, C]."""

    def fuse_attention(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Tokens -> logits [B, C] and (q [B,H,T,d], k [B,H,T,d], scale) of the fusion attention."""

    def tunable(self, group: str) -> dict[str, Slot]:
        """What can be tuned under a group's name ("norm", "fusion_qkv")."""

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in the weights' own), converting frozen weights."""

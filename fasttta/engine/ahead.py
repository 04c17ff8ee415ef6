"""The prediction of one step is the first pass of the next: the same batch at the same weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.base import joined
from ..protocols import FusionModel


class Ahead:
    """A model whose last prediction's fusion pass is kept, with what its backward needs, and given
    again when the next step asks for it. One of ``window`` forward passes of a step is saved.

    Whether it still holds is asked of the tensors themselves: reset, load and every other change
    in place counts their versions up.
    """

    def __init__(self, model: FusionModel, leaves: Sequence[Tensor]) -> None:
        self._model, self._leaves = model, leaves
        self._kept: list[tuple[Tensor, list[int], Any]] = []

    def predict(self, tokens: Tensor) -> Tensor:
        """Logits [B, C] of tokens, from passes that are kept."""
        self._kept = []
        for part in self._model.pieces(tokens):
            with torch.enable_grad():
                output = self._model.fuse_attention(part)
            self._kept.append((part, self._versions(part), output))
        return joined([output[0].detach() for _, _, output in self._kept])

    def fuse_attention(self, tokens: Tensor) -> Any:
        for i, (kept, versions, output) in enumerate(self._kept):
            # one storage, which cannot have been given away while it is held here
            if kept.data_ptr() == tokens.data_ptr() and kept.shape == tokens.shape:
                del self._kept[i]  # its graph is good for one backward
                if versions == self._versions(tokens):
                    return output
                break
        return self._model.fuse_attention(tokens)

    def _versions(self, tokens: Tensor) -> list[int]:
        return [x._version for x in (tokens, *self._leaves)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)

    def __deepcopy__(self, memo: dict) -> Ahead:
        return Ahead(copy.deepcopy(self._model, memo), copy.deepcopy(self._leaves, memo))

"""The prediction of one step is the first pass of the next: the same batch at the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Ahead:
    """A model whose last prediction's fusion pass is kept, with what its backward needs, and given
    again when the next step asks for it. One of ``window`` forward passes of a step is saved.

    Whether it still holds is asked of the tensors themselves: reset, load and every other change
    in place counts their versions up.
    """

    def __init__(self, model: nn.Module, leaves: list[Tensor]) -> None:
        self._model, self._leaves = model, leaves
        self._kept: tuple[Tensor, list[int], Any] | None = None

    def predict(self, tokens: Tensor) -> Tensor:
        """Logits [B, C] of tokens, from a pass that is kept."""
        with torch.enable_grad():
            output = self._model.fuse_attention(tokens)
        self._kept = tokens, self._versions(tokens), output
        return output[0].detach()

    def fuse_attention(self, tokens: Tensor) -> Any:
        if self._kept is not None:
            kept, versions, output = self._kept
            # one storage, which cannot have been given away while it is held here
            if kept.data_ptr() == tokens.data_ptr() and kept.shape == tokens.shape:
                self._kept = None  # its graph is good for one backward
                if versions == self._versions(tokens):
                    return output
        return self._model.fuse_attention(tokens)

    def _versions(self, tokens: Tensor) -> list[int]:
        return [x._version for x in (tokens, *self._leaves)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __deepcopy__(self, memo: dict) -> Ahead:
        return Ahead(copy.deepcopy(self._model, memo), copy.deepcopy(self._leaves, memo))

"""Tuned tensors and optimiser back at their start, decided on the device, in a few launches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Recovery:
    """Puts tensors back where a flag on the device is true, all tensors of one type together.

    A model has hundreds of norms, and each tensor of its own takes three launches. So the tensors
    are concatenated, chosen from, and copied back by one multi-tensor copy. The values at the start
    lie in tensors whose addresses are fixed: captured steps read them there.
    """

    def __init__(self, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
        # those with a start, and those that start at 0, each by type
        self._groups: dict[tuple[bool, torch.dtype], list[str]] = {}
        for name, x in tensors.items():
            self._groups.setdefault((name in start, x.dtype), []).append(name)
        self._begin = {
            dtype: _joined(start, names) for (has, dtype), names in self._groups.items() if has
        }

    def start_at(self, start: Mapping[str, Tensor]) -> None:
        """Other values at the start, by the same names."""
        for (has, dtype), names in self._groups.items():
            if has:
                self._begin[dtype].copy_(_joined(start, names))

    def recover(self, flag: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Writes the start, or zeros, to tensors where a 0-d bool tensor is true. What they hold
        then, infinity and NaN included, does not matter."""
        for (has, dtype), names in self._groups.items():
            values = _joined(tensors, names)
            if has:
                values = torch.where(flag, self._begin[dtype], values)
            else:
                values.masked_fill_(flag, 0)
            targets = [tensors[name] for name in names]
            parts = values.split([x.numel() for x in targets])
            torch._foreach_copy_(
                targets, [part.view(x.shape) for part, x in zip(parts, targets, strict=True)]
            )


def _joined(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in names])

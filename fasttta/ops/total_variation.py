"""Total variation of maps and the ensemble it weighs. The default implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .reference import wide


def total_variation(maps: Tensor) -> Tensor:
    return reference.total_variation(maps)


def total_variation_backward(grad: Tensor, maps: Tensor) -> Tensor:
    x = wide(maps)
    found = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for dim in (1, 2):
        count = x.shape[dim] - 1
        if count > 0:
            slope = x.diff(dim=dim).sign_()  # 0 at ties
            found.narrow(dim, 1, count).add_(slope)
            found.narrow(dim, 0, count).sub_(slope)
    return found.mul_(grad[:, None, None]).to(maps.dtype)


def reliability_ensemble(
    maps: Tensor, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.reliability_ensemble(maps, logits, temperature)

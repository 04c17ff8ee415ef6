"""What a saved state is a delta of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..protocols import FusionModel
from .record import tensor_bytes


class HasSource(Protocol):
    """A state, or what stands for one that tunes nothing."""

    source: dict[str, Tensor]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()[:16]


def model_digest(model: nn.Module | FusionModel) -> str:
    """Names, shapes and a sample of the values of a whole model (every tensor gives up to 512
    values, so that 660 MB need not be read)."""
    whole = hashlib.sha256(getattr(model, "identity", str)().encode())
    for name, x in sorted(model.state_dict().items()):
        flat = x.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 512)][:512].double().cpu()
        whole.update(f"{name} {list(x.shape)}".encode() + sample.numpy().tobytes())
    return whole.hexdigest()[:16]


def fingerprint(model: nn.Module | FusionModel, state: HasSource) -> dict[str, Any]:
    """What a state was made for: the model, and all source values of what is tuned."""
    return {
        "model": model_digest(model),
        "source": {name: _digest(x) for name, x in state.source.items()},
    }


def check_fingerprint(
    saved: Mapping[str, Any], model: nn.Module | FusionModel, state: HasSource
) -> None:
    """Raises ValueError if the state was saved for another model."""
    own = fingerprint(model, state)
    names = sorted(own["source"].keys() | saved["source"].keys())
    odd = [name for name in names if own["source"].get(name) != saved["source"].get(name)]
    if odd or own["model"] != saved["model"]:
        what = "its frozen weights or its ModelSpec differ"
        if odd:
            what = f"source values differ: {', '.join(odd[:3])}"
        raise ValueError(f"the state was saved for another model or precision: {what}")

"""What a saved state is a delta of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from ..protocols import FusionModel, VisionLanguageModel
from .record import tensor_bytes


class HasSource(Protocol):
    """A state, or what stands for one that tunes nothing."""

    source: dict[str, Tensor]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()[:16]


def model_digest(model: FusionModel | VisionLanguageModel) -> str:
    """Digest of the names, the shapes and up to 512 values of every tensor of a model, so that
    660 MB need not be read."""
    whole = hashlib.sha256(model.identity().encode())
    for name, x in sorted(model.state_dict().items()):
        flat = x.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 512)][:512].double().cpu()
        whole.update(f"{name} {list(x.shape)}".encode() + sample.numpy().tobytes())
    return whole.hexdigest()[:16]


def fingerprint(model: FusionModel | VisionLanguageModel, state: HasSource) -> dict[str, Any]:
    """What a state was made for: the model, and all source values of what is tuned."""
    return {
        "model": model_digest(model),
        "source": {name: _digest(x) for name, x in state.source.items()},
    }


def check_fingerprint(
    saved: Mapping[str, Any], model: FusionModel | VisionLanguageModel, state: HasSource
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

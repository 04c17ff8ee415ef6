"""The state of an adapted model at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that adaptation changes. Nothing in it is ever written to, so that a state
    changes by one assignment of another snapshot, and an interrupt leaves the old or the new one.

    Attributes:
        written: what steps write to in place, as it was: ``"tuned.NAME"``, ``"adam.KIND.NAME"``.
        method: tensors the method carries from batch to batch.
        start: the tuned parameters that every episode begins with.
        constants: tensors the method fixed at the start.
        random: the generator's state.
        guard: values of the last batches by the name of what the guard watches.
    """

    written: Mapping[str, Tensor]
    method: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    random: Tensor
    guard: Mapping[str, tuple[float, ...]]

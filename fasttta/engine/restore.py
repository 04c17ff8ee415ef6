"""A state from a file: every tensor is checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Method
from ..protocols import FusionModel
from .precision import Precision
from .snapshot import Snapshot
from .state import State

_ADAM_STEPS = 2**24  # float32 counts no further


def restored(
    state: State,
    tensors: Mapping[str, Tensor],
    guard: Mapping[str, tuple[float, ...]],
    method: Method,
    model: FusionModel,
    precision: Precision,
) -> Snapshot:
    """The snapshot that ``State.tensors`` wrote. The state is not changed.

    Args:
        model: as it was recognised, without what the method adds to it.

    Raises:
        ValueError: a tensor is missing, of another model or method, or holds what no state can.
    """
    groups: dict[str, dict[str, Tensor]] = {"method": {}, "constant": {}}
    fixed: dict[str, Tensor] = {}
    for name, x in tensors.items():
        kind, _, rest = name.partition(".")
        place, key = (groups[kind], rest) if kind in groups else (fixed, name)
        place[key] = x
    first = state.first
    needed = {**first.written, "random": first.random}
    if state.episodic:
        needed |= {f"start.{name}": x for name, x in first.start.items()}
    if odd := sorted(fixed.keys() ^ needed.keys()):
        raise ValueError(f"the saved state is of another model or method: {', '.join(odd[:3])}")
    for name, x in needed.items():
        if fixed[name].shape != x.shape or fixed[name].dtype != x.dtype:
            raise ValueError(f"{name} was saved as {_describe(fixed[name])}, needed {_describe(x)}")
    for name, x in tensors.items():
        _check_values(name, x)
    _check_random(fixed["random"])
    leaf = next(iter(state.leaves.values()), next(model.parameters()))
    device, master = leaf.device, precision.master
    # what a method says nothing of may be of any type
    described = (
        type(method).check_saved is not Method.check_saved
        or type(method).blank_state is not Method.blank_state
    )
    for name, x in groups["constant"].items():
        if x.dtype != master:
            raise ValueError(f"constant.{name} is {_describe(x)}, needed {master}")
    for name, x in groups["method"].items():
        if described and x.is_floating_point() and x.dtype != master:
            raise ValueError(f"method.{name} is {_describe(x)}, needed {master}")
    method.check_saved(model, groups["constant"], groups["method"])
    with torch.inference_mode(False), torch.no_grad():

        def own(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.detach().to(device, copy=True) for name, x in values.items()}

        start = {n: fixed[f"start.{n}"] for n in first.start} if state.episodic else {}
        written = {
            name: fixed[name].detach().to(x.device, copy=True) for name, x in first.written.items()
        }
        kept = {name: x.cpu() for name, x in groups["method"].items() if name == "place"}
        return Snapshot(
            written=written,
            method=own(groups["method"]) | kept,
            start=own(start) if state.episodic else first.start,
            constants=own(groups["constant"]),
            random=fixed["random"].detach().to("cpu", copy=True),
            guard=guard,
        )


def _check_values(name: str, x: Tensor) -> None:
    if (x.is_floating_point() or x.is_complex()) and not torch.isfinite(x).all():
        raise ValueError(f"{name} holds non-finite values")
    kind = name.split(".")[1] if name.startswith("adam.") else ""
    if kind == "exp_avg_sq" and (x < 0).any():
        raise ValueError(f"{name} holds values below 0, needed squares")
    if kind == "step" and not (0 <= float(x) <= _ADAM_STEPS and float(x).is_integer()):
        raise ValueError(f"{name} is {float(x)}, needed a count of steps")


def _check_random(x: Tensor) -> None:
    """Whether a generator can go on from it."""
    trial = torch.Generator()
    try:
        trial.set_state(x.cpu())
        torch.rand(1, generator=trial)
    except (RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"random is no state of a generator: {reason}") from error


def _describe(tensor: Tensor) -> Any:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

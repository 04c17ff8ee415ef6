"""The only owner of what adaptation changes: tuned tensors, optimiser, method and random state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Method, runs_episodes, updates_tensors
from ..methods.special_bases import StatefulMethod, check_saved
from ..protocols import FusionModel, Slot
from .precision import Precision

_ADAM_STEPS = 2**24  # float32 represents no larger consecutive integers


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that adaptation changes. Nothing in it is ever written to, so that a state
    changes by one assignment of another snapshot, and an interrupt leaves the old or the new one.

    Attributes:
        written: copies of what steps write to in place: ``"tuned.NAME"``, ``"adam.KIND.NAME"``.
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


class State:
    """Tuned tensors, optimiser moments, method state and random state of one adapted model.

    ``current`` is the state: an immutable snapshot, replaced by one assignment. Steps run on the
    attributes below, whose addresses are fixed, as captured steps need it. ``sync`` copies
    ``current`` into them; a step changes them, and ``commit`` makes the result ``current``. An
    interrupted step leaves ``current`` as it was, and the next ``sync`` undoes what the step had
    done.

    Attributes:
        leaves: the tuned parameters by their name in the module.
        slots: tuned name -> parameter, or rows of one.
        method: tensors the method carries from batch to batch; replaced, never written to.
        constants: tensors the method fixed at the start.
        source: the tuned parameters as ``adapt`` made them; start: those with which every episode
            begins.
        generator: on the CPU, seeded.
    """

    def __init__(
        self,
        leaves: dict[str, nn.Parameter],
        slots: Mapping[str, Slot],
        method: Method,
        constants: dict[str, Tensor],
        seed: int,
    ) -> None:
        self.leaves, self.slots = leaves, dict(slots)
        self.constants: Mapping[str, Tensor] = constants
        self.source = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        self.start: Mapping[str, Tensor] = self.source  # of every episode
        self.method: Mapping[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.episodic, self.updates = runs_episodes(method), updates_tensors(method)
        self.optimizer = method.optimizer(leaves.values()) if leaves else None
        if self.optimizer is not None:
            # it warns of one optimiser that runs both in and out of a capture, which is intended
            # here
            self.optimizer._warned_capturable_if_run_uncaptured = True
        for leaf in leaves.values():
            # Adam's first step would make the same; made here, a state can be saved, restored and
            # reset before any step
            assert self.optimizer is not None
            self.optimizer.state[leaf] = {
                "step": torch.zeros((), dtype=torch.float32, device=leaf.device),
                "exp_avg": torch.zeros_like(leaf),
                "exp_avg_sq": torch.zeros_like(leaf),
            }
        self._recovery: Recovery | None = None  # made by the first step that may need it
        self._begins: Mapping[str, Tensor] | None = None  # the start that it holds
        self.first = self.current = self._captured({}, _copies(self._written()))
        self._live: Snapshot | None = self.first  # held by the tensors above; None: unknown

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by parameter name -> views of them by tuned name."""
        views = {}
        for name, slot in self.slots.items():
            tensor = tensors[slot.parameter]
            views[name] = tensor if slot.rows is None else tensor[slot.rows[0] : slot.rows[1]]
        return views

    def parameters(self) -> dict[str, Tensor]:
        """The tuned parameters of ``current`` by their name in the module, not to be written to."""
        return {name: self.current.written[f"tuned.{name}"] for name in self.leaves}

    def tuned(self) -> dict[str, Tensor]:
        """Copies of the tuned tensors by name."""
        return {name: view.clone() for name, view in self.named(self.parameters()).items()}

    def with_tuned(self, values: Mapping[str, Tensor]) -> Snapshot:
        """The state with other values of some or all tuned tensors, which ``checked_value`` made.
        Nothing is changed yet."""
        # episodes: the other tensors must not keep the result of the last episode
        begin = self.current.start if self.episodic else self.parameters()
        with torch.inference_mode(False), torch.no_grad():
            tuned = {name: begin[name].clone() for name in self.leaves}
            for name, view in self.named(tuned).items():
                if name in values:
                    view.copy_(values[name])
        written = {f"tuned.{name}": x for name, x in tuned.items()}
        return replace(
            self.current,
            written={**self.current.written, **written},
            # the next episode begins with them
            start=tuned if self.episodic else self.current.start,
        )

    def _written(self) -> dict[str, Tensor]:
        """Everything that a step writes to in place."""
        tensors = {f"tuned.{name}": leaf.detach() for name, leaf in self.leaves.items()}
        for name, leaf in self.leaves.items():
            assert self.optimizer is not None
            for kind, value in self.optimizer.state[leaf].items():
                tensors[f"adam.{kind}.{name}"] = value
        return tensors

    def _captured(
        self, guard: Mapping[str, tuple[float, ...]], written: Mapping[str, Tensor]
    ) -> Snapshot:
        return Snapshot(
            written, self.method, self.start, self.constants, self.generator.get_state(), guard
        )

    def sync(self) -> None:
        """Copies ``current`` into the tensors that steps run on, unless they hold it."""
        wanted = self.current
        if self._live is wanted:
            return
        self._live = None
        with torch.inference_mode(False), torch.no_grad():
            _write(self._written(), wanted.written)
            self.start = wanted.start
            if self._recovery is not None and self._begins is not self.start:
                self._begins = None  # until all is written: an interrupted sync is repeated
                self._recovery.start_at(self._starts())
                self._begins = self.start
        self.method, self.constants = wanted.method, wanted.constants
        self.generator.set_state(wanted.random)
        self._live = wanted

    def begin(self) -> None:
        """Marks the tensors as possibly newer than ``current``, until ``commit`` or ``sync``."""
        self.sync()
        self._live = None

    def commit(self, guard: Mapping[str, tuple[float, ...]]) -> None:
        """Makes the values that a step has left in the tensors the state."""
        written = self.current.written
        if self.updates:
            with torch.inference_mode(False), torch.no_grad():
                written = _copies(self._written())
        snapshot = self._captured(guard, written)
        self.current = snapshot
        self._live = snapshot

    def publish(self, snapshot: Snapshot) -> None:
        """Makes a snapshot the state."""
        self.current = snapshot
        self.sync()

    def reset(self) -> None:
        """The state at the start, bit for bit."""
        self.publish(self.fresh())

    def fresh(self) -> Snapshot:
        """The state at the start; constants are those that are current."""
        return replace(self.first, constants=self.current.constants)

    def journal(self) -> Callable[[], None]:
        """Copies the tensors within a step; the function that it returns restores them."""
        saved = _copies(self._written())
        method, random = self.method, self.generator.get_state()

        def restore() -> None:
            with torch.inference_mode(False), torch.no_grad():
                _write(self._written(), saved)
            self.method = method
            self.generator.set_state(random)

        return restore

    def recover(self, flag: Tensor) -> None:
        """Tuned tensors and optimiser at an episode's start where a 0-d flag is true; decided on
        the device."""
        with torch.no_grad():
            written = self._written()
            if self._recovery is None:
                self._recovery, self._begins = Recovery(written, self._starts()), self.start
            self._recovery.recover(flag, written)

    def _starts(self) -> dict[str, Tensor]:
        return {f"tuned.{name}": x for name, x in self.start.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later session needs to go on, by name: copies on the CPU."""
        now = self.current
        tensors = {**now.written, "random": now.random}
        tensors |= {f"method.{name}": value for name, value in now.method.items()}
        tensors |= {f"constant.{name}": value for name, value in now.constants.items()}
        if self.episodic:
            tensors |= {f"start.{name}": value for name, value in now.start.items()}
        # on a CPU `.cpu()` alone would return the memory of the state
        layout = torch.contiguous_format
        return {
            name: tensor.detach().to("cpu", copy=True, memory_format=layout)
            for name, tensor in tensors.items()
        }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies by name; on a GPU in a few launches for all."""
    copies = {name: torch.empty_like(x) for name, x in tensors.items()}
    with torch.no_grad():
        _write(copies, tensors)
    return copies


def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies values into tensors of the same names; on a GPU in a few launches for all."""
    if tensors:
        torch._foreach_copy_([*tensors.values()], [values[name] for name in tensors])


def checked_value(name: str, value: object, like: Tensor) -> Tensor:
    """A value for a tuned tensor, in its type and on its device.

    Raises:
        TypeError, ValueError: not a floating point tensor of its shape with finite values.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating point tensor, found {kind}")
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, needed {tuple(like.shape)}")
    if value.device.type == "meta":
        raise ValueError(f"{name} is on meta: it holds no values")
    ready = value.detach().to(like)
    if not torch.isfinite(ready).all():
        raise ValueError(f"{name} holds non-finite values")
    return ready


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
        precision: in which steps run.

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
    device = leaf.device
    for name, x in groups["constant"].items():
        if x.dtype != precision.master:
            raise ValueError(f"constant.{name} is {_describe(x)}, needed {precision.master}")
    for name, x in groups["method"].items():
        # what a method says nothing of may be of any type
        if not (isinstance(method, StatefulMethod) and x.is_floating_point()):
            continue
        # encoders that end with a product return tokens as it computes them
        tokens = name.startswith("queue.") and x.dtype == precision.compute
        if x.dtype != precision.master and not tokens:
            raise ValueError(f"method.{name} is {_describe(x)}, needed {precision.master}")
    check_saved(method, model, groups["constant"], groups["method"])
    with torch.inference_mode(False), torch.no_grad():

        def copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.detach().to(device, copy=True) for name, x in values.items()}

        start = {n: fixed[f"start.{n}"] for n in first.start} if state.episodic else {}
        written = {
            name: fixed[name].detach().to(x.device, copy=True) for name, x in first.written.items()
        }
        kept = {name: x.cpu() for name, x in groups["method"].items() if name == "place"}
        return Snapshot(
            written=written,
            method=copied(groups["method"]) | kept,
            start=copied(start) if state.episodic else first.start,
            constants=copied(groups["constant"]),
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

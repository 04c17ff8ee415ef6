"""How an adapted model is saved, loaded into, copied and taken back to an earlier state."""

from __future__ import annotations

import abc
import contextlib
import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import __version__
from ..engine import folder as saves
from ..engine import record as records
from ..methods import registry
from ..methods.base import Method
from ..methods.options import option_names

METADATA = "metadata"  # of a state_dict: the record as bytes


class Checkpoint:
    """A state of one adapted model, kept in memory: for ``rollback``. Later steps do not change
    it."""

    __slots__ = ("_owner", "_state")

    def __init__(self, owner: object, state: Any) -> None:
        self._owner, self._state = owner, state

    def __repr__(self) -> str:
        return "<state of an adapted model, for its rollback>"


class Saved(nn.Module, abc.ABC):
    """A module whose state is one immutable object, which can be saved and put back.

    Attributes:
        method, precision: names; options: the method object; seed, engine: arguments of ``adapt``.
    """

    method: str
    precision: str
    options: Method
    seed: int
    engine: str
    #: the user's module, the copy that calls run, the extended model
    _hidden: tuple[nn.Module, nn.Module, nn.Module | None]
    _lock: Callable[[], contextlib.AbstractContextManager[None]]
    _owner: object  #: marks the checkpoints of this object; a copy gets another one
    _watch: Any
    _spec: Any = None
    _remake: Callable[..., Any]  #: rebuilds this object; ``made_by`` sets it
    _asked: str  #: the engine as ``adapt`` got it

    @abc.abstractmethod
    def _state_now(self) -> Any:
        """The state, immutable."""

    @abc.abstractmethod
    def _publish(self, state: Any) -> None:
        """Sets the state to one that ``_state_now`` or ``_state_of`` returned."""

    @abc.abstractmethod
    def _state_of(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """A state from a record and tensors, everything checked; changes nothing.

        Raises:
            ValueError: it is another model's, or damaged.
        """

    @abc.abstractmethod
    def _saved(self) -> dict[str, Tensor]:
        """The state's tensors by name: copies on the CPU."""

    @abc.abstractmethod
    def _base(self) -> dict[str, Any]:
        """Fingerprint of the model that the state belongs to."""

    def _guard_record(self) -> dict[str, Any] | None:
        return None

    def checkpoint(self) -> Checkpoint:
        """The state as it is now, in memory; ``rollback`` goes back to it, bit for bit: tuned
        tensors, optimiser, method state, guard and random state."""
        with self._lock():
            return Checkpoint(self._owner, self._state_now())

    def rollback(self, handle: Checkpoint) -> None:
        """Returns to the state that ``checkpoint`` kept. A handle may be used many times.

        Raises:
            TypeError: it is no checkpoint.
            ValueError: it is of another adapted model.
        """
        with self._lock():
            if not isinstance(handle, Checkpoint):
                raise TypeError(
                    f"handle must come from checkpoint(), found {type(handle).__name__}"
                )
            if handle._owner is not self._owner:
                raise ValueError(
                    "handle is of another adapted model; to carry a state over use state_dict() "
                    "and load_state_dict()"
                )
            self._publish(handle._state)

    def _record(self) -> dict[str, Any]:
        cls, guard = type(self.options), self._guard_record()
        path = {} if registry.is_registered(cls) else {"class": registry.path_of(cls)}
        return {
            "method": self.method,
            **path,
            "options": {n: getattr(self.options, n) for n in option_names(cls)},
            "precision": self.precision,
            "seed": self.seed,
            "base": self._base(),
            **({} if guard is None else {"guard": guard}),
        }

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """All that ``save`` writes: tensors on the CPU, and the record as bytes."""
        with self._lock():
            tensors = self._saved()
            text = records.written({**self._record(), "sha256": records.tensors_digest(tensors)})
            tensors[METADATA] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            destination.update({prefix + name: x for name, x in tensors.items()})

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes the complete state or nothing, whatever ``strict`` says.

        Raises:
            ValueError: a tensor or the metadata is missing, damaged or of another model or method.
        """
        with self._lock():
            ours = {
                n.removeprefix(prefix): x for n, x in state_dict.items() if n.startswith(prefix)
            }
            with saves.naming("state_dict"):
                record, tensors = _unpacked(ours)
                self._check_same(record)
                state = self._state_of(record, tensors)
            self._publish(state)

    def _check_same(self, record: Mapping[str, Any]) -> None:
        """Raises ValueError if a state was made with other settings than this object's."""
        pairs = [_named_settings(x) for x in (records.as_read(self._record()), record)]
        for name in [*pairs[0], *(name for name in pairs[1] if name not in pairs[0])]:
            ours, theirs = (pair.get(name) for pair in pairs)
            if ours != theirs:
                raise ValueError(
                    f"{name}: it was saved with {theirs!r:.80}, this one has {ours!r:.80}; make it "
                    "with the same settings, or read a save of it with fasttta.load"
                )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what ``fasttta.load(model, folder)`` needs: the delta, not the model.

        ``fasttta.json`` (method, options, fingerprint of the model) and a safetensors file with
        tuned tensors, optimiser and method state. An existing save in the folder stays complete
        until the new one is; other processes may save and load there at the same time.

        Raises:
            ValueError: an option of the method has no place in JSON.
            OSError: the folder cannot be written to.
        """
        with self._lock():
            saves.write(folder, self._record(), self._saved())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self._lock():
            with torch.inference_mode(False):
                new = memo[id(self)] = self.__class__.__new__(self.__class__)
                new.__dict__ = copy.deepcopy(self.__dict__, memo)
            return new

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the wrapped model and the state, from which unpickling rebuilds this object."""
        with self._lock():
            record = {**self._record(), "training": self.training, "verify_model": self._watch.mode}
            origin = self._hidden[0], self._spec, self.options, self._asked
            return self._remake, (*origin, record, self._saved())


def _named_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of how its object was made, by name."""
    named = {name: record.get(name) for name in ("method", "class", "precision", "seed")}
    guard = (
        {n: x for n, x in record["guard"].items() if n != "values"} if "guard" in record else None
    )
    options = {f"options.{name}": value for name, value in record["options"].items()}
    return {**named, "guard": guard, **options}


def _unpacked(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of a state_dict."""
    for name, x in state.items():
        if not isinstance(x, Tensor) or x.device.type == "meta" or x.layout != torch.strided:
            raise ValueError(f"{name}: needed a tensor with values, found {type(x).__name__}")
    if METADATA not in state:
        raise ValueError(
            f"{METADATA} is missing: is it the state_dict of an adapted model? found "
            f"{', '.join(list(state)[:3]) or 'nothing'}"
        )
    tensors = {name: x.detach().cpu() for name, x in state.items() if name != METADATA}
    packed = state[METADATA]
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"{METADATA}: needed bytes, found {packed.dtype} {list(packed.shape)}")
    record = records.read(records.tensor_bytes(packed))
    if records.tensors_digest(tensors) != record["sha256"]:
        raise ValueError("is damaged: the tensors are not those that were saved together")
    return record, tensors


def recorded_method(
    record: Mapping[str, Any], folder: str | os.PathLike[str], cls: type[Method] | None
) -> Method:
    """The method of a record, of a class that is passed or registered."""
    path = record.get("class")
    if cls is None and path is not None:
        cls = registry.registered_at(record["method"], path)
        if cls is None:
            short = path.rpartition(".")[2]
            raise ValueError(
                f"class: the method is {path}, which load does not import; pass the class: "
                f"fasttta.load(model, {os.fspath(folder)!r}, method={path}) after importing "
                f"{short}, or register it"
            )
    if cls is None:
        cls = registry.by_name(record["method"])
    if cls.name != record["method"]:
        raise ValueError(
            f"method: it was saved with {record['method']!r}, method={cls.__name__} is {cls.name!r}"
        )
    missing = [name for name in option_names(cls) if name not in record["options"]]
    if missing and record["fasttta"] == __version__:  # another version may have fewer options
        raise ValueError(f"options.{missing[0]} is missing")
    try:
        return cls(**{name: _tuples(value) for name, value in record["options"].items()})
    except Exception as error:  # checks of a method may raise anything
        raise ValueError(f"options: {error}") from error


def _tuples(value: Any) -> Any:
    """An option from JSON with tuples in place of lists: JSON has no tuples, frozen options no
    lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

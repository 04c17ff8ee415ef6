"""What a module returns: the tensors in tuples, lists, dicts, dataclasses and ModelOutputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for f in dataclasses.fields(tree):
            yield from tensors(getattr(tree, f.name))


def rebuilt(tree: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """The same structure, of the same types, with every tensor (or what is of ``kind``) changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, Mapping):
        # a ModelOutput stays one: its items and attributes are one
        new: Any = copy.copy(tree)
        for key, value in tree.items():
            new[key] = rebuilt(value, change, kind)
        return new
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(rebuilt(value, change, kind) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(rebuilt(value, change, kind) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        twin: Any = copy.copy(tree)
        for f in dataclasses.fields(tree):
            object.__setattr__(twin, f.name, rebuilt(getattr(tree, f.name), change, kind))
        return twin
    return tree


def described(tree: Any) -> str:
    """What a module returned, for messages: ``(Tensor[4, 7], None)``."""
    if isinstance(tree, Tensor):
        return f"Tensor{list(tree.shape)}"
    if isinstance(tree, Mapping):
        inner = ", ".join(f"{key}: {described(value)}" for key, value in tree.items())
        return f"{type(tree).__name__}({inner})"
    if isinstance(tree, (tuple, list)):
        return f"{type(tree).__name__}({', '.join(map(described, tree))})"
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        inner = ", ".join(f"{f.name}: {described(getattr(tree, f.name))}"
                          for f in dataclasses.fields(tree))  # fmt: skip
        return f"{type(tree).__name__}({inner})"
    return "None" if tree is None else type(tree).__name__


def logits_in(output: Any, where: str | int | Callable[[Any], Any] | None) -> Tensor:
    """The logits [B, C] in what a module returned.

    Args:
        where: as ``ModelSpec.logits``: a key or attribute, an index, a function; None: the tensor
            itself, ``.logits``, or the first element.

    Raises:
        ValueError: there is nothing there, or no [B, C] of floating point.
    """
    try:
        if callable(where):
            logits = where(output)
        elif isinstance(where, str):
            keyed = isinstance(output, dict) and where in output
            logits = output[where] if keyed else getattr(output, where)
        elif where is not None:
            logits = output[where]
        elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
            logits = output[0]
        elif isinstance(output, dict) and "logits" in output:
            logits = output["logits"]
        else:
            logits = getattr(output, "logits", output)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"logits={where!r} does not fit what the model returns, {described(output)}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"needed logits [B, C], found {described(logits)} in {described(output)}; say "
            'where they are: ModelSpec(..., logits="key"), an index, or a function of it'
        )
    return logits


def alike(a: Any, b: Any) -> bool:
    """Whether two results are the same but for the values and shapes of their tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == b.ndim
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(alike, a, b))
    if dataclasses.is_dataclass(a):
        return all(alike(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return isinstance(a, (type(None), bool, int, float, str)) and a == b

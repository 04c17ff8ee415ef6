"""State dicts out of files and out of what training scripts wrap around them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import check_weights, plain_name, read_file
from ..files.inert_pickle import Unreadable

# keys under which training scripts save a state dict, beside epochs, optimisers and arguments
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module", "model_state")


def listed(state: Mapping[str, Any]) -> str:
    """How many keys a state dict has, and the first of them."""
    keys = "1 key" if len(state) == 1 else f"{len(state)} keys"
    return f"{keys}: {', '.join(list(state)[:4])}{', ...' if len(state) > 4 else ''}"


def unwrapped(state: Any) -> Any:
    """The state dict in what a training script saved, which may lie a few names deep."""
    for _ in range(8):
        if not isinstance(state, Mapping):
            return state
        inner = next((state[n] for n in _WRAPPERS if isinstance(state.get(n), Mapping)), None)
        if inner is None:
            return state
        state = inner
    return state


def named_tensors(
    source: str | os.PathLike | Mapping[str, Tensor], ignored: re.Pattern[str] | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file or state dict by plain names, and a name of the source for messages.

    Args:
        source: a file, or a state dict.
        ignored: names of tensors that are left out, whatever they hold.

    Raises:
        FileNotFoundError, TypeError, ValueError: no such file; it holds something else than named
            floating point tensors; two of them have the same plain name.
    """
    state: Any = source
    what = "the state dict"
    if not isinstance(source, Mapping):
        state, what = read_file(source), repr(os.fspath(source))
    state = unwrapped(state)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{what} holds an object of type {type(state).__name__}, needed a state dict of named "
            "tensors"
        )
    alien = [
        str(name)[:80]
        for name, x in state.items()
        if not (isinstance(name, str) and isinstance(x, (Tensor, Unreadable)))
    ]
    if alien or not state:
        names = ", ".join(alien[:6]) or "nothing"
        raise ValueError(f"{what}: needed a state dict of named tensors, found {names}")
    plain: dict[str, Tensor] = {}
    originals: dict[str, str] = {}
    for name, x in state.items():
        short = plain_name(name)
        if ignored is not None and ignored.fullmatch(short):
            continue
        if short in plain:
            raise ValueError(f"{what}: {originals[short]} and {name} are both {short}")
        plain[short], originals[short] = x, name
    return plain, what


def floating(state: Mapping[str, Tensor], what: str, *, copy: bool) -> dict[str, Tensor]:
    """Checked weights, all of one type: float64 if any is, else float32.

    Args:
        what: a name of the source, for messages.
        copy: copy all of them, and not only those that share their memory with another one.

    Raises:
        ValueError: one is no finite floating point tensor.
    """
    check_weights(state, what)
    double = any(x.dtype == torch.float64 for x in state.values())
    dtype = torch.float64 if double else torch.float32
    users: dict[int, int] = {}
    for x in state.values():
        pointer = x.untyped_storage().data_ptr()
        users[pointer] = users.get(pointer, 0) + 1
    with torch.inference_mode(False):
        return {
            name: x.detach()
            .to(dtype, copy=copy or users[x.untyped_storage().data_ptr()] > 1)
            .resolve_neg()
            .contiguous()
            for name, x in state.items()
        }


def check_ranks(state: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """Raises ValueError if a tensor that decides sizes has other dimensions, or is empty."""
    for name, rank in ranks.items():
        if state[name].ndim != rank or not state[name].numel():
            needed = f"{rank} dimensions" if rank != 1 else "1 dimension"
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, needed {needed}, none of them 0"
            )


def count_blocks(state: Mapping[str, Tensor], prefix: str, least: int = 0) -> int:
    """How many blocks "prefix.0", "prefix.1", ... a state dict has.

    Raises:
        ValueError: a number is left out, or there are fewer than ``least``.
    """
    start = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    numbers = {int(match[1]) for match in map(start.match, state) if match}
    if len(numbers) < least or numbers != set(range(len(numbers))):
        raise ValueError(f"{prefix} are not numbered 0, 1, ...: found {sorted(numbers)}")
    return len(numbers)


def check_keys(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], kind: str) -> None:
    """Raises ValueError unless a state dict has a model's keys and shapes; all others are named.

    Args:
        state: the tensors.
        shapes: of the model's ``state_dict()``.
        kind: what the message calls it: "a CLIP checkpoint".
    """
    other_shapes = [
        f"{name} {tuple(state[name].shape)}, needed {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
        for what, names in (
            ("missing keys", sorted(shapes.keys() - state.keys())),
            ("unknown keys", sorted(state.keys() - shapes.keys())),
            ("keys of another shape", other_shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(f"this is not {kind}: " + "; ".join(problems))

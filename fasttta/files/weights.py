"""Refuses tensors that cannot be a model's weights, in an error that names the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .inert_pickle import Unreadable

#: Classes that stand for plain tensors: fake ones, in a process that only counts (fasttta.cost).
STAND_INS: set[type] = set()

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# of expanded tensors: how much more memory their copies may take than the views do
_MOST_TIMES, _MOST_MORE = 8, 64 * 2**20


def defect(x: object, floating: bool = True) -> str | None:
    """Why a tensor cannot be a weight, whatever its values; None: it can be one."""
    if isinstance(x, Unreadable):
        return x.kind
    if not isinstance(x, Tensor):
        return f"no tensor but a {type(x).__name__}"
    if type(x) not in (Tensor, nn.Parameter, *STAND_INS):
        return f"a {type(x).__name__}"
    if x.is_nested:
        return "nested"
    if x.layout != torch.strided:
        return f"sparse ({str(x.layout).removeprefix('torch.')})"
    if x.is_quantized:
        return f"quantised ({str(x.dtype).removeprefix('torch.')})"
    if x.device.type == "meta":
        return "on the meta device, without values"
    if floating and x.dtype not in _FLOATS:
        return str(x.dtype).removeprefix("torch.")
    return None


def _is_finite(x: Tensor) -> bool:
    if not x.numel():
        return True
    ends = torch.stack(torch.aminmax(x.detach()))  # NaN wins over all others
    return bool(torch.isfinite(ends).all())


def check_weights(
    tensors: Mapping[str, object],
    what: str,
    *,
    floating: bool = True,
    skip_values: Iterable[str] = (),
) -> None:
    """Raises ValueError unless all are plain, finite tensors of 16, 32 or 64-bit floats.

    Args:
        tensors: by name.
        what: where they come from, for the message: a file's name.
        floating: False: integers and booleans are weights too.
        skip_values: names whose values may be anything.

    Raises:
        ValueError: names the first defective tensor and counts the others; or copies of them
            would take far more memory than they have.
    """
    needed = "needed floating point weights" if floating else "needed tensors"
    _refuse([(n, d) for n, x in tensors.items() if (d := defect(x, floating))], what, needed)
    plain = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
    _check_expansion(plain, what)
    with torch.no_grad():
        skip = set(skip_values)
        odd = [
            (name, "not finite (NaN or infinite)")
            for name, x in plain.items()
            if name not in skip and x.is_floating_point() and not _is_finite(x)
        ]
    _refuse(odd, what, "needed finite weights")


def _check_expansion(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError if copying tensors would take far more memory than they have: views that
    repeat a few values."""
    memory, views = {}, 0
    for x in tensors.values():
        storage = x.untyped_storage()
        memory[storage.data_ptr()] = storage.nbytes()
        views += x.numel() * x.element_size()
    if views > _MOST_TIMES * sum(memory.values()) + _MOST_MORE:
        name, largest = max(tensors.items(), key=lambda item: item[1].numel())
        raise ValueError(
            f"{what}: {name} of shape {list(largest.shape)} and the others would take {views:,} "
            f"bytes, they hold {sum(memory.values()):,}: views that repeat a few values"
        )


def _refuse(odd: list[tuple[str, str]], what: str, needed: str) -> None:
    if not odd:
        return
    name, kind = odd[0]
    more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
    raise ValueError(f"{what}: {needed}, found {name} {kind}{more}")

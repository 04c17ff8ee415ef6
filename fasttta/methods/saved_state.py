"""Whether tensors from a file are those that a method can go on with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_layout(
    kind: str, tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], shapes: bool = True
) -> None:
    """Checks that tensors have the names, the shapes and the kinds of types of others.

    Args:
        kind: of the tensors, for messages, such as ``"constant"``.
        shapes: False: compare the numbers of dimensions only.

    Raises:
        ValueError: a tensor differs, is missing or unexpected; names the first.
    """
    odd = sorted(tensors.keys() ^ needed.keys())
    if odd:
        state = "is missing" if odd[0] in needed else "is of another method or model"
        raise ValueError(f"{kind}.{odd[0]} {state}")
    for name, x in tensors.items():
        if x.is_floating_point() != needed[name].is_floating_point():
            raise ValueError(f"{kind}.{name} is {x.dtype}, needed {needed[name].dtype}")
        if (shapes and x.shape != needed[name].shape) or x.ndim != needed[name].ndim:
            raise ValueError(
                f"{kind}.{name} has shape {list(x.shape)}, needed {list(needed[name].shape)}"
            )

"""Fisher weights for EATA, as ``fasttta.collect_fisher`` makes them and as they are published."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import defect, plain_name, read_file

# tolerance between published source values and the model's: that of half precision
_RELATIVE, _ABSOLUTE = 1e-3, 1e-6


def read_official(path: str | os.PathLike) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and source values by parameter name, of a file of the official BriMPR code.

    Raises:
        FileNotFoundError, TypeError, ValueError: there is no such file, or it holds something else.
    """
    what, loaded = repr(os.fspath(path)), read_file(path, "Fisher weights")
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(
            f"{what} holds no Fisher weights: needed a dict of pairs [weights, source values] by "
            f"parameter name, found {type(loaded).__name__}"
        )
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pair in loaded.items():
        good = isinstance(name, str) and isinstance(pair, (list, tuple)) and len(pair) == 2
        if not good or any(defect(x) for x in pair) or pair[0].shape != pair[1].shape:
            raise ValueError(
                f"{what} holds no Fisher weights: entry {str(name)[:80]!r} is no pair of floating "
                "point tensors of one shape (weights, source values)"
            )
        short = plain_name(name)
        if short in weights:
            raise ValueError(f"{what} has two entries for {short}")
        weights[short] = pair[0], pair[1]
    return weights


def fitted(fisher: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checked Fisher weights of a model's tuned values.

    Args:
        fisher: weights by name (as ``fasttta.collect_fisher`` makes them), or pairs (weights,
            source values) by parameter name with or without ``module.``. Names that are not tuned
            may have weights of 0 only.
        values: the model's tuned values by name.

    Raises:
        TypeError: fisher is neither. ValueError: it is of another model, not finite or negative.
    """
    if not isinstance(fisher, Mapping) or not all(map(_is_entry, fisher.values())):
        raise TypeError(
            "fisher must be a dict of tensors by tuned name, as fasttta.collect_fisher makes it, "
            "or of pairs (weights, source values) as fasttta.methods.EATA.fisher_from_official("
            f"path) reads them, found {type(fisher).__name__}"
        )
    weights: dict[str, Tensor] = {}
    for name, entry in fisher.items():
        short = name if name in values else plain_name(str(name))
        if short in weights:
            raise ValueError(f"fisher has two entries for {short}")
        weights[short] = entry if isinstance(entry, Tensor) else entry[0]
        if kind := defect(weights[short]):
            raise ValueError(f"fisher[{name!r}] is {kind}, needed a plain floating point tensor")
        if not (torch.isfinite(weights[short]).all() and (weights[short] >= 0).all()):
            raise ValueError(f"fisher[{name!r}] must be finite and not negative")
        if short in values and weights[short].shape != values[short].shape:
            raise ValueError(
                f"fisher[{name!r}] has shape {tuple(weights[short].shape)}, needed "
                f"{tuple(values[short].shape)}"
            )
        if short in values and not isinstance(entry, Tensor):
            _check_source(name, entry[1], values[short])
    unused = {n for n, x in weights.items() if n not in values and not x.any()}
    odd = sorted(values.keys() ^ (weights.keys() - unused))
    if odd:
        raise ValueError(
            f"fisher is of another model: {', '.join(odd[:3])} in one of them only; make it with "
            "fasttta.collect_fisher(model, loader)"
        )
    return {name: weights[name] for name in values}


def _is_entry(x: Any) -> bool:
    pair = isinstance(x, (list, tuple)) and len(x) == 2 and all(isinstance(y, Tensor) for y in x)
    return isinstance(x, Tensor) or pair


def _check_source(name: str, source: Tensor, value: Tensor) -> None:
    if kind := defect(source):
        raise ValueError(f"fisher[{name!r}]: its source values are {kind}")
    ours, theirs = value.double().cpu(), source.double().cpu()
    if ours.shape != theirs.shape or not torch.allclose(theirs, ours, _RELATIVE, _ABSOLUTE):
        raise ValueError(
            f"fisher is of another model: its source values of {name} are not this model's; make "
            "it with fasttta.collect_fisher(model, loader)"
        )

"""The record of a saved state: a JSON object, every field of which is checked, and digests."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import __version__
from ..protocols import FusionModel, VisionLanguageModel
from .precision import PRECISIONS

FORMAT = 2
_READABLE = (1, FORMAT)  # records of format 1 have no checksum of themselves
_DIGEST = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLASS = re.compile(r"[^\W\d][\w.<>]{0,499}")


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


def _checksum(record: Mapping[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def written(record: Mapping[str, Any]) -> str:
    """A record as text, with its format and its checksum.

    Raises:
        ValueError: an option's value has no place in JSON.
    """
    content = {"format": FORMAT, "fasttta": __version__, **record}
    try:
        content["checksum"] = _checksum(content)
        return json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"options of {record.get('method')!r} cannot be saved ({error}); needed finite "
            "numbers, strings, booleans, None, and lists of these"
        ) from error


def as_read(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record that its text gives back: lists in place of tuples."""
    content: dict[str, Any] = json.loads(written(record))
    return content


def read(text: bytes) -> dict[str, Any]:
    """The record that ``written`` made, checked.

    Raises:
        ValueError: it is damaged, or not such a record; names the field.
    """
    try:
        return _read(text)
    except RecursionError:
        raise ValueError("is damaged: lists or objects lie too deep in each other") from None


def _read(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(
            text.decode(),
            object_pairs_hook=_object,
            parse_constant=_refused,
            parse_float=_finite,
        )
    except ValueError as error:  # also of numbers that are too long
        raise ValueError(f"is damaged: {error}") from error
    if not isinstance(record, dict) or not {"format", "method", "state"} & record.keys():
        raise ValueError("is no record of a saved state")
    _check_format(record)
    for name, (check, needed) in _FIELDS.items():
        if name not in record:
            if name in _OPTIONAL:
                continue
            raise ValueError(f"{name} is missing: is no record of a saved state")
        if not check(record[name]):
            raise ValueError(f"{name}: needed {needed}, found {record[name]!r:.80}")
    odd = sorted(record.keys() - _FIELDS.keys())
    if odd:
        raise ValueError(f"{odd[0]!r:.80} is no field of a record")
    return record


def _check_format(record: Mapping[str, Any]) -> None:
    version = record.get("format")
    if type(version) is not int or version not in _READABLE:
        raise ValueError(
            f"format: saved in format {version!r:.80}, this version reads "
            f"{' and '.join(map(str, _READABLE))}"
        )
    if version == 1 and "checksum" not in record:
        return
    if record.get("checksum") != _checksum(record) or version == 1:
        raise ValueError("is damaged: its checksum is not the recorded one")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("it has a field twice")
    return content


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is too large a number")
    return number


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _base(value: Any) -> bool:
    digest = _matches(_DIGEST)
    return (
        isinstance(value, dict)
        and value.keys() == {"model", "source"}
        and digest(value["model"])
        and isinstance(value["source"], dict)
        and all(map(digest, value["source"].values()))
    )


def _guard(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"window", "threshold", "watch", "values"}


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: type(value) is int, "an integer"),
    "fasttta": (lambda value: isinstance(value, str), "a version"),
    "method": (lambda value: isinstance(value, str) and bool(value), "a name"),
    "class": (_matches(_CLASS), "the import path of a class"),
    "options": (lambda value: isinstance(value, dict), "an object"),
    "precision": (lambda value: value in PRECISIONS[1:], " or ".join(PRECISIONS[1:])),
    "seed": (lambda value: type(value) is int and 0 <= value < 2**63, "0 to 2**63 - 1"),
    "base": (_base, "digests of the model and of the source values"),
    "guard": (_guard, "window, threshold, watch and values"),
    "state": (lambda value: isinstance(value, str), "the name of a file"),
    "sha256": (_matches(_SHA256), "a SHA-256"),
    "checksum": (_matches(_SHA256), "a SHA-256"),
}
_OPTIONAL = ("class", "guard", "checksum", "state")


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()[:16]


def model_digest(model: FusionModel | VisionLanguageModel) -> str:
    """Digest of names, shapes and a sample of the values of a model (up to 512 of every tensor,
    so that 660 MB need not be read)."""
    digest = hashlib.sha256(model.identity().encode())
    for name, x in sorted(model.state_dict().items()):
        flat = x.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 512)][:512].double().cpu()
        digest.update(f"{name} {list(x.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint(
    model: FusionModel | VisionLanguageModel, source: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Digests of the model that a state belongs to, and of the values with which the tuned
    tensors began."""
    return {
        "model": model_digest(model),
        "source": {name: _digest(x) for name, x in source.items()},
    }


def check_fingerprint(
    saved: Mapping[str, Any], model: FusionModel | VisionLanguageModel, source: Mapping[str, Tensor]
) -> None:
    """Raises ValueError if the state was saved for another model."""
    ours = fingerprint(model, source)
    names = sorted(ours["source"].keys() | saved["source"].keys())
    odd = [name for name in names if ours["source"].get(name) != saved["source"].get(name)]
    if odd or ours["model"] != saved["model"]:
        what = "its frozen weights or its ModelSpec differ"
        if odd:
            what = f"source values differ: {', '.join(odd[:3])}"
        raise ValueError(f"the state was saved for another model or precision: {what}")

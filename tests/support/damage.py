"""Saves with something wrong in them, signed anew so that no checksum gives it away."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fasttta.engine import folder as folders
from fasttta.engine import record as records

VALUES = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 10**30, 0.5, -0.25, 1e30, 1e308, "", "x",
    "1", "é\ud800", [], [1, 2], [[]], [None], {}, {"a": 1}, {"window": 2},
)  # fmt: skip


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the tensors of a saved folder."""
    record = json.loads((folder / folders.RECORD).read_text())
    return record, load_file(folder / record["state"])


def closed(folder: Path, record: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a save whose checksums fit."""
    for path in folder.iterdir():
        path.unlink()
    named = isinstance(record, dict) and isinstance(record.get("state"), str)
    try:
        save_file(tensors, folder / (record["state"] if named else "state.safetensors"))
    except (OSError, UnicodeError):  # a name that no file can have
        save_file(tensors, folder / "state.safetensors")
    if isinstance(record, dict):
        if "sha256" in record:
            record["sha256"] = records.tensors_digest(tensors)
        if "checksum" in record:
            record["checksum"] = records._checksum(record)
    (folder / folders.RECORD).write_text(json.dumps(record))


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything in a record."""
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed_record(record: dict[str, Any], draw: random.Random) -> tuple[str, Any]:
    """A record with one thing changed, and what."""
    record = copy.deepcopy(record)
    path = draw.choice([p for p in places(record) if p and p[0] not in ("sha256", "checksum")])
    inner: Any = record
    for key in path[:-1]:
        inner = inner[key]
    how = draw.choice(("value", "value", "value", "gone", "more"))
    if how == "gone":
        del inner[path[-1]]
    elif how == "more" and isinstance(inner, dict):
        inner["another"] = draw.choice(VALUES)
    else:
        inner[path[-1]] = draw.choice(VALUES)
        how = f"= {inner[path[-1]]!r:.40}"
    return f"{path} {how}", record


def changed_tensors(
    tensors: dict[str, torch.Tensor], draw: random.Random
) -> tuple[str, dict[str, torch.Tensor]]:
    """Tensors with one of them changed, and what."""
    tensors = dict(tensors)
    name = draw.choice(sorted(tensors))
    x = tensors[name]
    how = draw.choice(("renamed", "gone", "more", "shape", "longer", "type", "value", "empty"))
    if how == "renamed":
        tensors[draw.choice((f"{name}x", "method.other", "constant.other", "x"))] = tensors.pop(
            name
        )
    elif how == "gone":
        del tensors[name]
    elif how == "more":
        tensors[draw.choice(("x", "method.x", "constant.x", "tuned.x", "start.x"))] = x.clone()
    elif how == "shape":
        tensors[name] = x.reshape(-1, *([1] * draw.randint(1, 3))).contiguous()
    elif how == "longer":
        tensors[name] = torch.cat((x.flatten(), x.flatten()))
    elif how == "type":
        kinds = (torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
        tensors[name] = x.to(draw.choice(kinds))
    elif how == "empty":
        tensors[name] = x.new_zeros(0)
    elif x.is_floating_point() and x.numel():
        value = draw.choice((torch.nan, torch.inf, -torch.inf))
        tensors[name] = x.clone()
        tensors[name].view(-1)[draw.randrange(x.numel())] = value
        how = f"= {value}"
    else:
        tensors[name] = x.clone()
        tensors[name].zero_()
        how = "= 0"
    return f"{name} {how}", tensors


def changed_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A file cut short, or with a byte of another value."""
    at = draw.randrange(len(data))
    if draw.random() < 0.4:
        return f"{at} of {len(data)} bytes", data[:at]
    flipped = bytes([data[at] ^ (1 << draw.randrange(8))])
    return f"byte {at}", data[:at] + flipped + data[at + 1 :]


def changed_text(text: str, draw: random.Random) -> tuple[str, str]:
    """JSON that is none, or that readers differ about."""
    how = draw.choice(("NaN", "Infinity", "1e999", "deep", "long", "twice", "list", "deep list"))
    body = text.rstrip()[:-1]
    extra = {
        "NaN": '"seed": NaN', "Infinity": '"seed": -Infinity', "1e999": '"seed": 1e999',
        "deep": '"options": ' + '{"a":' * 5000 + "1" + "}" * 5000,
        "deep list": '"options": ' + "[" * 900 + "]" * 900,
        "long": '"seed": ' + "9" * 5000, "twice": '"seed": 1, "seed": 1', "list": '"seed": [1]',
    }[how]  # fmt: skip
    return how, f"{body}, {extra}}}"

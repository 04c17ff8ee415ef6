"""Saved states: a JSON record and a safetensors file, replaced together or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from .state import State

RECORD = "fasttta.json"
FORMAT = 1


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Names, shapes and a sample of the values of a whole model (every tensor gives up to 512
    values, so that 660 MB need not be read)."""
    whole = hashlib.sha256(getattr(model, "identity", str)().encode())
    for name, x in sorted(model.state_dict().items()):
        flat = x.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 512)][:512].double().cpu()
        whole.update(f"{name} {list(x.shape)}".encode() + sample.numpy().tobytes())
    return whole.hexdigest()[:16]


def fingerprint(model: nn.Module, state: State) -> dict[str, Any]:
    """What a state was made for: the model, and all source values of what is tuned."""
    return {
        "model": model_digest(model),
        "source": {name: _digest(x) for name, x in state.source.items()},
    }


def check_fingerprint(saved: Mapping[str, Any], model: nn.Module, state: State) -> None:
    """Raises ValueError if the state was saved for another model."""
    own = fingerprint(model, state)
    names = sorted(own["source"].keys() | saved["source"].keys())
    odd = [name for name in names if own["source"].get(name) != saved["source"].get(name)]
    if odd or own["model"] != saved["model"]:
        what = "its frozen weights or its ModelSpec differ"
        if odd:
            what = f"source values differ: {', '.join(odd[:3])}"
        raise ValueError(f"the state was saved for another model or precision: {what}")


def write(folder: str | os.PathLike, record: Mapping[str, Any], tensors: Mapping[str, Tensor]):
    """Writes a record and its tensors. The record, replaced last and in one move, names the
    tensor file, so that an interruption leaves the earlier save whole."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        before = Path(read(folder)[0]["state"]).name
    except (OSError, ValueError):
        before = None  # nothing there, or not ours: nothing to clear away
    data = save(dict(tensors))
    checksum = hashlib.sha256(data).hexdigest()
    name = f"state-{checksum[:12]}.safetensors"
    text = json.dumps(
        {"format": FORMAT, "fasttta": __version__, **record, "state": name, "sha256": checksum},
        indent=1,
    )
    for file, content in ((name, data), (RECORD, text.encode())):
        part = folder / f"{file}.part"
        with open(part, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, folder / file)
    if before not in (None, name):
        (folder / before).unlink(missing_ok=True)


def read(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of a saved state.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: a file is damaged, or of a later format.
    """
    from safetensors.torch import load

    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no saved state in {os.fspath(folder)!r}: no {RECORD}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(folder / RECORD)!r} is damaged: {error}") from error
    needed = {"format", "method", "options", "precision", "seed", "base", "state", "sha256"}
    if not isinstance(record, dict) or needed - record.keys():
        raise ValueError(f"{os.fspath(folder / RECORD)!r} is no record of a saved state")
    if record["format"] != FORMAT:
        raise ValueError(f"saved in format {record['format']}, this version reads {FORMAT}")
    try:
        data = (folder / Path(record["state"]).name).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{record['state']} is missing from {os.fspath(folder)!r}"
        ) from None
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(f"{record['state']} is damaged: its checksum is not the recorded one")
    return record, load(data)

"""Archives of checkpoints, changed member by member, and pickles that would run code."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn


def rewrite(source: Path, target: Path, changes: dict[str, object], compressed: bool = False):
    """Copies a zip archive; members named by the end of their path are replaced (bytes, or a
    function of bytes), left out (None) or, where none has the name, added."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    used = set()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            data: object = old.read(name)
            for end, change in changes.items():
                if name == f"{root}/{end}":
                    used.add(end)
                    data = change(data) if callable(change) else change
            if data is not None:
                new.writestr(name, data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # duplicate names are meant
            for end in sorted(changes.keys() - used):
                if isinstance(changes[end], bytes):
                    new.writestr(end.replace("ROOT", root), changes[end])
    return target


class Calls:
    """Pickled, it calls a function of choice when it is loaded."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def writes(marker: Path) -> Calls:
    """Code that would leave a file, if it were run."""
    return Calls(os.system, f"touch {marker}")


def save_script(module: nn.Module, path: Path) -> Path:
    """Writes a module as a TorchScript archive; returns the path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.save(torch.jit.script(module), str(path))
    return path


def load_script(path: Path) -> dict[str, Tensor]:
    """The state dict by PyTorch's own loader, which runs the archive's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path)).state_dict()


def pickled(x: object, path: Path, protocol: int = 2) -> Path:
    """Writes an object by pickle in a protocol; returns the path."""
    path.write_bytes(pickle.dumps(x, protocol=protocol))
    return path

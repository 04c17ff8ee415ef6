"""Reading CLIP checkpoints in OpenAI's names: TorchScript archives, state dicts, sizes."""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import _read_file

# integers in the published archives beside the weights, and BatchNorm's counters
_NOT_WEIGHTS = re.compile(r"input_resolution|context_length|vocab_size|.*num_batches_tracked")
_TEXT = ("token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight",
         "logit_scale", "transformer.resblocks.0.attn.in_proj_weight",
         "transformer.resblocks.0.mlp.c_fc.weight")  # fmt: skip
_VIT = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj",
        "visual.transformer.resblocks.0.attn.in_proj_weight",
        "visual.transformer.resblocks.0.mlp.c_fc.weight")  # fmt: skip
_RESNET = ("visual.layer1.0.conv1.weight", "visual.layer4.0.conv1.weight",
           "visual.attnpool.positional_embedding", "visual.attnpool.c_proj.weight")  # fmt: skip


def _is_torchscript(path: str | os.PathLike) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_clip_state(source: str | os.PathLike | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by OpenAI's names, all of one type: float64 if any is, else float32.

    A TorchScript archive (what OpenAI publishes) is opened for its weights; its code is not run.
    A mapping's tensors are copied.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    own = isinstance(source, Mapping)
    if own:
        state: Any = source
    elif os.path.isfile(source) and _is_torchscript(source):
        with warnings.catch_warnings():  # that TorchScript is going away is not news to a reader
            warnings.simplefilter("ignore")
            try:
                state = torch.jit.load(os.fspath(source), map_location="cpu").state_dict()
            except RuntimeError as error:
                raise ValueError(
                    f"{os.fspath(source)!r} is a damaged TorchScript archive: "
                    f"{str(error).splitlines()[0]}"
                ) from error
    else:
        state = _read_file(source)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"needed a state dict of named tensors, found {type(state).__name__}")
    odd = [str(name) for name, x in state.items() if not isinstance(x, Tensor)]
    if odd:
        raise ValueError(f"needed a state dict of named tensors, found {', '.join(odd[:6])}")
    plain = {
        name.removeprefix("module."): x
        for name, x in state.items()
        if not _NOT_WEIGHTS.fullmatch(name.removeprefix("module."))
    }
    odd = [f"{name} {str(x.dtype)[6:]}" for name, x in plain.items() if not x.is_floating_point()]
    if odd:
        raise ValueError(f"needed floating point weights, found {', '.join(odd[:6])}")
    double = any(x.dtype == torch.float64 for x in plain.values())
    dtype = torch.float64 if double else torch.float32
    with torch.inference_mode(False):
        return {name: x.detach().to(dtype, copy=own) for name, x in plain.items()}


def is_clip_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a file is meant to be a CLIP's: a TorchScript archive, or names of OpenAI's towers.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no checkpoint.
    """
    if os.path.isfile(path) and _is_torchscript(path):
        return True
    state = _read_file(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        return False
    names = {str(name).removeprefix("module.") for name in state}
    return "token_embedding.weight" in names or any(name.startswith("visual.") for name in names)


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    found = {int(m[1]) for m in map(re.compile(rf"{prefix}\.(\d+)\.").match, state) if m}
    if not found or found != set(range(len(found))):
        raise ValueError(f"{prefix} are not numbered 0, 1, ...: found {sorted(found)}")
    return len(found)


def infer_clip_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``CLIP`` that shapes determine. Heads are never stored: OpenAI's have 64
    channels, of the last feature map in ResNets.

    Raises:
        ValueError: a tensor that decides a size is missing.
    """
    kind = _VIT if "visual.proj" in state else _RESNET
    missing = [name for name in (*_TEXT, *kind) if name not in state]
    if missing:
        raise ValueError(
            f"this is not a CLIP checkpoint in OpenAI's names: {', '.join(missing[:6])} missing; "
            f"found {len(state)} keys: {', '.join(list(state)[:4])}, ... A Hugging Face or "
            "open_clip model goes to fasttta.adapt as the module it is"
        )
    width = state["ln_final.weight"].shape[0]
    text = {
        "dim": width,
        "depth": _blocks(state, r"transformer\.resblocks"),
        "heads": max(1, width // 64),
        "hidden": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "context_length": state["positional_embedding"].shape[0],
        "vocabulary": state["token_embedding.weight"].shape[0],
    }
    if kind is _VIT:
        patch = state["visual.conv1.weight"]
        vision = {
            "resolution": patch.shape[-1] * _side(state["visual.positional_embedding"]),
            "patch": patch.shape[-1],
            "dim": patch.shape[0],
            "depth": _blocks(state, r"visual\.transformer\.resblocks"),
            "heads": max(1, patch.shape[0] // 64),
            "hidden": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "patch_bias": "visual.conv1.bias" in state,
        }
    else:
        width = state["visual.layer1.0.conv1.weight"].shape[0]
        vision = {
            "resolution": 32 * _side(state["visual.attnpool.positional_embedding"]),
            "width": width,
            "layers": [_blocks(state, rf"visual\.layer{i}") for i in (1, 2, 3, 4)],
            "heads": max(1, width * 32 // 64),
        }
    return {"embed_dim": state["text_projection"].shape[1], "vision": vision, "text": text}


def _side(positions: Tensor) -> int:
    """G of the positions [1 + G*G, D] of a class token (or mean) and a square grid."""
    side = math.isqrt(positions.shape[0] - 1)
    if side < 1 or side**2 + 1 != positions.shape[0]:
        raise ValueError(
            f"the image tower has {positions.shape[0]} positions, needed 1 + a square (a class "
            "token and a square grid)"
        )
    return side

"""Reading official CAV-MAE checkpoints: file formats, key layouts, sizes."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

# What READ (q, k, v) and ABPEM (qa ... vv) add to a fusion block; views of qkv in their code.
SPLIT_QKV = re.compile(r"blocks_u\.\d+\.attn\.(q|k|v|qa|ka|va|qv|kv|vv)\.(weight|bias)")

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _looks_like_safetensors(path: str | os.PathLike) -> bool:
    """safetensors begins with the length of a JSON header; torch files with PK or a pickle."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**40


def _read_file(path: str | os.PathLike) -> Mapping:
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {os.fspath(path)!r}")
    if os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)!r} is a folder; needed a checkpoint file")
    if _looks_like_safetensors(path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{os.fspath(path)!r} is a damaged safetensors file: {error}"
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{os.fspath(path)!r} is not a plain checkpoint of tensors and was not run: {reason}. "
            "Re-save its state dict with safetensors or torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file may fail anywhere in torch's readers
        raise ValueError(
            f"{os.fspath(path)!r} is damaged, truncated or no checkpoint: {error}"
        ) from error


def read_state_dict(source: str | os.PathLike | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by plain names: no ``module.`` prefix, no split q/k/v, all of one type.

    That is float64 if any is, else float32. A mapping's tensors are copied.
    """
    state, what = source, "the state dict"
    if not isinstance(source, Mapping):
        state, what = _read_file(source), repr(os.fspath(source))
    if not isinstance(state, Mapping):
        found = type(state).__name__
        raise ValueError(f"{what} holds an object of type {found}, needed a state dict")
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    alien = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if alien or not state:
        found = f"other entries: {', '.join(alien[:6])}" if alien else "nothing"
        raise ValueError(f"{what}: needed a state dict of named tensors, found {found}")
    odd = [f"{name} {str(x.dtype)[6:]}" for name, x in state.items() if x.dtype not in _TYPES]
    if odd:
        raise ValueError(
            f"{what}: needed floating point weights of 16, 32 or 64 bits, found "
            f"{', '.join(odd[:6])}"
        )
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in state.values()) else _TYPES[1]
    own = isinstance(source, Mapping)
    plain = {name.removeprefix("module."): x for name, x in state.items()}
    with torch.inference_mode(False):
        return {
            name: x.detach().to(dtype, copy=own)
            for name, x in plain.items()
            if not SPLIT_QKV.fullmatch(name)
        }


def infer_sizes(state: Mapping[str, Tensor]) -> dict:
    """The arguments of ``CAVMAE`` that shapes determine.

    Raises:
        ValueError: a tensor that decides a size is missing or of the wrong rank.
    """
    ranks = {
        "pos_embed_a": 3,
        "pos_embed_v": 3,
        "patch_embed_a.proj.weight": 4,
        "patch_embed_v.proj.weight": 4,
        "blocks_u.0.mlp.fc1.weight": 2,
        "mlp_head.1.weight": 2,
    }
    if "mlp_head.1.weight" not in state and any(name.startswith("decoder_") for name in state):
        raise ValueError(
            "this is a pre-training CAV-MAE checkpoint (it has decoder_* and no mlp_head); "
            "needed one fine-tuned for classification"
        )
    missing = [name for name in ranks if name not in state]
    if missing:
        raise ValueError(
            f"this is not a fine-tuned CAV-MAE checkpoint: {', '.join(missing)} missing; "
            f"found {len(state)} keys: {', '.join(list(state)[:4])}, ..."
        )
    for name, rank in ranks.items():
        if state[name].ndim != rank:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, needed {rank} dimensions"
            )

    def blocks(prefix: str) -> int:
        found = re.compile(rf"{prefix}\.(\d+)\.")
        indices = {int(m[1]) for m in map(found.match, state) if m}
        if indices != set(range(len(indices))):
            raise ValueError(f"{prefix} are not numbered 0, 1, ...: found {sorted(indices)}")
        return len(indices)

    audio, video = state["patch_embed_a.proj.weight"], state["patch_embed_v.proj.weight"]
    return {
        "num_classes": state["mlp_head.1.weight"].shape[0],
        "dim": state["pos_embed_a"].shape[2],
        "audio_tokens": state["pos_embed_a"].shape[1],
        "video_tokens": state["pos_embed_v"].shape[1],
        "depth": (blocks("blocks_a"), blocks("blocks_v"), blocks("blocks_u")),
        "hidden": state["blocks_u.0.mlp.fc1.weight"].shape[0],
        "patch_audio": tuple(audio.shape[2:]),
        "patch_video": tuple(video.shape[2:]),
        "video_channels": video.shape[1],
    }

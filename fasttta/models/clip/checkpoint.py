"""Reading CLIP checkpoints in OpenAI's names: TorchScript archives, state dicts, sizes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...files import plain_name, read_file
from ..state_dicts import check_ranks, count_blocks, floating, listed, named_tensors, unwrapped

# The published archives also hold integers, BatchNorm's counters, and the causal mask, which some
# modules keep as a buffer.
_NOT_WEIGHTS = re.compile(
    r"input_resolution|context_length|vocab_size|.*num_batches_tracked|(.*\.)?attn_mask"
)
# tensors that decide sizes -> how many dimensions they have
_TEXT = {
    "token_embedding.weight": 2, "positional_embedding": 2, "text_projection": 2,
    "ln_final.weight": 1, "logit_scale": 0, "transformer.resblocks.0.attn.in_proj_weight": 2,
    "transformer.resblocks.0.mlp.c_fc.weight": 2,
}  # fmt: skip
_VIT = {
    "visual.conv1.weight": 4, "visual.positional_embedding": 2, "visual.proj": 2,
    "visual.transformer.resblocks.0.attn.in_proj_weight": 2,
    "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
}  # fmt: skip
_RESNET = {
    "visual.layer1.0.conv1.weight": 4, "visual.layer4.0.conv1.weight": 4,
    "visual.attnpool.positional_embedding": 2, "visual.attnpool.c_proj.weight": 2,
}  # fmt: skip


def read_clip_state(source: str | os.PathLike | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by OpenAI's names, all of one type: float64 if any is, else float32.

    A TorchScript archive (what OpenAI publishes) is read for its weights; its code is not run.
    A mapping's tensors are copied.

    Raises:
        FileNotFoundError, TypeError, ValueError: there is no such file, or it holds something else
            than finite floating point weights.
    """
    plain, what = named_tensors(source, ignored=_NOT_WEIGHTS)
    return floating(plain, what, copy=isinstance(source, Mapping))


def is_clip_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a file is meant to be a CLIP's: it has names of OpenAI's towers.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no checkpoint.
    """
    state = unwrapped(read_file(path))
    if not isinstance(state, Mapping):
        return False
    names = {plain_name(str(name)) for name in state}
    return "token_embedding.weight" in names or any(name.startswith("visual.") for name in names)


def infer_clip_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``CLIP`` that shapes determine. Heads are never stored: OpenAI's have 64
    channels, of the last feature map in ResNets.

    Raises:
        ValueError: a tensor that decides a size is missing, of the wrong rank or empty.
    """
    kind = _VIT if "visual.proj" in state else _RESNET
    missing = [name for name in (*_TEXT, *kind) if name not in state]
    if missing:
        raise ValueError(
            f"this is not a CLIP checkpoint in OpenAI's names: {', '.join(missing[:6])} missing; "
            f"found {listed(state)}. A Hugging Face or open_clip model goes to fasttta.adapt as "
            "the module it is"
        )
    check_ranks(state, {**_TEXT, **kind})
    width = state["ln_final.weight"].shape[0]
    text = {
        "dim": width,
        "depth": count_blocks(state, "transformer.resblocks", least=1),
        "heads": max(1, width // 64),
        "hidden": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "context_length": state["positional_embedding"].shape[0],
        "vocabulary": state["token_embedding.weight"].shape[0],
    }
    if kind is _VIT:
        patch = state["visual.conv1.weight"]
        vision: dict[str, Any] = {
            "resolution": patch.shape[-1] * _side(state["visual.positional_embedding"]),
            "patch": patch.shape[-1],
            "dim": patch.shape[0],
            "depth": count_blocks(state, "visual.transformer.resblocks", least=1),
            "heads": max(1, patch.shape[0] // 64),
            "hidden": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "patch_bias": "visual.conv1.bias" in state,
        }
    else:
        width = state["visual.layer1.0.conv1.weight"].shape[0]
        vision = {
            "resolution": 32 * _side(state["visual.attnpool.positional_embedding"]),
            "width": width,
            "layers": [count_blocks(state, f"visual.layer{i}", least=1) for i in (1, 2, 3, 4)],
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

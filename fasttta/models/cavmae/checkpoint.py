"""Reading official CAV-MAE checkpoints: key layouts, sizes, prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from torch import Tensor

from ..state_dicts import check_ranks, count_blocks, floating, listed, named_tensors

# What READ (q, k, v) and ABPEM (qa ... vv) add to a fusion block; views of qkv in their code.
SPLIT_QKV = re.compile(r"blocks_u\.\d+\.attn\.(q|k|v|qa|ka|va|qv|kv|vv)\.(weight|bias)")
# BriMPR's prompts by the names of its PromptVA, and by those of fasttta's prompted model
PROMPTS = {"audio": ("prompts_a", "prompts.audio"), "video": ("prompts_v", "prompts.video")}
# U(-1e-4, 1e-4) is how BriMPR's code draws fresh prompts; any step of Adam moves some beyond it
FRESH_PROMPTS = 1e-4
_PUBLISHED_HEADS = {768: 12}  # by width: ViT-B's, the only published CAV-MAE


def read_state_dict(source: str | os.PathLike | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by plain names: no prefixes of wrappers, no split q/k/v, all of one type.

    That is float64 if any is, else float32. A mapping's tensors are copied. Prompts of BriMPR are
    among them, as ``prompts.audio`` and ``prompts.video``.

    Raises:
        FileNotFoundError, TypeError, ValueError: there is no such file, or it holds something else
            than finite floating point weights.
    """
    plain, what = named_tensors(source, ignored=SPLIT_QKV)
    for modality, (official, ours) in PROMPTS.items():
        if official in plain:
            if ours in plain:
                raise ValueError(f"{what}: {official} and {ours} are both prompts of {modality}")
            plain[ours] = plain.pop(official)
    return floating(plain, what, copy=isinstance(source, Mapping))


def split_prompts(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the CAV-MAE, and prompts [blocks, n, D] by modality (none: an empty dict)."""
    names = {ours: modality for modality, (_, ours) in PROMPTS.items()}
    weights = {name: x for name, x in state.items() if name not in names}
    return weights, {names[name]: x for name, x in state.items() if name in names}


def checked_prompts(
    prompts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], like: Tensor
) -> tuple[dict[str, Tensor], bool]:
    """Copies of prompts [blocks, n, D] of both modalities, and whether they were tuned.

    Args:
        prompts: by modality; one that is missing has none, n = 0.
        shapes: (blocks, D) by modality.
        like: whose type and device the copies get.

    Returns:
        An empty dict if there are none, or if they are fresh and of another shape.

    Raises:
        ValueError: tuned prompts are of another shape than the encoders'.
    """
    if not prompts:
        return {}, False
    largest = [x.detach().abs().max().item() for x in prompts.values() if x.numel()]
    tuned, ready = max(largest, default=0.0) > FRESH_PROMPTS * (1 + 1e-6), {}
    for name in PROMPTS:
        blocks, dim = shapes[name]
        x = prompts.get(name, like.new_zeros(blocks, 0, dim))
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (blocks, dim):
            if not tuned:
                return {}, False
            raise ValueError(
                f"prompts of {name} have shape {list(x.shape)}, needed [{blocks}, n, {dim}] "
                "(encoder blocks, prompts, width)"
            )
        ready[name] = x.detach().clone().to(like)
    return ready, tuned


def published_heads(dim: int) -> int:
    """The head count of the published models of a width; weights do not tell it.

    Raises:
        ValueError: no model of this width is published.
    """
    if dim not in _PUBLISHED_HEADS:
        raise ValueError(
            f"give num_heads: weights do not tell it. Published models have width 768 and 12 "
            f"heads; this one's is {dim}. Type from_checkpoint(path, num_heads=...), or "
            "--num-heads on the command line"
        )
    return _PUBLISHED_HEADS[dim]


def infer_sizes(state: Mapping[str, Tensor]) -> dict:
    """The arguments of ``CAVMAE`` that shapes determine.

    Raises:
        ValueError: a tensor that decides a size is missing, of the wrong rank or empty.
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
            f"found {listed(state)}"
        )
    check_ranks(state, ranks)
    audio, video = state["patch_embed_a.proj.weight"], state["patch_embed_v.proj.weight"]
    return {
        "num_classes": state["mlp_head.1.weight"].shape[0],
        "dim": state["pos_embed_a"].shape[2],
        "audio_tokens": state["pos_embed_a"].shape[1],
        "video_tokens": state["pos_embed_v"].shape[1],
        "depth": tuple(count_blocks(state, name) for name in ("blocks_a", "blocks_v", "blocks_u")),
        "hidden": state["blocks_u.0.mlp.fc1.weight"].shape[0],
        "patch_audio": tuple(audio.shape[2:]),
        "patch_video": tuple(video.shape[2:]),
        "video_channels": video.shape[1],
    }

"""Makes a CLIP over the weights of a module of transformers, open_clip or OpenAI."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import infer_clip_sizes
from .model import CLIP, MEAN, STD

_HF_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # their spelling
    "vision_model.post_layernorm": "visual.ln_post",
    "logit_scale": "logit_scale",
}
_HF_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}
_HF_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def convert_hugging_face(module: nn.Module) -> CLIP:
    """A Hugging Face ``CLIPModel`` (transformers 4 and 5). Query, key and value projections are
    packed, which copies them; all else is shared.

    Raises:
        ValueError: parts of it are not CLIP's (all named).
    """
    config: Any = module.config  # of transformers
    state = _own_tensors(module)
    packed: dict[str, dict[str, Tensor]] = {}
    new: dict[str, Tensor] = {}
    for name, x in state.items():
        layer = _HF_LAYER.fullmatch(name)
        stem, _, part = name.rpartition(".")
        if layer and layer[3].endswith(("q_proj", "k_proj", "v_proj")):
            where = f"{_HF_TOWERS[layer[1]]}.resblocks.{layer[2]}.attn.in_proj_{layer[4]}"
            packed.setdefault(where, {})[layer[3][-6]] = x
        elif layer and layer[3] in _HF_BLOCK:
            where = f"{_HF_TOWERS[layer[1]]}.resblocks.{layer[2]}"
            new[f"{where}.{_HF_BLOCK[layer[3]]}.{layer[4]}"] = x
        elif name in ("visual_projection.weight", "text_projection.weight"):
            new["visual.proj" if name[0] == "v" else "text_projection"] = x.T
        elif name in _HF_NAMES:
            new[_HF_NAMES[name]] = x
        elif stem in _HF_NAMES:
            new[f"{_HF_NAMES[stem]}.{part}"] = x
        elif not name.endswith("position_ids"):  # a buffer of older versions
            new[name] = x  # named as unknown by from_tensors
    for where, parts in packed.items():
        if set(parts) != set("qkv"):
            raise ValueError(f"{where}: found projections {sorted(parts)}, needed q, k and v")
        new[where] = torch.cat([parts[which] for which in "qkv"])
    towers = {"text": config.text_config, "vision": config.vision_config}
    activations = {tower.hidden_act for tower in towers.values()}
    clip = _build(
        new,
        {name: tower.num_attention_heads for name, tower in towers.items()},
        _one_activation(activations),
        epsilons={name: tower.layer_norm_eps for name, tower in towers.items()},
    )
    end = getattr(config.text_config, "eos_token_id", 2)
    # 2: CLIP's published models, whose features are at the largest id; MetaCLIP 2 has 2 as well,
    # and takes the first such token
    if end != 2 or getattr(config, "model_type", "") == "metaclip_2":
        clip.find_end = functools.partial(_first_of, int(end))  # can be pickled
    return clip


def convert_open_clip(module: nn.Module) -> CLIP:
    """A ``CLIP`` or ``CustomTextCLIP`` of open_clip or OpenAI's own module; weights are shared.

    Raises:
        ValueError: parts of it are not CLIP's (all named).
    """
    text: Any = getattr(module, "text", module)  # of another library
    visual: Any = module.visual
    state = {name.removeprefix("text."): x for name, x in _own_tensors(module).items()}
    state.pop("attn_mask", None)
    context = mask_length(text)
    if context is not None:  # the length that the module's text tower takes
        state["positional_embedding"] = state["positional_embedding"][:context]
    heads = {"text": _heads(text.transformer.resblocks[0])}
    activations = {_activation(text.transformer.resblocks[0])}
    if hasattr(visual, "transformer"):
        block = visual.transformer.resblocks[0]
        heads["vision"] = _heads(block)
        activations.add(_activation(block))
    else:
        heads["vision"] = visual.attnpool.num_heads
        activations = {_activation(text.transformer.resblocks[0])}
    epsilons = {m.eps for n, m in module.named_modules() if isinstance(m, nn.LayerNorm) and m.eps}
    if len(epsilons) > 1:
        raise ValueError(f"LayerNorms with different eps {sorted(epsilons)}, needed one")
    eps = epsilons.pop() if epsilons else 1e-5
    clip = _build(
        state, heads, _one_activation(activations), epsilons={"text": eps, "vision": eps},
        mean=getattr(visual, "image_mean", None) or MEAN,
        std=getattr(visual, "image_std", None) or STD,
    )  # fmt: skip
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax"))
    if pool != "argmax":
        raise ValueError(f"text features pooled by {pool!r}, needed 'argmax' (at the end token)")
    return clip


def mask_length(text: Any) -> int | None:
    """Tokens that a text tower's causal mask is cut to, where that is less than it has positions
    for (the code of TPT's line cuts it to 40 of 77); None: it is not cut."""
    holders = (text, text.transformer, *text.transformer.resblocks)
    masks = [x for h in holders if isinstance(x := getattr(h, "attn_mask", None), Tensor)]
    length = min((len(mask) for mask in masks if mask.ndim >= 2), default=None)
    positions = text.positional_embedding.shape[0]
    return length if length is not None and length < positions else None


def _build(
    state: Mapping[str, Tensor],
    heads: Mapping[str, int],
    activation: str,
    *,
    epsilons: Mapping[str, float],
    **options: Any,
) -> CLIP:
    sizes = infer_clip_sizes(state)
    for tower, count in heads.items():
        sizes[tower]["heads"] = count
    clip = CLIP.from_tensors(state, {**sizes, "activation": activation, **options})
    for name, norm in clip.named_modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = epsilons["vision" if name.startswith("visual.") else "text"]
    return clip


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, detached and out of inference mode; BatchNorm's counters aside."""
    with torch.inference_mode(False):
        return {
            name: x.detach().clone() if x.is_inference() else x.detach()
            for name, x in module.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }


def _heads(block: Any) -> int:
    heads = getattr(block.attn, "num_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"attn.num_heads must be an int, found {heads!r}")
    return heads


def _activation(block: Any) -> str:
    layer = next(
        (m for n, m in block.mlp.named_children() if n not in ("c_fc", "c_proj", "ln")), None
    )
    if isinstance(layer, nn.GELU) and layer.approximate == "none":
        return "gelu"
    return "quick_gelu" if type(layer).__name__ == "QuickGELU" else type(layer).__name__


def _one_activation(activations: set[str]) -> str:
    """The activation of both towers, by its name in ``ACTIVATIONS``."""
    if len(activations) != 1 or activations - {"gelu", "quick_gelu"}:
        raise ValueError(
            f"activations {', '.join(sorted(activations))}: needed 'quick_gelu' or 'gelu' in both "
            "towers"
        )
    return activations.pop()


def _first_of(end: int, ids: Tensor) -> Tensor:
    """Where the first end token of every row of ids [C, L] is: [C]."""
    here = ids == end
    if not here.any(1).all():
        raise ValueError(f"class {int((~here.any(1)).int().argmax())} has no end token {end}")
    return here.int().argmax(1)

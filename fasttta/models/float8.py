"""Which parts of a model multiply in float8 under ``precision="fp8"``: frozen blocks of encoders
that no gradient runs through.

Of a CAV-MAE these are the blocks of both encoders before the first tuned one: all of them where
the fusion block or a head is tuned, none where a method tunes inside the encoders from the first
block on (TENT, EATA, SAR, BriMPR). Of a CLIP they are the blocks of its vision transformer but
those that a method differentiates (A-TPT the last two). Patch embeddings, which read raw pixels,
are 1 % of the work and keep bfloat16; so does CLIP's text tower, through which prompts are tuned,
and which else runs once a list of classes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .blocks.quantised import quantised, unsuitable
from .cavmae.model import CAVMAE
from .cavmae.prompted import PromptedCAVMAE
from .clip.model import CLIP
from .clip.vision_transformer import VisionTransformer
from .rational.models import ModelWithHead

_INSTEAD = 'use precision="bf16"'


def quantise_encoders(model: Any, differentiated: int | None = 0) -> None:
    """Quantises, in place, frozen blocks of a working copy whose tuned parameters require
    gradients.

    Args:
        model: what a family cut the user's module into.
        differentiated: how many of an image tower's last blocks the method sends gradients
            through; None: all.

    Raises:
        ValueError: no block can be; says why.
    """
    if isinstance(model, ModelWithHead) and isinstance(getattr(model, "model", None), nn.Module):
        model = model.model  # a head on a CAV-MAE or CLIP, which is frozen
    if isinstance(model, CLIP):
        lists = [_image_blocks(model, differentiated)]
    elif isinstance(model, CAVMAE):
        lists = _encoder_blocks(model)
    else:
        raise ValueError(f'precision="fp8": {_why_not(model)}; {_INSTEAD}')
    for blocks, count in lists:
        for block in blocks[:count]:
            if (reason := unsuitable(block)) is not None:
                raise ValueError(f'precision="fp8": {reason}; {_INSTEAD}')
    for blocks, count in lists:
        for i in range(count):
            blocks[i] = quantised(blocks[i])


def _why_not(model: Any) -> str:
    if isinstance(model, PromptedCAVMAE):
        return "prompts are tuned inside the encoders, so that gradients run through their blocks"
    if isinstance(model, ModelWithHead):
        return f"{type(model).__name__} takes features, there is no encoder to quantise"
    return (
        f"{type(model).__name__} runs a forward of its own, which may read the weights of a layer "
        "itself, so that none is replaced; it is for fasttta's CAV-MAE and CLIP, and modules that "
        "are recognised as one"
    )


def _image_blocks(model: CLIP, differentiated: int | None) -> tuple[nn.ModuleList, int]:
    """The blocks of the image tower, and how many of them, from the first, can be in float8."""
    if not isinstance(model.visual, VisionTransformer):
        raise ValueError(
            f'precision="fp8": the image tower is a {type(model.visual).__name__}, whose '
            f"convolutions have no form in float8, needed a vision transformer; {_INSTEAD}"
        )
    blocks = model.visual.transformer.resblocks
    kept = len(blocks) if differentiated is None else differentiated
    if kept >= len(blocks):
        raise ValueError(
            f'precision="fp8": the method sends gradients through all {len(blocks)} blocks of the '
            f"image tower; {_INSTEAD}"
        )
    return blocks, len(blocks) - kept


def _encoder_blocks(model: CAVMAE) -> list[tuple[nn.ModuleList, int]]:
    """The blocks of each encoder, and how many of them come before the first tuned parameter."""
    named, lists = dict(model.named_parameters()), []
    tuned = [name for name, x in named.items() if x.requires_grad]
    for letter, blocks in (("a", model.blocks_a), ("v", model.blocks_v)):
        before = (f"patch_embed_{letter}.", f"modality_{letter}", f"pos_embed_{letter}")
        inside = [int(name.split(".")[1]) for name in tuned if name.startswith(f"blocks_{letter}.")]
        embedded = any(name.startswith(before) for name in tuned)
        lists.append((blocks, 0 if embedded else min(inside, default=len(blocks))))
    if not any(count for _, count in lists):
        reason = "the encoders have no blocks"
        if tuned:
            reason = f"{tuned[0]} is tuned, so that gradients run through the encoders' blocks"
        raise ValueError(f'precision="fp8": {reason}; {_INSTEAD}')
    return lists

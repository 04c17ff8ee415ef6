"""Describes a vision-language model: ``fasttta inspect`` on CLIPs."""

from __future__ import annotations

from typing import Any

import torch

from .. import methods
from ..families.clip import ClipFamily
from ..methods.episodic import Episodic
from ..models import CLIP
from ..models.clip.resnet import ModifiedResNet
from ..models.copies import structural_copy


def describe_clip(family: ClipFamily) -> dict[str, Any]:
    """Describes a CLIP, as ``inspect.describe`` does other models.

    ``"delta_bytes"`` is the prompt (RAda: the head) that ``Adapted.save`` writes; the class list,
    8 bytes a token, comes on top. ``"note"``: options of a method that mean something else for this
    model.
    """
    clip = family.model
    weight = clip.positional_embedding
    return {
        "family": family.name,
        "found_at": "the model itself" if family.module is None else "its weights, shared",
        "parameters": sum(p.numel() for p in clip.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "image": _image(clip),
        "text": {
            "width": weight.shape[1],
            "blocks": len(clip.transformer.blocks),
            "heads": clip.transformer.blocks[0].attn.heads,
            "context": clip.context_length,
            "vocabulary": clip.token_embedding.num_embeddings,
        },
        "joint": clip.text_projection.shape[1],
        "scale": clip.logit_scale.exp().item(),
        "inputs": {
            "pixels": f"[N, 3, {clip.resolution}, {clip.resolution}] in [0, 1], or images of any "
            "size (PIL, tensors), of which views are made; normalised inside, mean "
            f"{_numbers(clip.mean)}, std {_numbers(clip.std)}",
            "classes": "names and a tokenizer, or token ids [C, L] int64 that end at their EOT, "
            f"at most {clip.context_length} tokens",
        },
        "methods": {
            name: _method(clip, methods.by_name(name)())
            for name in methods.names("vision-language")
        },
    }


def _heads(count: int) -> str:
    return f"{count} head{'s' * (count > 1)}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{x:.4g}" for x in values)


def _image(clip: CLIP) -> dict[str, Any]:
    visual, common = clip.visual, {"resolution": clip.resolution, "grid": clip.grid}
    if isinstance(visual, ModifiedResNet):
        layers = [len(getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)]
        return {"kind": "ResNet", **common, "layers": layers, "heads": visual.attnpool.heads}
    blocks = visual.transformer.blocks
    return {
        "kind": "ViT",
        **common,
        "patch": visual.conv1.kernel_size[0],
        "width": visual.class_embedding.shape[0],
        "blocks": len(blocks),
        "heads": blocks[0].attn.heads,
    }


def _method(clip: CLIP, method: methods.Method) -> dict[str, Any]:
    try:
        if isinstance(method, methods.RAda):
            return _rational(clip, method)
        if isinstance(method, Episodic):
            method.fitted(clip)
    except ValueError as error:
        return {"impossible": f"with its default options: {error}"}
    if not isinstance(method, Episodic) or method.group is None:
        return {"tuned": 0, "delta_bytes": 0, "names": [], "shape": []}
    shape = [method.tuned_length, clip.positional_embedding.shape[1]]
    if method.tuned_length + 3 > clip.context_length:  # SOT, prompt, a class, EOT
        return {
            "impossible": f"with its default options: prompt={method.prompt!r} has "
            f"{method.tuned_length} words, the context {clip.context_length} tokens"
        }
    size = 8 if clip.positional_embedding.dtype == torch.float64 else 4
    about: dict[str, Any] = {
        "tuned": shape[0] * shape[1],
        "delta_bytes": shape[0] * shape[1] * size,
        "names": ["prompt"],
        "shape": shape,
    }
    if hasattr(method, "rollout") and clip.map_kind == "grad-cam":
        about["note"] = (
            "attention by Grad-CAM; rollout= 'code', 'paper' and 'gar' are for vision "
            "transformers and not possible on a ResNet, which has no attention between patches"
        )
    return about


def _rational(clip: CLIP, method: methods.RAda) -> dict[str, Any]:
    """The entry of RAda, whose head does not depend on the classes."""
    bare = structural_copy(clip)
    bare.class_features = torch.ones(2, clip.text_projection.shape[1])
    model = method.extend(bare, 0)
    names = method.tuned(model)
    tensors = [model.get_parameter(slot.parameter) for slot in names.values()]
    values = sum(x.numel() for x in tensors)
    size = 8 if clip.positional_embedding.dtype == torch.float64 else 4
    return {
        "tuned": values,
        # current values, those from which an episode starts, two moments and a step count
        "delta_bytes": 4 * values * size + 4 * len(tensors),
        "names": list(names),
        "shape": list(tensors[0].shape),
        "note": 'a head of six such matrices and vectors; or on batches, with loss="entropy"',
    }


def table_clip(about: dict[str, Any]) -> str:
    """What ``describe_clip`` returned, as text."""
    image, text = about["image"], about["text"]
    assumed = " (assumed: 64 channels each)" if about.get("heads_assumed") else ""
    sizes = f"{image['resolution']} x {image['resolution']} pixels, "
    if image["kind"] == "ViT":
        sizes += (
            f"{image['grid']} x {image['grid']} patches of {image['patch']}, width "
            f"{image['width']}, {image['blocks']} blocks, {_heads(image['heads'])}{assumed}"
        )
    else:
        sizes += (
            f"last map {image['grid']} x {image['grid']}, layers "
            f"{', '.join(map(str, image['layers']))}, {_heads(image['heads'])}{assumed}"
        )
    lines = [
        f"recognised  {about['family']} ({about['found_at']}), {about['parameters']:,} parameters, "
        f"{about['dtype']} on {about['device']}",
        f"image       {image['kind']}, {sizes}",
        f"text        width {text['width']}, {text['blocks']} blocks, {_heads(text['heads'])}"
        f"{assumed}, context {text['context']} tokens, vocabulary {text['vocabulary']:,}",
        f"joint       {about['joint']} channels, cosine similarities times {about['scale']:.4g}",
        *(f"{name:<12}{what}" for name, what in about["inputs"].items()),
        "",
        f"{'method':<10}{'tuned values':>14}{'delta':>12}   what is tuned, for each image anew",
    ]
    for name, method in about["methods"].items():
        if "impossible" in method:
            lines.append(f"{name:<10}not possible {method['impossible']}")
            continue
        names = method["names"]
        what = f"{names[0]} [{', '.join(map(str, method['shape']))}]" if names else "nothing"
        size = f"{method['delta_bytes'] / 1e6:.3f} MB"
        note = f"; {method['note']}" if "note" in method else ""
        lines.append(f"{name:<10}{method['tuned']:>14,}{size:>12}   {what}{note}")
    return "\n".join(lines)

"""Describes a model and what methods would tune in it: ``fasttta inspect``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from .. import methods
from ..families import recognise
from ..families.clip import ClipFamily
from ..methods.base import runs_episodes
from ..methods.special_bases import ExtendingMethod
from ..models import CAVMAE, CLIP
from ..models.clip.checkpoint import is_clip_checkpoint
from ..models.computed_weights import how_to_unwrap
from ..models.specified.model import SpecifiedModel
from ..models.specified.outputs import tensors
from ..models.specified.spec import ModelSpec, undisturbed
from ..protocols import FusionModel
from .console import UserCodeError
from .imported_model import imported_model
from .inspect_clip import describe_clip, table_clip


def describe(model: nn.Module, spec: ModelSpec | None = None) -> dict[str, Any]:
    """Describes a model: its family, what each method would tune, the inputs that it expects.

    Args:
        model, spec: as for ``fasttta.adapt``.

    Returns:
        JSON-ready. ``"methods"``: name -> ``"tuned"`` (values), ``"delta_bytes"`` (what
        ``Adapted.save`` writes of tensors before any batch: tuned values, two moments and a step
        count; source statistics that a method keeps come on top), ``"names"`` of the tuned
        tensors, or ``"impossible"``, why it cannot run.

    Raises:
        TypeError, ValueError: it is not a model that fasttta knows.
    """
    family = recognise(model, spec)
    if isinstance(family, ClipFamily):
        return describe_clip(family)
    fusion = family.model
    weight = next(fusion.parameters())
    if not isinstance(fusion, (CAVMAE, SpecifiedModel)):
        raise TypeError(f"{family.name} is no fusion model, which is what can be described here")
    about = _cavmae(fusion) if isinstance(fusion, CAVMAE) else _specified(fusion)
    return {
        "family": family.name,
        "found_at": family.prefix.rstrip(".") or "the model itself",
        "parameters": sum(p.numel() for p in fusion.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "heads": fusion.num_heads,
        **about,
        "methods": {
            name: _method(fusion, methods.by_name(name)()) for name in methods.names("fusion")
        },
    }


def open_model(name: str, num_heads: int | None = None) -> nn.Module:
    """The model of a command line: that of a CAV-MAE or OpenAI CLIP checkpoint, or what
    ``package.module:name`` is or makes (``imported_model``).

    Raises:
        ValueError, OSError: there is no such file, module or name, or it is of another kind.
    """
    if os.path.exists(name) or ":" not in name:
        if is_clip_checkpoint(name):
            if num_heads is not None:
                raise ValueError(
                    f"--num-heads {num_heads}: heads of a CLIP checkpoint have 64 channels; leave "
                    "it out, or give another CLIP as package.module:name"
                )
            return CLIP.from_checkpoint(name)
        return CAVMAE.from_checkpoint(name, num_heads=num_heads)
    return imported_model(name)


def detect(
    model: nn.Module, shapes: list[str], logits: str | None = None, num_heads: int | None = None
) -> ModelSpec:
    """The ModelSpec of a model that takes inputs of these shapes, found with random ones.

    Args:
        shapes: ``"4x1024x128"``, ``"4x20:int64"`` for token ids, which are drawn from the range of
            the largest embedding with which the model runs.
        logits: a key, or the digits of an index.

    Raises:
        TypeError, ValueError: a shape that cannot be read; as ``ModelSpec.detect``.
    """
    where = int(logits) if logits is not None and logits.lstrip("-").isdigit() else logits
    try:
        inputs = random_inputs(model, shapes)
        return ModelSpec.detect(model, *inputs, logits=where, num_heads=num_heads)
    except (TypeError, ValueError):
        raise
    except Exception as error:  # the model's forward may raise anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserCodeError(
            f"{type(model).__name__} failed on inputs of {', '.join(shapes)}: {reason}"
        ) from error


def random_inputs(model: nn.Module, shapes: Sequence[str]) -> list[torch.Tensor]:
    """Inputs of shapes as ``detect`` takes them, with ids that the model's embeddings have.

    Raises:
        ValueError: a shape that cannot be read.
    """
    return _in_range(model, [_random(shape) for shape in shapes])


def _in_range(model: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Integer inputs drawn from the largest range with which the model runs and returns finite
    results: with ids 0 and 1 only, most tokens would be the same in all samples."""
    sizes = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    for i, x in enumerate(inputs):
        if x.is_floating_point() or x.dtype == torch.bool:
            continue
        for size in sorted(sizes, reverse=True):
            wide = torch.randint(0, max(2, size), x.shape).to(x.dtype)
            tried = [*inputs[:i], wide, *inputs[i + 1 :]]
            if _runs(model, tried):
                inputs = tried
                break
    return inputs


def _runs(model: nn.Module, inputs: list[torch.Tensor]) -> bool:
    try:
        with undisturbed(model):
            output = model(*(x.clone() for x in inputs))
    except Exception:  # such as an error for an id out of range
        return False
    return all(torch.isfinite(x).all() for x in tensors(output) if x.is_floating_point())


def _random(shape: str) -> torch.Tensor:
    sizes, _, kind = shape.partition(":")
    try:
        size = [int(part) for part in sizes.split("x")]
        dtype = getattr(torch, kind or "float32")
        if dtype.is_floating_point:
            return torch.randn(size, dtype=dtype)
        return torch.randint(0, 2, size).to(dtype)
    except (ValueError, AttributeError, RuntimeError):
        raise ValueError(
            f"--input {shape}: needed a shape such as 4x1024x128 or 4x20:int64"
        ) from None


def spec_of(model: nn.Module) -> ModelSpec:
    """A ModelSpec that describes a CAV-MAE: an example to start from.

    Raises:
        ValueError: it is no CAV-MAE.
    """
    try:
        family = recognise(model)
        if isinstance(family, ClipFamily):
            raise ValueError(
                f"{type(model).__name__} is a CLIP, which needs no ModelSpec: fasttta.adapt(model, "
                "classes=names)"
            )
    except TypeError as error:
        raise ValueError(str(error)) from error
    fusion = family.model
    if not isinstance(fusion, CAVMAE):
        raise ValueError(f"{family.name} needs no ModelSpec")
    ta, tv = fusion.spans
    return ModelSpec(
        fusion=[f"blocks_u.{i}.attn" for i in range(len(fusion.blocks_u))],
        spans={"audio": (0, ta), "video": (ta, ta + tv)},
        qkv="qkv",
    )


def _cavmae(fusion: CAVMAE) -> dict[str, Any]:
    return {
        "classes": fusion.num_classes,
        "width": fusion.dim,
        "blocks": {
            "audio": len(fusion.blocks_a),
            "video": len(fusion.blocks_v),
            "fusion": len(fusion.blocks_u),
        },
        "spans": dict(zip(fusion.input_names, fusion.spans, strict=True)),
        "inputs": _inputs(fusion),
    }


def _specified(fusion: SpecifiedModel) -> dict[str, Any]:
    return {
        "fusion": [p.path for p in fusion.projections],
        "projections": [list(p.modules) or [f"{p.path}.in_proj"] for p in fusion.projections],
        "spans": dict(zip(fusion.spec.spans, fusion.spans, strict=True)),
        "inputs": {name: "a tensor [B, ...]" for name in fusion.input_names},
    }


def _inputs(fusion: CAVMAE) -> dict[str, str]:
    ta, tv = fusion.spans
    audio, video = (e.proj for e in (fusion.patch_embed_a, fusion.patch_embed_v))
    (fa, ta_size), (ph, pw) = audio.kernel_size, video.kernel_size
    side = int(tv**0.5)
    shape = f"{side * ph}, {side * pw}" if side * side == tv else "rows, columns"
    return {
        "audio": f"[B, frames, mel bins] with (frames / {ta_size}) x (mel bins / {fa}) = {ta}; "
        "official models: fasttta.data.cavmae_audio, log-mel with mean -5.081 and std 4.4849",
        "video": f"[B, {video.in_channels}, {shape}], {tv} patches of {ph} x {pw}; official "
        "models: fasttta.data.cavmae_frame, ImageNet mean and std",
    }


def _method(fusion: FusionModel, method: methods.Method) -> dict[str, Any]:
    try:
        method = method.fitted(fusion)
        if isinstance(method, ExtendingMethod):
            fusion = method.extend(fusion, 0)
        slots = method.tuned(fusion)
    except ValueError as error:
        return {"impossible": f"with its default options: {error}"}
    if method.group is not None and not slots:
        return {"impossible": f"the model has nothing of the kind it tunes ({method.group})"}
    parameters = {slot.parameter for slot in slots.values()}
    for name in sorted(parameters - {name for name, _ in fusion.named_parameters()}):
        how = how_to_unwrap(cast(nn.Module, fusion), name)
        return {"impossible": f"{name} cannot be tuned: {how}"}
    values = sum(fusion.get_parameter(name).numel() for name in parameters)
    size = 8 if next(fusion.parameters()).dtype == torch.float64 else 4
    return {
        "tuned": values,
        # episodes also keep the values from which they start
        "delta_bytes": (4 if runs_episodes(method) else 3) * values * size + 4 * len(parameters),
        "names": list(slots),
    }


def table(about: dict[str, Any]) -> str:
    """What ``describe`` returned, as text."""
    if "image" in about:
        return table_clip(about)
    if "blocks" in about:
        blocks = ", ".join(f"{n} {name}" for name, n in about["blocks"].items())
        assumed = " (assumed, see --num-heads)" if about.get("heads_assumed") else ""
        sizes = (
            f"sizes       width {about['width']}, {about['heads']} heads{assumed}, blocks: "
            f"{blocks}; {about['classes']} classes"
        )
    else:
        parts = [", ".join(names) for names in about["projections"]]
        of = [f"{f} (q, k, v of {p})" for f, p in zip(about["fusion"], parts, strict=True)]
        sizes = f"fusion      {'; '.join(of)}, {about['heads']} heads"
    spans = " + ".join(f"{n} {name}" for name, n in about["spans"].items())
    lines = [
        f"recognised  {about['family']} ({about['found_at']}), {about['parameters']:,} parameters, "
        f"{about['dtype']} on {about['device']}",
        sizes,
        f"tokens      {spans}",
        *(f"{name:<12}{text}" for name, text in about["inputs"].items()),
        "",
        f"{'method':<10}{'tuned values':>14}{'delta':>12}   what is tuned",
    ]
    for name, method in about["methods"].items():
        if "impossible" in method:
            lines.append(f"{name:<10}not possible {method['impossible']}")
            continue
        names = method["names"]
        what = ", ".join(names[:2]) + (f", ... ({len(names)} tensors)" if len(names) > 2 else "")
        size = f"{method['delta_bytes'] / 1e6:.2f} MB"
        lines.append(f"{name:<10}{method['tuned']:>14,}{size:>12}   {what or 'nothing'}")
    return "\n".join(lines)

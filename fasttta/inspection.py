"""What fasttta makes of a model: ``fasttta inspect``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import methods
from .families import recognise
from .models import CAVMAE


def describe(model: nn.Module) -> dict[str, Any]:
    """What a model was recognised as, what each method would tune, what input it expects.

    Args:
        model: as for ``fasttta.adapt``.

    Returns:
        JSON-ready. ``"methods"``: name -> ``"tuned"`` (values), ``"delta_bytes"`` (what
        ``Adapted.save`` writes of tensors before any batch: tuned values, two moments and a step
        count), ``"names"`` of the tuned tensors, or ``"impossible"``, why it cannot run.

    Raises:
        TypeError, ValueError: it is not a model that fasttta knows.
    """
    known = recognise(model)
    fusion = known.fusion
    assert isinstance(fusion, CAVMAE)  # the one family there is
    weight = next(fusion.parameters())
    return {
        "family": known.family,
        "found_at": known.prefix.rstrip(".") or "the model itself",
        "parameters": sum(p.numel() for p in fusion.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "classes": fusion.num_classes,
        "width": fusion.dim,
        "heads": fusion.num_heads,
        "blocks": {
            "audio": len(fusion.blocks_a),
            "video": len(fusion.blocks_v),
            "fusion": len(fusion.blocks_u),
        },
        "spans": dict(zip(fusion.input_names, fusion.spans, strict=True)),
        "inputs": _inputs(fusion),
        "methods": {name: _method(fusion, methods.by_name(name)()) for name in methods.names()},
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


def _method(fusion: CAVMAE, method: methods.Method) -> dict[str, Any]:
    try:
        method.check_model(fusion)
    except ValueError as error:
        return {"impossible": f"with its default options: {error}"}
    slots = method.tuned(fusion)
    if method.group is not None and not slots:
        return {"impossible": f"the model has nothing of the kind it tunes ({method.group})"}
    parameters = {slot.parameter for slot in slots.values()}
    values = sum(fusion.get_parameter(name).numel() for name in parameters)
    size = 8 if fusion.modality_a.dtype == torch.float64 else 4
    return {
        "tuned": values,
        "delta_bytes": 3 * values * size + 4 * len(parameters),
        "names": list(slots),
    }


def table(found: dict[str, Any]) -> str:
    """What ``describe`` found, as text."""
    blocks = ", ".join(f"{n} {name}" for name, n in found["blocks"].items())
    spans = " + ".join(f"{n} {name}" for name, n in found["spans"].items())
    lines = [
        f"recognised  {found['family']} ({found['found_at']}), {found['parameters']:,} parameters, "
        f"{found['dtype']} on {found['device']}",
        f"sizes       width {found['width']}, {found['heads']} heads"
        f"{' (assumed, see --num-heads)' if found.get('heads_assumed') else ''}, blocks: {blocks}; "
        f"{found['classes']} classes",
        f"tokens      {spans}",
        *(f"{name:<12}{text}" for name, text in found["inputs"].items()),
        "",
        f"{'method':<10}{'tuned values':>14}{'delta':>12}   what is tuned",
    ]
    for name, method in found["methods"].items():
        if "impossible" in method:
            lines.append(f"{name:<10}not possible {method['impossible']}")
            continue
        names = method["names"]
        what = ", ".join(names[:2]) + (f", ... ({len(names)} tensors)" if len(names) > 2 else "")
        size = f"{method['delta_bytes'] / 1e6:.2f} MB"
        lines.append(f"{name:<10}{method['tuned']:>14,}{size:>12}   {what or 'nothing'}")
    return "\n".join(lines)

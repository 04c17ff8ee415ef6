"""Builds, compiles and captures what a method needs on a model: ``fasttta warmup``."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapted.entry import adapt
from ..adapted.warmup import Warmup
from ..families import recognise
from ..families.clip import ClipFamily
from ..models import CAVMAE, CLIP
from ..ops import first_use
from ..source_stats import SourceStats
from .inspect import detect, random_inputs

_MEL_BINS = 128  # of the published audio models, where a model's tokens fit it


def warm(
    model: nn.Module,
    method: str,
    batch: int,
    *,
    device: str = "cpu",
    precision: str = "auto",
    engine: str = "auto",
    encode_batch: int | None = None,
    shapes: Sequence[str] = (),
    logits: str | None = None,
    num_heads: int | None = None,
    classes: str | None = None,
    source_stats: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Warmup:
    """Adapts a model and warms it up on random inputs.

    Args:
        model: on the CPU; device: where it will run.
        method, precision, engine: as of ``adapt``; options: the method's.
        batch: samples, or images, of a batch.
        encode_batch: as of ``Adapted.stream``.
        shapes: of the inputs of a fusion model that is no CAV-MAE, as ``detect`` takes them; their
            first size gives way to ``batch``.
        logits, num_heads: as of ``detect``.
        classes: of a CLIP: their number, or a file with a name a line.
        source_stats: a file of ``SourceStats.save``, for methods that need it.

    Raises:
        TypeError, ValueError, OSError: an argument cannot be used.
    """
    given = dict(options or {})
    if source_stats is not None:
        given["source_stats"] = SourceStats.load(source_stats)
    spec = detect(model, list(shapes), logits, num_heads) if shapes else None
    inputs = random_inputs(model, _of_batch(shapes, batch)) if shapes else None
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown device, none, no build for it
        raise ValueError(f"--device {device}: {error}".split("\n")[0]) from error
    family = recognise(model, spec)
    if isinstance(family, ClipFamily):
        given["classes"] = _classes(family.model, classes)
    elif classes is not None:
        raise ValueError(f"--classes {classes}: {family.name} has its classes in its weights")
    if inputs is None:
        inputs = _inputs(family, batch)
    adapted = adapt(model, method, spec=spec, precision=precision, engine=engine, **given)
    return adapted.warmup(*(x.to(device) for x in inputs), encode_batch=encode_batch)


def reported(run: Callable[[], Warmup]) -> Warmup:
    """What ``run`` returns, with all that is made in it: a model that is recognised or adapted may
    already need the C++ library."""
    start = time.perf_counter()
    with first_use.recording() as made:
        report = run()
    return replace(report, made=tuple(made), seconds=time.perf_counter() - start)


def _of_batch(shapes: Sequence[str], batch: int) -> list[str]:
    """Shapes with another first size."""
    return [f"{batch}x{shape.partition('x')[2]}" for shape in shapes]


def _inputs(family: Any, batch: int) -> list[Tensor]:
    """Random inputs of a batch, where the model says their shapes."""
    if isinstance(family, ClipFamily):
        side = family.model.resolution
        return [torch.rand(batch, 3, side, side)]
    if isinstance(family.model, CAVMAE):
        return [torch.randn(batch, *shape) for shape in _cavmae_shapes(family.model)]
    raise ValueError(f"{family.name}: needed --input SHAPE, one for each input of the model")


def _cavmae_shapes(model: CAVMAE) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a sample of audio [frames, mel bins] and of video [channels, rows, columns]."""
    audio, video = model.patch_embed_a.proj, model.patch_embed_v.proj
    (high, long), (rows, columns) = audio.kernel_size, video.kernel_size
    ta, tv = model.spans
    across = _MEL_BINS // high if _MEL_BINS % high == 0 and ta % (_MEL_BINS // high) == 0 else 1
    down = max(n for n in range(1, int(tv**0.5) + 1) if tv % n == 0)
    return (
        (ta // across * long, across * high),
        (video.in_channels, down * rows, tv // down * columns),
    )


def _classes(clip: CLIP, given: str | None) -> list[str] | Tensor:
    """Class names of a file, or token ids of so many classes with names of one to four tokens."""
    if given is None:
        raise ValueError("a CLIP needs --classes: their number, or a file with a name a line")
    if not given.isdigit():
        names = [line.strip() for line in Path(given).read_text().splitlines()]
        return [name for name in names if name]
    count, most = int(given), clip.token_embedding.num_embeddings
    if count < 1:
        raise ValueError("--classes 0: needed at least one")
    ids = torch.zeros(count, clip.context_length, dtype=torch.int64)
    for row in range(count):
        name = [6 + (7 * row + i) % (most - 9) for i in range(1 + row % 4)]
        words = [most - 2, 1, 2, 3, 4, *name, 5, most - 1]  # "a photo of a <name>."
        ids[row, : len(words)] = torch.tensor(words)
    return ids


def parsed(settings: Sequence[str]) -> dict[str, Any]:
    """``["k=8", "balance=mean"]`` -> options: Python's values, and what is none as text.

    Raises:
        ValueError: one is not of the form name=value.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--option {setting}: needed name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options

"""``fasttta inspect --cost``: counts a step of a method on the user's model.

A process of its own counts, since counting replaces what PyTorch says of GPUs. That process loads a
shim before it imports torch: nothing here may import it earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost import shim
from . import console

if TYPE_CHECKING:
    from torch import nn

    from ..adapted.base import Adapted
    from ..models.specified.spec import ModelSpec

#: Names of ``fasttta.cost.roofline.GPUS``.
GPUS = ("h200", "h100", "a100", "b200", "rtx5090", "mi300x")
_LINES = 12  # the largest source lines that are printed


def count_elsewhere(options: argparse.Namespace) -> int:
    """Counts in a new process, which prints the result; returns its exit status.

    Raises:
        OSError: there is no C++ compiler, or it fails.
    """
    built = shim.build()
    names = ("model", "num_heads", "input", "logits", "json", "gpu", "method", "batch", "classes",
             "engine", "precision")  # fmt: skip
    chosen = {name: getattr(options, name) for name in names}
    chosen["traceback"] = getattr(options, "traceback", False)
    command = [sys.executable, "-P", "-m", __name__, str(built or ""), json.dumps(chosen)]
    quiet = {**os.environ, "FASTTTA_MESSAGES": "off"}  # nothing is compiled or captured
    return subprocess.run(command, check=False, env=quiet).returncode


def _main() -> int:
    path, options = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
    if path:
        shim.load(Path(path))
    return console.run(lambda: _count(options), options.traceback)


def _count(options: argparse.Namespace) -> int:
    import warnings

    from ..cost import gpu, report
    from ..cost.roofline import GPUS as PEAKS
    from ..evaluate.output import as_json
    from . import inspect as inspection

    model = inspection.open_model(options.model, options.num_heads)
    spec: ModelSpec | None = None
    if options.input:
        spec = inspection.detect(model, options.input, options.logits, options.num_heads)
    gpu.pretend()
    with gpu.counting() as log, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single sample, and of first uses
        adapted, step = _step(model, spec, options)
        log.half = adapted.precision in ("bf16", "fp8")
        for _ in range(max(1, getattr(adapted.options, "window", 1))):
            step()
        log.begin()
        step()
    graph, chosen = adapted.engine == "graph", PEAKS[options.gpu]
    about = {"method": adapted.method, "precision": adapted.precision, "engine": adapted.engine}
    if options.json:
        print(as_json({**about, **report.numbers(log, chosen, graph)}))
    else:
        print(", ".join(about.values()))
        print(report.text(log, chosen, graph, _LINES))
    return 0


def _step(
    model: nn.Module, spec: ModelSpec | None, options: argparse.Namespace
) -> tuple[Adapted, Callable[[], object]]:
    """The adapted model on the GPU that is not there, and what makes one step of it."""
    import torch

    from .. import methods
    from ..adapted.entry import adapt
    from ..cost import gpu, inputs
    from ..families import recognise
    from ..families.clip import ClipFamily
    from ..models import CAVMAE

    fake = gpu.on_gpu(model)
    family = recognise(fake, spec)
    name = family.default_method if options.method == "auto" else options.method
    chosen: dict[str, Any] = {
        "engine": options.engine, "precision": options.precision, "verify_model": "never",
    }  # fmt: skip
    if isinstance(family, ClipFamily):
        clip = family.model
        ids = inputs.class_ids(
            options.classes, clip.context_length, clip.token_embedding.num_embeddings
        )
        image = adapt(fake, name, classes=ids, **chosen)
        count = getattr(image.options, "view_count", 0)
        if count:
            views = inputs.views(count, clip.resolution, gpu.DEVICE)
            return image, lambda: image.step(views=views)
        pixels = torch.empty(options.batch, 3, clip.resolution, clip.resolution, device=gpu.DEVICE)
        return image, lambda: image.step(pixels)
    if isinstance(family.model, CAVMAE) and methods.by_name(name) is methods.BriMPR:
        chosen["source_stats"] = inputs.source_stats(family.model)
    shapes = [(x.partition(":")[0], x.partition(":")[2]) for x in options.input]
    if isinstance(family.model, CAVMAE) and not shapes:
        shapes = inputs.fusion_shapes(family.model)
    batch = [
        torch.empty(
            (options.batch, *map(int, sizes.split("x")[1:])),
            dtype=getattr(torch, kind or "float32"),
            device=gpu.DEVICE,
        )
        for sizes, kind in shapes
    ]
    adapted = adapt(fake, name, spec=spec, **chosen)
    return adapted, lambda: adapted.step(*batch)


if __name__ == "__main__":
    sys.exit(_main())

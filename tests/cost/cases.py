"""Steps that are counted: published settings at the sizes of ViT-B models, on fake tensors.

Import it in a process that counts (``python tests/cost/count.py``), after the shim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fasttta
from fasttta.cost import gpu
from fasttta.cost.log import Log
from fasttta.data import Views
from fasttta.models import CAVMAE, CLIP

PRECISIONS, ENGINES = ("bf16", "fp32", "tf32"), ("graph", "eager")
WORDS = 4  # of the prompt


@dataclass(frozen=True)
class Case:
    """A method on batches of one size, or on one image of so many views.

    Attributes:
        size: samples, or views. classes: that the model tells apart.
        graph: whether the engine captures it.
    """

    method: str
    size: int
    classes: int
    options: dict[str, Any] = field(default_factory=dict)
    graph: bool = True


CASES = {
    "K50": Case("abpem", 8, 50, {"k": 8, "window": 4}),
    "VGG": Case("abpem", 32, 309, {"k": 28, "window": 4}),
    "batch 64": Case("abpem", 64, 50, {"k": 8, "window": 1}),
    "batch 1": Case("abpem", 1, 50, {"k": 8, "window": 1}),
    "READ": Case("read", 64, 50),
    "TENT": Case("tent", 64, 50),
    "EATA": Case("eata", 64, 50),
    "SAR": Case("sar", 64, 50),
    "BriMPR": Case("brimpr", 64, 50),
    "A-TPT 37": Case("a-tpt", 64, 37, graph=False),
    "A-TPT 397": Case("a-tpt", 64, 397, graph=False),
    "A-TPT 1000": Case("a-tpt", 64, 1000, graph=False),
    "TPT": Case("tpt", 64, 37, graph=False),
    "C-TPT": Case("c-tpt", 64, 37, graph=False),
    "R-TPT": Case("r-tpt", 64, 37, graph=False),
    "MTA": Case("mta", 64, 37, graph=False),
    "TTC": Case("ttc", 64, 37, graph=False),
    "RAda": Case("rada", 64, 37, {"loss": "views"}, graph=False),
}


def count(name: str, precision: str, engine: str) -> Log:
    """The log of one step in the steady state: windows full, graphs captured."""
    case = CASES[name]
    with gpu.counting(half=precision == "bf16") as log:
        step = _step(case, precision, engine)
        for _ in range(max(1, case.options.get("window", 1))):
            step()
        log.begin()
        step()
    return log


def _step(case: Case, precision: str, engine: str) -> Callable[[], object]:
    options = {"precision": precision, "engine": engine, "verify_model": "never", **case.options}
    with torch.device(gpu.DEVICE):
        if "vision-language" in fasttta.methods.by_name(case.method).families:
            clip, views = vit_b_clip(), fake_views(case.size)
            adapted = fasttta.adapt(clip, case.method, classes=class_ids(case.classes), **options)
            return lambda: adapted.step(views=views)
        model = CAVMAE(case.classes).eval()
        inputs = torch.empty(case.size, 1024, 128), torch.empty(case.size, 3, 224, 224)
        if case.method == "brimpr":
            options["source_stats"] = source_stats(model)
        adapted = fasttta.adapt(model, case.method, **options)
        return lambda: adapted.step(*inputs)


def vit_b_clip() -> CLIP:
    """CLIP of ViT-B/16's sizes."""
    vision = {"resolution": 224, "patch": 16, "dim": 768, "depth": 12, "heads": 12, "hidden": 3072}
    text = {"dim": 512, "depth": 12, "heads": 8, "hidden": 2048, "context_length": 77,
            "vocabulary": 49408}  # fmt: skip
    return CLIP(512, vision, text).eval().requires_grad_(False)


def source_stats(model: CAVMAE) -> fasttta.SourceStats:
    """Statistics of the shapes that BriMPR needs, on the host."""
    with torch.device("cpu"):
        pairs = {
            name: (torch.ones(s), torch.zeros(s)) for name, s in model.feature_shapes().items()
        }
    return fasttta.SourceStats(**pairs)


def fake_views(count: int) -> Views:
    """Views of one image, made elsewhere."""
    pixels = (torch.empty(count, 3, 224, 224) for _ in range(2))
    return Views(*pixels, torch.empty(count))


def class_ids(classes: int) -> Tensor:
    """Token ids [C, L] on the host: SOT, the prompt, a name of 1 to 4 tokens, full stop, EOT."""
    with torch.device("cpu"):
        ids = torch.zeros(classes, 77, dtype=torch.int64)
        for n in range(classes):
            name = [100 + (7 * n + i) % 40000 for i in range(1 + n % 4)]
            words = [49406, *range(5, 5 + WORDS), *name, 10, 49407]
            ids[n, : len(words)] = torch.tensor(words)
    return ids

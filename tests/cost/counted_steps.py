"""Steps that are counted: published settings at the sizes of ViT-B models, on fake tensors.

Import it in a process that counts (``python tests/cost/count.py``), after the shim.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fasttta
from fasttta.cost import gpu, inputs
from fasttta.cost.log import Log
from fasttta.engine import capture
from fasttta.models import CAVMAE, CLIP

ENGINES = ("graph", "eager")
#: Those of every case; the first is counted at full depth, the others with few blocks.
PRECISIONS = ("bf16", "fp32", "tf32")
FEW = {"fusion": (2, 2, 1), "clip": 3}  # blocks: what a block does is seen in one
FULL = {"fusion": (11, 11, 1), "clip": 12}

capture._WARM_UP = 1  # nothing has to settle


@dataclass(frozen=True)
class Case:
    """A method on batches of one size, or on one image of so many views.

    Attributes:
        size: samples, or views. classes: that the model tells apart.
        graph: whether the engine captures it. precision: that it is budgeted in.
    """

    method: str
    size: int
    classes: int
    options: dict[str, Any] = field(default_factory=dict)
    graph: bool = True
    precision: str = "bf16"


_K50 = {"k": 8, "window": 4}
CASES = {
    "K50": Case("abpem", 8, 50, _K50),
    "K50 fp8": Case("abpem", 8, 50, _K50, precision="fp8"),
    "VGG": Case("abpem", 32, 309, {"k": 28, "window": 4}),
    "batch 64": Case("abpem", 64, 50, {"k": 8, "window": 1}),
    "batch 1": Case("abpem", 1, 50, {"k": 8, "window": 1}),
    "READ": Case("read", 64, 50),
    "TENT": Case("tent", 64, 50),
    "EATA": Case("eata", 64, 50),
    "SAR": Case("sar", 64, 50),
    "BriMPR": Case("brimpr", 64, 50),
    "A-TPT 37": Case("a-tpt", 64, 37),
    "A-TPT 397": Case("a-tpt", 64, 397),
    "A-TPT 1000": Case("a-tpt", 64, 1000),
    "TPT": Case("tpt", 64, 37),
    "C-TPT": Case("c-tpt", 64, 37),
    "R-TPT": Case("r-tpt", 64, 37),
    "MTA": Case("mta", 64, 37),
    "TTC": Case("ttc", 64, 37),
    "RAda": Case("rada", 64, 37, {"loss": "views"}),
}


def combinations() -> list[tuple[str, str, str]]:
    """(case, precision, engine) of every step that is counted."""
    return [
        (name, precision, engine)
        for name, case in CASES.items()
        for precision in (PRECISIONS if case.precision in PRECISIONS else (case.precision,))
        for engine in ENGINES
        if case.graph or engine == "eager"
    ]


def count(name: str, precision: str, engine: str) -> Log:
    """The log of one step in the steady state: windows full, graphs captured."""
    case = CASES[name]
    blocks = FULL if precision == case.precision else FEW
    with gpu.counting(half=precision in ("bf16", "fp8")) as log, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single sample
        step = _step(case, precision, engine, blocks)
        for _ in range(max(1, case.options.get("window", 1))):
            step()
        gc.collect()
        gc.disable()  # memory is freed when its last reference goes, in every run at the same time
        try:
            log.begin()
            step()
        finally:
            gc.enable()
    return log


def _step(case: Case, precision: str, engine: str, blocks: dict[str, Any]) -> Callable[[], object]:
    options = {"precision": precision, "engine": engine, "verify_model": "never", **case.options}
    if "vision-language" in fasttta.methods.by_name(case.method).families:
        clip = gpu.on_gpu(_vit_b_clip(blocks["clip"]))
        ids = inputs.class_ids(case.classes, 77, 49408)
        views = inputs.views(case.size, 224, gpu.DEVICE)
        image = fasttta.adapt(clip, case.method, classes=ids, **options)
        return lambda: image.step(views=views)
    model = gpu.on_gpu(_vit_b_fusion(case.classes, blocks["fusion"]))
    shapes = (case.size, 1024, 128), (case.size, 3, 224, 224)
    batch = [torch.empty(shape, device=gpu.DEVICE) for shape in shapes]
    if case.method == "brimpr":
        options["source_stats"] = inputs.source_stats(model)
    adapted = fasttta.adapt(model, case.method, **options)
    return lambda: adapted.step(*batch)


@functools.cache
def _vit_b_fusion(classes: int, depth: tuple[int, int, int]) -> CAVMAE:
    """CAV-MAE's shapes."""
    with torch.device("meta"):
        return CAVMAE(classes, depth=depth).eval()


@functools.cache
def _vit_b_clip(depth: int) -> CLIP:
    """The shapes of CLIP ViT-B/16."""
    vision = {"resolution": 224, "patch": 16, "dim": 768, "depth": depth, "heads": 12,
              "hidden": 3072}  # fmt: skip
    text = {"dim": 512, "depth": depth, "heads": 8, "hidden": 2048, "context_length": 77,
            "vocabulary": 49408}  # fmt: skip
    with torch.device("meta"):
        return CLIP(512, vision, text).eval().requires_grad_(False)

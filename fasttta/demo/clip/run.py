"""The demo of methods for single images: a small CLIP under attack."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...adapted.entry import adapt
from ...data.attack import pgd
from ...evaluate import machine, measure_stream, over_seeds
from ...methods import Episodic, by_name, names
from ...methods.base import updates_tensors
from .captions import DIGITS, PROMPT, tokenize
from .examples import example
from .scenes import load_clip, test_scenes

VIEWS = 32
_TUNED = {"views": VIEWS, "prompt_length": len(PROMPT.split())}
# Published settings but for the number of views (64), which the demo's time allows no more of.
SETTINGS: dict[str, dict[str, Any]] = {
    "source": {},
    "tpt": _TUNED,
    "c-tpt": _TUNED,
    "r-tpt": _TUNED,
    "a-tpt": _TUNED,
    "mta": {"views": VIEWS},
    "ttc": {},
}
METHODS = tuple(SETTINGS)
QUICK = {"methods": ("source", "r-tpt", "a-tpt", "mta"), "samples": 24}
BATCH = 8  # images in a call: 256 views


def class_ids() -> Tensor:
    """Token ids [10, L] of the prompt with each digit's name."""
    return tokenize([f"{PROMPT} {name}." for name in DIGITS])


def episodes() -> list[str]:
    """Names of the methods that treat every image as an episode."""
    return [name for name in names("vision-language") if issubclass(by_name(name), Episodic)]


def run(
    methods: Sequence[str] = METHODS,
    *,
    samples: int = 48,
    eps: float = 4.0,
    steps: int = 10,
    labels: str = "true",
    seeds: Sequence[int] = (0,),
    examples: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """Attacks the demo's CLIP and adapts it, image by image, with several methods.

    Args:
        methods: names out of ``SETTINGS``, or of registered methods for images.
        samples: test images, each clean and attacked.
        eps: radius of the attack in levels of 255; steps: of the attack.
        labels: what the attack moves away from: ``"true"``, or ``"pseudo"``, the prediction.
        seeds: one run of everything for each: digits, scenes, start of the attack, views.
        examples: images of the first seed, those that the attack turns first, to show the inside
            of A-TPT for.
        progress: called with (runs done, runs in all, what runs now).

    Returns:
        JSON-ready: ``"streams"``: {"clean" and "attacked": {method: what
        ``evaluate.over_seeds`` makes of ``evaluate.measure_stream``}}, ``"threat"``,
        ``"success"`` (percent of correctly classified images that the attack breaks),
        ``"examples"``, ``"protocol"``, ``"machine"``, ``"classes"``, ``"seconds"``.

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    available = [*SETTINGS, *(name for name in episodes() if name not in SETTINGS)]
    unknown = [name for name in methods if name not in available]
    if unknown or not methods:
        raise ValueError(
            f"methods: {', '.join(unknown) or 'none'} unknown; known: {', '.join(available)}"
        )
    if labels not in ("true", "pseudo"):
        raise ValueError(f'labels={labels!r}: needed "true" or "pseudo"')
    if not seeds:
        raise ValueError("seeds: found none; needed at least one, e.g. --seeds 0,1,2")
    start = time.perf_counter()
    model = load_clip()
    runs: dict[str, dict[str, list]] = {
        name: {m: [] for m in methods} for name in ("clean", "attacked")
    }
    done, total = 0, len(seeds) * (1 + 2 * len(methods))
    broken: list[float] = []
    shown: list[dict[str, Any]] = []
    objects = {name: by_name(name)(**SETTINGS.get(name, {})) for name in methods}
    for seed in seeds:
        scenes = test_scenes(samples, seed)
        progress(done, total, "attack")
        attacked = pgd(
            model, scenes.pixels, scenes.digits if labels == "true" else "pseudo",
            eps=eps / 255, steps=steps, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        with torch.no_grad():
            right = model(scenes.pixels).argmax(1) == scenes.digits
        turned = right & (attacked.logits.argmax(1) != scenes.digits)
        broken.append(100 * int(turned.sum()) / max(1, int(right.sum())))
        done += 1
        for stream, pixels in (("clean", scenes.pixels), ("attacked", attacked.pixels)):
            batches = list(zip(pixels.split(BATCH), scenes.digits.split(BATCH), strict=True))
            for name, method in objects.items():
                progress(done, total, f"{stream}, {name}")
                adapted = adapt(model, method, classes=class_ids(), seed=seed)
                runs[stream][name].append(measure_stream(adapted, batches, len(DIGITS)))
                done += 1
        if not shown and examples:
            shown = [
                example(model, class_ids(), scenes, attacked.pixels, i, SETTINGS["a-tpt"], seed)
                for i in turned.int().argsort(descending=True, stable=True)[:examples].tolist()
            ]
    progress(done, total, "done")
    return {
        "title": "fasttta demo clip: a small CLIP under attack",
        "toy": "handwritten digits in colour and a CLIP of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "threat": attacked.threat.as_dict() | {"text": str(attacked.threat)},
        "success": sum(broken) / len(broken),
        "protocol": {
            "samples": samples,
            "views": VIEWS,
            "prompt": f'"{PROMPT} {{digit}}."',
            "options": {n: s for n, s in SETTINGS.items() if n in methods and s},
            "lr": {name: m.lr for name, m in objects.items() if updates_tensors(m)},
            "seeds": list(seeds),
            "order": "every image is an episode of its own",
            "metric": "top-1 accuracy over all samples, in percent",
        },
        "machine": machine(),
        "classes": list(DIGITS),
        "streams": {
            name: {method: over_seeds(results) for method, results in by_method.items()}
            for name, by_method in runs.items()
        },
        "examples": shown,
        "seconds": time.perf_counter() - start,
    }

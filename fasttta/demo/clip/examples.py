"""What A-TPT sees of an attacked image: attention, masks, mixed views, weights, as pictures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapted.entry import adapt
from ...evaluate.document import data_uri
from ...models import CLIP
from ...views import Views, make_views
from .captions import DIGITS
from .scenes import Scenes

SHOWN = 3  # views, besides those selected
_HEAT = ((0.05, 0.05, 0.2), (0.55, 0.1, 0.45), (0.95, 0.45, 0.15), (1.0, 0.95, 0.6))
_REGIONS = ((0.25, 0.3, 0.4), (0.6, 0.6, 0.6), (0.98, 0.8, 0.3))  # low, between, high


def heat(maps: Tensor) -> Tensor:
    """Maps [..., H, W] in [0, 1] as colours [..., 3, H, W], dark to bright."""
    palette = torch.tensor(_HEAT, dtype=maps.dtype)
    at = maps.clamp(0, 1) * (len(palette) - 1)
    low = at.floor().clamp(max=len(palette) - 2)
    share = (at - low)[..., None]
    colours = torch.lerp(palette[low.long()], palette[low.long() + 1], share)
    return colours.movedim(-1, -3)


def example(
    model: CLIP,
    ids: Tensor,
    scenes: Scenes,
    attacked: Tensor,
    index: int,
    options: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """One attacked image through A-TPT, JSON-ready; pictures are data URIs of PNG files."""
    adapted = adapt(model, "a-tpt", classes=ids, seed=seed, **options)
    image = attacked[index]
    result = adapted.step(image, trace=True)
    views = make_views(
        image, adapted.options.views, generator=torch.Generator().manual_seed(seed),
        resolution=model.resolution,
    )  # fmt: skip
    assert isinstance(views, Views)  # of one image
    base = views.base
    stats, mixed = result.stats, result.trace["pixels"]
    selected = stats["selected"].tolist()
    others = [i for i in result.trace["entropy"].argsort().tolist() if i not in selected]
    size = (model.resolution, model.resolution)
    maps = F.interpolate(heat(stats["attention"]), size, mode="nearest")
    regions = torch.tensor(_REGIONS)[stats["region"].long()].movedim(-1, 1)
    clean = scenes.pixels[index]
    with torch.no_grad():
        said = model(torch.stack((clean, image))).argmax(1).tolist()
    moved = (image - clean) / (image - clean).abs().max().clamp(min=1e-8) / 2 + 0.5
    return {
        "digit": DIGITS[scenes.digits[index]],
        "clean": {"picture": data_uri(clean), "says": DIGITS[said[0]]},
        "attacked": {"picture": data_uri(image), "says": DIGITS[said[1]]},
        "perturbation": data_uri(moved),
        "adapted": DIGITS[int(result.logits.argmax())],
        "views": [
            {
                "view": i,
                "selected": i in selected,
                "entropy": result.trace["entropy"][i].item(),
                "tv": stats["tv"][i].item(),
                "weight": stats["weights"][i].item(),
                "says": DIGITS[int(result.trace["logits_after"][i].argmax())],
                "base": data_uri(base[i]),
                "attention": data_uri(maps[i]),
                "region": data_uri(regions[i]),
                "mixed": data_uri(mixed[i]),
            }
            for i in [*selected, *others[-SHOWN:]]
        ],
    }

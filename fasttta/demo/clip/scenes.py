"""The task of ``fasttta demo clip``: a handwritten digit in colour somewhere on coloured paper."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import CLIP
from ..digits import load_data
from .captions import DIGITS, INKS, PAPERS, PROMPT, tokenize

MODEL_PATH = Path(__file__).with_name("clip.safetensors")
RESOLUTION = 32
SIZES = (22, 32)  # pixels of a digit's side


class Scenes(NamedTuple):
    """Images and what is true of them."""

    pixels: Tensor  # [n, 3, 32, 32] in [0, 1]
    digits: Tensor  # [n], 0 to 9
    ink: Tensor  # [n], index into INKS
    paper: Tensor  # [n], index into PAPERS


def render(images: Tensor, digits: Tensor, generator: torch.Generator) -> Scenes:
    """Digits [n, 8, 8] in [0, 1] at random places, sizes and colours.

    Paper is uneven (a smooth pattern of standard deviation 0.06) and everything is slightly noisy;
    ink covers 60 to 100 % of the paper's colour.
    """
    n, r = len(images), RESOLUTION

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=torch.float32)

    side = uniform(*SIZES)
    shift = uniform(-1, 1, 2) * (1 - side / r)[:, None]  # the digit's square stays inside
    theta = torch.zeros(n, 2, 3, dtype=torch.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = r / side
    theta[:, :, 2] = -shift * (r / side)[:, None]
    grid = F.affine_grid(theta, [n, 1, r, r], align_corners=False)
    cover = F.grid_sample(images[:, None], grid, padding_mode="zeros", align_corners=False)
    cover = cover * uniform(0.6, 1, 1, 1, 1)

    ink, paper = (
        torch.randint(len(palette), (n,), generator=generator) for palette in (INKS, PAPERS)
    )
    front, back = (
        (torch.tensor(list(palette.values()), dtype=torch.float32)[chosen]
         + 0.05 * torch.randn(n, 3, generator=generator, dtype=torch.float32))[..., None, None]
        for palette, chosen in ((INKS, ink), (PAPERS, paper))
    )  # fmt: skip
    pattern = 0.08 * torch.randn(n, 3, 5, 5, generator=generator, dtype=torch.float32)
    back = back + F.interpolate(pattern, size=r, mode="bicubic")
    pixels = back + cover * (front - back)
    pixels = pixels + 0.02 * torch.randn(pixels.shape, generator=generator, dtype=torch.float32)
    return Scenes(pixels.clamp(0, 1), digits, ink, paper)


def test_scenes(n: int, seed: int) -> Scenes:
    """n different digits of the test set, none of which was seen in training.

    Raises:
        ValueError: there are not as many.
    """
    data, generator = load_data(), torch.Generator().manual_seed(seed)
    if not 1 <= n <= len(data.images):
        raise ValueError(f"samples={n}; needed 1 to {len(data.images)}, the number of test digits")
    chosen = torch.randperm(len(data.images), generator=generator)[:n]
    return render(data.images[chosen], data.image_labels[chosen], generator)


def load_clip() -> CLIP:
    """The demo's CLIP, trained on scenes of other digits with captions, classes set."""
    model = CLIP.from_checkpoint(MODEL_PATH)
    return model.set_classes(tokenize([f"{PROMPT} {name}." for name in DIGITS]))

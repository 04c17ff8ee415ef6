"""The random numbers of views, all drawn on the CPU: a seed means the same on every device.

Each view uses a row of the same number of uniforms, so the first views of a larger set are those
of a smaller one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

OPERATIONS = (
    "autocontrast", "equalize", "posterize", "rotate", "solarize",
    "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
CHAINS, DEPTH = 3, 3
_TRIES = 10
_CROP = 2 * _TRIES + 3  # area and aspect of each try, corner, flip
_CHAIN = CHAINS + 1 + CHAINS + 3 * CHAINS * DEPTH  # weights, Beta, depths, (operation, level, sign)


class Crop(NamedTuple):
    """A rectangle of the image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class ChainDraws(NamedTuple):
    """What happens to each of n views in each chain; all on the CPU.

    A chain's step s happens if s < depth.
    """

    operation: Tensor  #: int64 [n, CHAINS, DEPTH], an index into OPERATIONS
    level: Tensor  #: float64 [n, CHAINS, DEPTH] in [0.1, 1), the severity
    sign: Tensor  #: int64 [n, CHAINS, DEPTH], -1 or 1
    depth: Tensor  #: int64 [n, CHAINS], 1 to DEPTH
    share: Tensor  #: float32 [n, CHAINS], Dirichlet(1, 1, 1)
    weight: Tensor  #: float32 [n], Beta(1, 1), the base view's


def _whole(height: int, width: int, aspect: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest centred rectangle of allowed aspect."""
    if width / height < aspect[0]:
        return round(width / aspect[0]), width
    if width / height > aspect[1]:
        return height, round(height * aspect[1])
    return height, width


def _crops(
    uniform: Tensor,
    height: int,
    width: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> list[Crop]:
    """Ten tries at a rectangle of random area and (log-uniform) aspect, else the centre."""
    low, high = math.log(aspect[0]), math.log(aspect[1])
    areas = height * width * (area[0] + (area[1] - area[0]) * uniform[:, :_TRIES])
    aspects = (low + (high - low) * uniform[:, _TRIES : 2 * _TRIES]).exp()
    widths = (areas * aspects).sqrt().round().long()
    heights = (areas / aspects).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    i_try = fits.long().argmax(1, keepdim=True)  # the first that fits
    rows = zip(
        fits.any(1).tolist(),
        heights.gather(1, i_try)[:, 0].tolist(),
        widths.gather(1, i_try)[:, 0].tolist(),
        uniform[:, 2 * _TRIES :].tolist(),
        strict=True,
    )
    crops = []
    for fits, h, w, (u_top, u_left, u_flip) in rows:
        if fits:
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
        else:
            h, w = _whole(height, width, aspect)
            top, left = (height - h) // 2, (width - w) // 2
        crops.append(Crop(top, left, h, w, u_flip < 0.5))
    return crops


def _chains(uniform: Tensor) -> ChainDraws:
    n = len(uniform)
    shares, beta, depths, steps = uniform.split((CHAINS, 1, CHAINS, 3 * CHAINS * DEPTH), dim=1)
    steps = steps.reshape(n, 3, CHAINS, DEPTH)
    exponential = -(1 - shares).log()  # 1 - u is never 0
    total = exponential.sum(1, keepdim=True)
    return ChainDraws(
        operation=(steps[:, 0] * len(OPERATIONS)).long(),
        level=0.1 + 0.9 * steps[:, 1],
        sign=2 * (steps[:, 2] < 0.5).long() - 1,
        depth=1 + (depths * DEPTH).long(),
        share=torch.where(total > 0, exponential / total, 1 / CHAINS).float(),
        weight=beta[:, 0].float(),
    )


def draw(
    n: int, height: int, width: int, generator: torch.Generator
) -> tuple[list[Crop], ChainDraws]:
    """Crops of an image of height x width and augmentation chains for n views.

    Source: torchvision's RandomResizedCrop (its rule, not its random stream) and AugMix with
    three chains of one to three operations, severity 1.
    """
    uniform = torch.rand(
        n, _CROP + _CHAIN, dtype=torch.float64, generator=generator, device=generator.device
    )
    return _crops(uniform[:, :_CROP], height, width), _chains(uniform[:, _CROP:])

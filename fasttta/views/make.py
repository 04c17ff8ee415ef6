"""From an image to the views that an episode adapts on: reading it, crops, AugMix's chains.

All random numbers are drawn on the CPU: a seed means the same on every device. Each view uses a row
of the same number of uniforms, so the first views of a larger set are those of a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.checks import dense
from .operations import (
    OPERATIONS,
    Crop,
    Group,
    apply_groups,
    centre_view,
    crop_views,
    groups,
)
from .resample import resampled, taps_of
from .transfer import moved
from .views import Views, check_range

CHAINS, DEPTH = 3, 3
_TRIES = 10
_CROP = 2 * _TRIES + 3  # area and aspect of each try, corner, flip
_CHAIN = CHAINS + 1 + CHAINS + 3 * CHAINS * DEPTH  # weights, Beta, depths, (operation, level, sign)
_BASE_VIEWS = ("crop", "flip")
# Pixels at a time that stay in a CPU's cache, 8 views of 224²: 0.9 s for 63 views against 1.2 s in
# one piece. Smaller views are bound by the number of calls: 31 of 32² take 38 ms in pieces of 8, 22
# in one.
_CPU_CHUNK = 8 * 224**2


def _is_pil(image: Any) -> bool:
    return all(hasattr(image, name) for name in ("mode", "convert", "tobytes", "size"))


def _from_pil(image: Any, name: str) -> Tensor:
    if image.mode[0] in "IF":  # PIL would clip 16-bit levels to 255 without a word
        raise ValueError(
            f"{name} is a PIL image of mode {image.mode!r}; needed 8 bits per channel, e.g. 'RGB'"
        )
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width}x{image.height}; needed at least one pixel")
    levels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return levels.view(image.height, image.width, 3).permute(2, 0, 1)


def layout_advice(shape: Sequence[int], levels: bool, array: bool) -> str:
    """What to type where only the order of an image's axes is wrong; else an empty string.

    Args:
        levels: whether the image is of 8-bit levels, which lie as [H, W, 3].
        array: whether it is a NumPy array, whose axes ``transpose`` reorders.
    """
    call = "transpose" if array else "permute"
    if len(shape) == 3 and shape[0 if levels else 2] == 3:
        order, layout = ("1, 2, 0", "[3, H, W]") if levels else ("2, 0, 1", "[H, W, 3]")
        return f"; if it is {layout}, give image.{call}({order})"
    return ""


def read_image(image: Any, name: str, device: torch.device | str | None = None) -> Tensor:
    """A PIL image or tensor as uint8 levels or floats in [0, 1], [3, H, W] either way.

    Args:
        image: a PIL image with 8 bits per channel, a uint8 tensor or array [H, W, 3], or a floating
            one [3, H, W] in [0, 1]. Half precision becomes float32.
        name: what errors call it.
        device: where the result lies; None: where the image is, a PIL image on the CPU.

    Raises:
        TypeError: it is none of these.
        ValueError: its shape or its values are wrong.
    """
    array = isinstance(image, np.ndarray)
    if array:
        image = torch.from_numpy(image.copy())  # writable, without negative strides
    if isinstance(image, Tensor):
        image = dense(name, image)
    if _is_pil(image):
        pixels = _from_pil(image, name)
    elif not isinstance(image, Tensor):
        raise TypeError(
            f"{name} is a {type(image).__name__}; needed a PIL image, a floating tensor [3, H, W] "
            "in [0, 1] or a uint8 tensor [H, W, 3]"
        )
    elif image.dtype == torch.uint8:
        if image.ndim != 3 or image.shape[2] != 3 or image.numel() == 0:
            raise ValueError(
                f"{name} is uint8 with shape {list(image.shape)}; needed [H, W, 3] with at least "
                f"one pixel{layout_advice(image.shape, True, array)}"
            )
        pixels = image.permute(2, 0, 1)
    elif image.is_floating_point():
        if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(
                f"{name} has shape {list(image.shape)}; needed [3, H, W] with at least one pixel"
                f"{layout_advice(image.shape, False, array)}"
            )
        pixels = image.detach()
        if check_range(**{name: pixels}):
            pixels = pixels.clamp(0.0, 1.0)
        if pixels.dtype != torch.float64:
            pixels = pixels.float()
    else:
        raise TypeError(f"{name} is {image.dtype}; needed uint8 or floating point")
    return (pixels if device is None else pixels.to(device)).contiguous()


def to_levels(pixels: Tensor) -> Tensor:
    """Floats in [0, 1] as uint8 levels, cut and not rounded, as official code stores them.

    Levels divided by 255 in float32 come back unchanged.
    """
    return pixels if pixels.dtype == torch.uint8 else (pixels * 255).to(torch.uint8)


def to_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 levels as floats in [0, 1]; floats as they are."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images


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


def _steps(draws: ChainDraws, size: int, dtype: torch.dtype) -> list[list[Group]]:
    """What is done to the images of all chains, n * CHAINS of them, step after step."""
    depth, steps = draws.depth.flatten(), []
    for i_step in range(DEPTH):
        operation = draws.operation[..., i_step].flatten().masked_fill(depth <= i_step, -1)
        level, sign = draws.level[..., i_step].flatten(), draws.sign[..., i_step].flatten()
        steps.append(groups(operation, level, sign, size, dtype))
    return steps


def _mix(base: Tensor, steps: list[list[Group]], shares: Tensor) -> Tensor:
    images = base.repeat_interleave(CHAINS, 0)  # [n * CHAINS, 3, R, R]
    for step in steps:
        apply_groups(images, step)
    images = to_pixels(images)
    mix = torch.zeros((), device=base.device)
    for i_chain in range(CHAINS):
        pixels = images[i_chain::CHAINS]
        share = shares[:, i_chain].to(pixels.dtype)[:, None, None, None]
        mix = share * pixels if i_chain == 0 else mix.add_(share * pixels)
    return mix.clamp_(max=1.0)  # float32 shares may add up to 1 + 1e-7


def mix_chains(base: Tensor, draws: ChainDraws) -> Tensor:
    """The mixture of three augmentation chains of each view.

    Args:
        base: [n, 3, R, R], uint8 levels (every operation then follows Pillow) or floats in [0, 1].
        draws: the chains of n views.

    Returns:
        Floats [n, 3, R, R] in [0, 1] of the base's type, float32 for levels.

    Source: Hendrycks et al., "AugMix", ICLR 2020, Algorithm 1 without its last line, severity 1.
    Where the official code translates an image as if it had 224 pixels whatever its size, the
    distance here follows the size.
    """
    size, device = base.shape[-1], base.device
    if device.type != "cpu":
        steps, shares = moved((_steps(draws, size, base.dtype), draws.share), device)
        return _mix(base, steps, shares)
    pieces = zip(*(x.split(max(1, _CPU_CHUNK // size**2)) for x in (base, *draws)), strict=True)
    mixed = []
    for piece, *drawn in pieces:
        part = ChainDraws(*drawn)
        mixed.append(_mix(piece, _steps(part, size, base.dtype), part.share))
    return torch.cat(mixed)


def _weights(draws: ChainDraws) -> Tensor:
    """[n] of the base views; the anchor's is 1."""
    return torch.cat([draws.weight.new_ones(1), draws.weight])


def _one_image(
    image: Tensor, n: int, size: int, generator: torch.Generator, base_view: str, augment: bool
) -> Views:
    anchor = centre_view(image, size)
    height, width = image.shape[1:]
    crops, draws = draw(n - 1, height, width, generator)
    if base_view == "crop":
        views = [anchor, *crop_views(image, crops, size)]
    else:
        views = [anchor, *(anchor.flip(2) if crop.flip else anchor for crop in crops)]
    base = torch.stack(views)
    pixels = to_pixels(base)
    weight = _weights(draws)
    mix = pixels
    if augment and n > 1:
        mix = torch.cat([pixels[:1], mix_chains(base[1:], draws)])
    return Views.trusted(pixels, mix, weight)


def _on_device(
    image: Tensor, n: int, size: int, generator: torch.Generator, base_view: str, augment: bool,
    reference: bool, device: torch.device,
) -> Views:  # fmt: skip
    """The views on a device that is no CPU. All that is drawn, and the image if it is on the host,
    goes there in one copy, which waits for nothing."""
    crops, draws = draw(n - 1, image.shape[1], image.shape[2], generator)
    cropped, augmented = base_view == "crop", augment and n > 1
    dtype = torch.uint8 if reference else to_pixels(image[:, :0]).dtype
    weight, shares, steps, flips, taps, host = moved(
        (
            _weights(draws),
            draws.share,
            _steps(draws, size, dtype) if augmented else [],
            torch.tensor([int(crop.flip) for crop in crops], dtype=torch.int64, device="cpu"),
            taps_of(crops if cropped else [], image.shape[1:], size, dtype),
            image if image.device.type == "cpu" else None,
        ),
        device,
    )
    image = image.to(device) if host is None else host
    image = to_levels(image) if reference else to_pixels(image)
    anchor = centre_view(image, size, *taps.levels[:1])
    if not cropped:
        both = torch.stack((anchor, anchor.flip(2)))
        base = torch.cat((anchor[None], both.index_select(0, flips)))
    elif taps.floats is not None:
        base = torch.cat((anchor[None], resampled(image, taps.floats)))
    else:
        base = torch.stack([anchor, *crop_views(image, crops, size, taps.levels[1:])])
    pixels = to_pixels(base)
    mix = pixels
    if augmented:
        mix = torch.cat([pixels[:1], _mix(base[1:], steps, shares)])
    return Views.trusted(pixels, mix, weight)


@torch.inference_mode(False)  # views made within it could not be adapted on
@torch.no_grad()
def make_views(
    image: Any,
    n: int = 64,
    *,
    generator: torch.Generator,
    resolution: int = 224,
    base_view: str = "crop",
    augment: bool = True,
    reference: bool = False,
    device: torch.device | str | None = None,
) -> Views | list[Views]:
    """The anchor and n - 1 random views of an image, before and after augmentation.

    Random numbers are drawn on the CPU and pixels computed on the image's device, so that a seed
    gives the same views everywhere, up to rounding. The first views of a larger n are those of a
    smaller one.

    Args:
        image: a PIL image with 8 bits per channel, a floating tensor [3, H, W] in [0, 1] or a
            uint8 tensor [H, W, 3], RGB; or a list of them of any sizes.
        n: views, the anchor included.
        generator: a CPU generator; each image of a list goes on where the last one stopped.
        resolution: R, the views' height and width.
        base_view: "crop" is a random resized crop (area 0.08 to 1, aspect 3/4 to 4/3) flipped
            with probability 1/2, as in A-TPT's code; "flip" is the anchor flipped with
            probability 1/2, as in its paper.
        augment: False leaves AugMix out, as official code does on the variants of ImageNet:
            mix is base.
        reference: every step stores 8-bit levels and computes them exactly as Pillow does, as
            official loaders do; a floating image is first cut (not rounded) to levels. Otherwise
            nothing is rounded but what operations define on levels: the faster way, and the one
            that keeps small perturbations of the image.
        device: where to compute; None: where the image is, a PIL image on the CPU.

    Returns:
        Views, or a list of them for a list of images. float32, float64 for a float64 image
        (unless ``reference``).

    Raises:
        TypeError: an image is none of the above, or the generator no CPU generator.
        ValueError: an image has a wrong shape, no pixels, or values outside [0, 1] (as
            normalised ones have); the list is empty; another argument cannot be used.

    Source: the loaders of TPT and A-TPT. Their random stream is not reproduced.
    """
    if n < 1:
        raise ValueError(f"n is {n}; needed at least 1 view, the anchor")
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}; needed at least 1 pixel")
    if base_view not in _BASE_VIEWS:
        raise ValueError(f"base_view is {base_view!r}; needed one of {_BASE_VIEWS}")
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise TypeError(
            f"generator is {getattr(generator, 'device', type(generator).__name__)}; needed a "
            "torch.Generator on the CPU: torch.Generator().manual_seed(0)"
        )
    several = isinstance(image, (list, tuple))
    if several and not image:
        raise ValueError("image is an empty list; needed at least one image")
    views = []
    for i, x in enumerate(image if several else [image]):
        pixels = read_image(x, f"image {i}" if several else "image")
        settings = n, resolution, generator, base_view, augment
        where = pixels.device if device is None else torch.device(device)
        if where.type != "cpu":
            views.append(_on_device(pixels, *settings, reference, where))
            continue
        pixels = pixels.to(where)
        views.append(_one_image(to_levels(pixels) if reference else to_pixels(pixels), *settings))
    return views if several else views[0]

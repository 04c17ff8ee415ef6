"""Operations on pixels: crops and resizing, levels, affine warps; one of them for each view.

uint8 images follow Pillow exactly: its fixed point in resizing, its look-up tables for levels, its
float64 coordinates in warps. Floats in [0, 1] are rounded only where an operation is defined on
levels (which of 256 bins, which side of a threshold): to the nearest level and not down, so that a
value that ought to be a level is one on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATIONS = (
    "autocontrast", "equalize", "posterize", "rotate", "solarize",
    "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_BITS = 22  # Pillow's fixed point: 32 bits less 8 of the level and 2 of overshoot
_CHUNK = 32  # images a piece where coordinates are float64: 32 * 50176 * 8 B = 13 MB each
_POSTERIZE, _SOLARIZE = OPERATIONS.index("posterize"), OPERATIONS.index("solarize")


class Crop(NamedTuple):
    """A rectangle of the image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


_FILTERS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}


def _taps(length: int, size: int, mode: str) -> tuple[Tensor, Tensor]:
    """First input index [size] and fixed-point weights int32 [size, K] of each output pixel.

    The filter widens with the reduction; a window over the edge is cut and normalised again.
    """
    kernel, radius = _FILTERS[mode]
    scale = length / size
    stretch = max(scale, 1.0)
    centre = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = (centre - radius * stretch + 0.5).trunc().clamp(min=0).long()
    last = (centre + radius * stretch + 0.5).trunc().clamp(max=length).long()
    taps = torch.arange(int((last - first).max()), device="cpu")
    i_in = first[:, None] + taps  # [size, K]
    weights = kernel((i_in - centre[:, None] + 0.5) * (1 / stretch))
    weights = weights.masked_fill(i_in >= last[:, None], 0.0)
    weights = weights / weights.sum(1, keepdim=True)
    fixed = weights * (1 << _BITS)
    return first, (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc().to(torch.int32)


def _resize_levels(
    levels: Tensor, size: int, dim: int, mode: str, taps: tuple[Tensor, Tensor] | None
) -> Tensor:
    """uint8 [3, H, W] -> the same with ``size`` along ``dim``, rounded and clipped as Pillow."""
    length = levels.shape[dim]
    if length == size:
        return levels
    first, weights = taps or _taps(length, size, mode)
    shape = [1, 1, 1]
    shape[dim] = size
    # int32: 255 * 2^22 times a cubic's sum of |weights| (1.3) stays below 2^31
    total = torch.zeros((), dtype=torch.int32, device=levels.device)
    for k in range(weights.shape[1]):
        tap = levels.index_select(dim, (first + k).clamp(max=length - 1)).int()
        tap *= weights[:, k].view(shape)
        total = tap if k == 0 else total.add_(tap)
    return (total + (1 << (_BITS - 1)) >> _BITS).clamp(0, 255).to(torch.uint8)


#: for the columns and the rows of a resized image of levels: first input index and weights
LevelTaps = tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]


def level_taps(shape: tuple[int, int], height: int, width: int, mode: str) -> LevelTaps:
    """What ``resize`` needs of the host for levels of a shape (H, W); None where nothing is to be
    resized."""
    columns = None if shape[1] == width else _taps(shape[1], width, mode)
    return columns, None if shape[0] == height else _taps(shape[0], height, mode)


def resize(
    image: Tensor, height: int, width: int, mode: str, taps: LevelTaps = (None, None)
) -> Tensor:
    """Antialiased [3, H, W] -> [3, height, width]: first the width, then the height, clipped after
    each (a cubic overshoots, and Pillow stores levels between the two).

    Up to 12 Pillow always took the width first; 13 takes the cheaper order, a level or two apart.

    Args:
        mode: "bilinear" or "bicubic".
        taps: of ``level_taps``, on the device of levels; on a CPU they need not be given.
    """
    if image.dtype == torch.uint8:
        return _resize_levels(
            _resize_levels(image, width, 2, mode, taps[0]), height, 1, mode, taps[1]
        )
    if mode == "bilinear":  # nothing to clip between the passes
        image = F.interpolate(image[None], (height, width), mode=mode, antialias=True)[0]
        return image.clamp(0.0, 1.0)
    for shape in ((image.shape[1], width), (height, width)):
        if shape != image.shape[1:]:
            image = F.interpolate(image[None], shape, mode=mode, antialias=True)[0].clamp(0.0, 1.0)
    return image


def anchor_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image whose short side becomes ``size``."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def centre_view(image: Tensor, size: int, taps: LevelTaps = (None, None)) -> Tensor:
    """[3, H, W] -> the anchor [3, size, size]: short side to ``size``, bicubic, centre crop.

    The long side is rounded down and the crop's corner to the even neighbour, as in torchvision.
    """
    height, width = anchor_size(image.shape[1], image.shape[2], size)
    image = resize(image, height, width, "bicubic", taps)
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return image[:, top : top + size, left : left + size]


def crop_views(
    image: Tensor, crops: Sequence[Crop], size: int, taps: Sequence[LevelTaps] = ()
) -> list[Tensor]:
    """[3, H, W] -> one view [3, size, size] for each crop, bilinear, mirrored where it says so."""
    views = []
    for i, crop in enumerate(crops):
        part = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        part = resize(part, size, size, "bilinear", taps[i] if taps else (None, None))
        views.append(part.flip(2) if crop.flip else part)
    return views


def _nearest(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def _look_up(levels: Tensor, table: Tensor) -> Tensor:
    """uint8 levels [n, 3, R, R] through tables [n, 3, 256]."""
    return table.gather(2, levels.flatten(2).long()).view(levels.shape)


def _stretch_levels(levels: Tensor) -> Tensor:
    low, high = (x.double()[..., None] for x in torch.aminmax(levels.flatten(2), dim=2))
    scale = torch.full_like(low, 255) / (high - low)  # 255.0 / x would round 1 / x first
    steps = torch.arange(256, dtype=torch.float64, device=levels.device)
    table = torch.where(high > low, (steps * scale + -low * scale).trunc(), steps)
    return _look_up(levels, table.clamp(0, 255).to(torch.uint8))


def autocontrast(images: Tensor) -> Tensor:
    """Images [n, 3, R, R] with each channel stretched to the whole range.

    A channel of less than one level's range stays: stretching it would show rounding errors.
    """
    if images.dtype == torch.uint8:
        return _stretch_levels(images)
    low, high = (x[..., None, None] for x in torch.aminmax(images.flatten(2), dim=2))
    flat = high - low < 1 / 255
    stretched = (images - low) / (high - low).masked_fill(flat, 1.0)
    return torch.where(flat, images, stretched).clamp_(0.0, 1.0)


def equalize(images: Tensor) -> Tensor:
    """Images [n, 3, R, R] with each channel's histogram made flat; always whole levels.

    With h the histogram and s = (pixels - h[brightest]) // 255, level i becomes
    (s // 2 + h[0] + ... + h[i-1]) // s. A channel of one level, or with s = 0, stays.
    """
    levels = _nearest(images)
    flat = levels.flatten(2).long()
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=flat.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = histogram.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255  # [n, 3, 1]
    below = histogram.cumsum(2) - histogram
    table = (step // 2 + below) // step.clamp(min=1)
    steps = torch.arange(256, device=flat.device)
    table = torch.where(step > 0, table, steps).clamp(max=255).to(torch.uint8)
    equal = table.gather(2, flat).view(levels.shape)
    return equal if images.dtype == torch.uint8 else equal.to(images.dtype) / 255


def posterize(images: Tensor, bits: int) -> Tensor:
    """Images [n, 3, R, R] with only the upper ``bits`` bits of each level."""
    levels = _nearest(images) & (256 - (1 << (8 - bits)))
    return levels if images.dtype == torch.uint8 else levels.to(images.dtype) / 255


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Images [n, 3, R, R] with levels from thresholds [n] (int64) on inverted."""
    dark = _nearest(images) < thresholds[:, None, None, None]
    return torch.where(dark, images, (255 if images.dtype == torch.uint8 else 1) - images)


def rotation(degrees: int, size: int) -> tuple[float, ...]:
    """Output to input coordinates of a counter-clockwise rotation about the centre."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    half = size / 2
    return (cos, sin, cos * -half + sin * -half + half,
            -sin, cos, -sin * -half + cos * -half + half)  # fmt: skip


def _warp_levels(levels: Tensor, matrices: Tensor) -> Tensor:
    """Pillow's affine transform: coordinates and blending in float64, the blend cut to a level."""
    n, channels, size = levels.shape[:3]
    centre = torch.arange(size, dtype=torch.float64, device=levels.device) + 0.5
    a, b, c, d, e, f = (column[:, None, None] for column in matrices.unbind(1))
    x = a * centre + b * centre[:, None] + c  # [n, size, size]
    y = d * centre + e * centre[:, None] + f
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    dx, dy = (x - left)[:, None], (y - top)[:, None]
    columns = [(left + i).clamp(0, size - 1).long() for i in (0, 1)]
    rows = [(top + i).clamp(0, size - 1).long() * size for i in (0, 1)]
    flat = levels.flatten(2)

    def tap(i_row: int, i_column: int) -> Tensor:
        index = (rows[i_row] + columns[i_column]).view(n, 1, -1).expand(-1, channels, -1)
        return flat.gather(2, index).view_as(levels).double()

    def blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        return first + (second - first) * share

    upper = blend(tap(0, 0), tap(0, 1), dx)
    lower = blend(tap(1, 0), tap(1, 1), dx)
    return (blend(upper, lower, dy) * inside[:, None]).to(torch.uint8)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Images [n, 3, R, R] with output pixel (x, y) taken from (a x + b y + c, d x + e y + f).

    Coordinates are of pixel centres, (0.5, 0.5) the first. Within half a pixel of the border the
    border's value is used; beyond the image it is black.

    Args:
        images: uint8 levels or floats in [0, 1].
        matrices: float64 [n, 6] on the CPU: a, b, c, d, e, f.
    """
    return _warp(images, _warp_numbers(matrices, images.shape[-1], images.dtype).to(images.device))


def _warp_numbers(matrices: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """What ``_warp`` needs of matrices [n, 6]: for levels these, for floats [n, 2, 3] in their
    type, for coordinates from -1 to 1: the constant terms change, the linear ones do not."""
    if dtype == torch.uint8:
        return matrices
    linear, constant = matrices.view(-1, 2, 3).split((2, 1), dim=2)
    constant = linear.sum(2, keepdim=True) + constant * (2 / size) - 1
    return torch.cat([linear, constant], 2).to(dtype)


def _warp(images: Tensor, numbers: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        pieces = zip(images.split(_CHUNK), numbers.split(_CHUNK), strict=True)
        return torch.cat([_warp_levels(*piece) for piece in pieces])
    size, theta = images.shape[-1], numbers[..., None, None]
    centre = torch.arange(1 - size, size, 2, device=images.device, dtype=images.dtype) / size
    grid = theta[:, :, 0] * centre + (theta[:, :, 1] * centre[:, None] + theta[:, :, 2])
    inside = (grid >= -1) & (grid < 1)  # [n, 2, size, size]
    inside = inside[:, :1] & inside[:, 1:]
    warped = F.grid_sample(
        images, grid.movedim(1, 3).contiguous(), padding_mode="border", align_corners=False
    )
    return warped.mul_(inside).clamp_(max=1.0)


def _matrix(operation: str, level: float, sign: int, size: int) -> tuple[float, ...] | None:
    """The warp of an operation at severity 1; None where it moves nothing or is no warp."""
    if operation == "rotate":
        degrees = sign * int(3 * level)
        return rotation(degrees, size) if degrees else None
    if operation == "shear_x":
        return (1.0, sign * 0.03 * level, 0.0, 0.0, 1.0, 0.0)
    if operation == "shear_y":
        return (1.0, 0.0, 0.0, sign * 0.03 * level, 1.0, 0.0)
    if operation in ("translate_x", "translate_y"):
        pixels = sign * int(size / 30 * level)  # 7.47 at 224
        if not pixels:
            return None
        x, y = (pixels, 0) if operation == "translate_x" else (0, pixels)
        return (1.0, 0.0, float(x), 0.0, 1.0, float(y))
    return None


class Group(NamedTuple):
    """Images to which the same is done.

    Attributes:
        name: "autocontrast", "equalize", "posterize", "solarize" or "warp".
        chosen: int64, which images.
        numbers: thresholds of "solarize", what ``_warp`` takes of "warp".
        bits: of "posterize".
    """

    name: str
    chosen: Tensor
    numbers: Tensor | None = None
    bits: int = 0


def groups(
    operation: Tensor, level: Tensor, sign: Tensor, size: int, dtype: torch.dtype
) -> list[Group]:
    """One operation for each of n images, those with the same one together; all on the CPU.

    Args:
        operation: int64 [n], an index into ``OPERATIONS``; -1: none.
        level: float64 [n] in [0.1, 1), the severity.
        sign: int64 [n], -1 or 1, the direction of a warp.
        size, dtype: of the images.
    """
    made = []
    for name in ("autocontrast", "equalize"):
        made.append(Group(name, (operation == OPERATIONS.index(name)).nonzero()[:, 0]))
    bits = 4 - (0.4 * level).long()
    for n_bits in bits.unique().tolist():
        chosen = ((operation == _POSTERIZE) & (bits == n_bits)).nonzero()[:, 0]
        made.append(Group("posterize", chosen, bits=n_bits))
    chosen = (operation == _SOLARIZE).nonzero()[:, 0]
    thresholds = 256 - (25.6 * level[chosen]).long()
    made.append(Group("solarize", chosen, thresholds))

    names = [OPERATIONS[i] if i >= 0 else "" for i in operation.tolist()]
    settings = zip(names, level.tolist(), sign.tolist(), strict=True)
    matrices = [_matrix(*setting, size) for setting in settings]
    moved = [i for i, matrix in enumerate(matrices) if matrix is not None]
    if moved:
        rows = torch.tensor([matrices[i] for i in moved], dtype=torch.float64, device="cpu")
        chosen = torch.tensor(moved, device="cpu")
        made.append(Group("warp", chosen, _warp_numbers(rows, size, dtype)))
    return [group for group in made if len(group.chosen)]


def apply_groups(images: Tensor, made: Sequence[Group]) -> None:
    """Applies groups, which lie on the images' device, to images [n, 3, R, R] in place."""
    apply: dict[str, Callable[[Tensor, Group], Tensor]] = {
        "autocontrast": lambda x, _: autocontrast(x),
        "equalize": lambda x, _: equalize(x),
        "posterize": lambda x, group: posterize(x, group.bits),
        "solarize": lambda x, group: solarize(x, cast(Tensor, group.numbers)),
        "warp": lambda x, group: _warp(x, cast(Tensor, group.numbers)),
    }
    for group in made:
        images[group.chosen] = apply[group.name](images[group.chosen], group)

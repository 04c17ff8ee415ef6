"""Operations on pixels: levels against Pillow, exactly; floats against levels."""

import numpy as np
import pytest
import torch

from fasttta.views.operations import (
    autocontrast,
    centre_view,
    equalize,
    posterize,
    resize,
    rotation,
    solarize,
    warp,
)

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

# Levels of 1/255 between a float result and the 8-bit one that was rounded at every step:
# (largest on all but one pixel in a thousand, mean). Rounding apart, an operation that jumps
# (posterize, equalize) may land on the other side.
TOLERANCES = {"resize": (1.01, 0.5), "warp": (1.01, 0.6), "tone": (1.01, 0.6)}
KINDS = ("noise", "edges", "smooth", "narrow", "constant")


def _levels(height, width, kind="noise", seed=0):
    """uint8 [3, height, width]."""
    generator = np.random.default_rng(seed)
    if kind == "noise":
        levels = generator.integers(0, 256, (3, height, width))
    elif kind == "edges":
        levels = 255 * generator.integers(0, 2, (3, height, width))
    elif kind == "narrow":  # few levels, and a histogram that Pillow gives up on
        levels = generator.integers(100, 103, (3, height, width))
    elif kind == "constant":
        levels = np.broadcast_to(generator.integers(0, 256, (3, 1, 1)), (3, height, width))
    else:
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin((i + 1) * x / width + y / (i + 2)) for i in range(3)]
        levels = (127 + 90 * np.stack(waves)).round()
    return torch.from_numpy(np.ascontiguousarray(levels).astype(np.uint8))


def _pil(levels):
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _pil_resize(image, height, width, mode):
    """Width first, as Pillow did up to 12; 13 takes whichever order is cheaper."""
    resample = getattr(Image.Resampling, mode.upper())
    return image.resize((width, image.height), resample).resize((width, height), resample)


def _check_floats(floats, levels, kind):
    """floats in [0, 1] against the 8-bit result of the same operation."""
    assert 0 <= floats.min() <= floats.max() <= 1
    gap = (255 * floats.double() - levels.double()).abs().flatten()
    largest, mean = TOLERANCES[kind]
    assert gap.mean() <= mean
    assert gap.sort().values[int(0.999 * (len(gap) - 1))] <= largest


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "shape", [(37, 53, 11, 17), (9, 7, 31, 40), (1, 1, 5, 3), (300, 20, 24, 24), (16, 16, 16, 7)]
)
def test_resize(shape, mode, kind):
    height, width, new_height, new_width = shape
    levels = _levels(height, width, kind)
    expected = _from_pil(_pil_resize(_pil(levels), new_height, new_width, mode))
    assert torch.equal(resize(levels, new_height, new_width, mode), expected)
    floats = resize(levels.float() / 255, new_height, new_width, mode)
    # a cubic's clipped overshoot is rounded once more by Pillow, between the two passes
    gap = (floats * 255 - expected).abs()
    assert gap.max() < 1.6
    assert gap.mean() < TOLERANCES["resize"][1]


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (24, 24), (5, 9), (75, 30)])
def test_centre_view(shape):
    levels = _levels(*shape)
    height, width = shape
    new = (24, 24 * width // height) if height <= width else (24 * height // width, 24)
    image = _pil_resize(_pil(levels), *new, "bicubic")
    top, left = round((new[0] - 24) / 2), round((new[1] - 24) / 2)
    expected = _from_pil(image.crop((left, top, left + 24, top + 24)))
    assert torch.equal(centre_view(levels, 24), expected)


WARPS = {
    "rotate 1": (rotation(1, 23), lambda x: x.rotate(1, Image.Resampling.BILINEAR)),
    "rotate -2": (rotation(-2, 23), lambda x: x.rotate(-2, Image.Resampling.BILINEAR)),
    "rotate 45": (rotation(45, 23), lambda x: x.rotate(45, Image.Resampling.BILINEAR)),
    "shear_x": ((1.0, 0.0291, 0.0, 0.0, 1.0, 0.0), (1, 0.0291, 0, 0, 1, 0)),
    "shear_x back": ((1.0, -0.3, 0.0, 0.0, 1.0, 0.0), (1, -0.3, 0, 0, 1, 0)),
    "shear_y": ((1.0, 0.0, 0.0, -0.0173, 1.0, 0.0), (1, 0, 0, -0.0173, 1, 0)),
    "translate_x": ((1.0, 0.0, 3.0, 0.0, 1.0, 0.0), (1, 0, 3, 0, 1, 0)),
    "translate_y": ((1.0, 0.0, 0.0, 0.0, 1.0, -5.0), (1, 0, 0, 0, 1, -5)),
    "beyond": ((1.0, 0.0, 40.0, 0.0, 1.0, 0.0), (1, 0, 40, 0, 1, 0)),
}


def _pil_warp(image, how):
    if callable(how):
        return how(image)
    return image.transform(image.size, Image.Transform.AFFINE, how, Image.Resampling.BILINEAR)


def test_warps_in_one_batch():
    kinds = [("noise", "edges", "smooth")[i % 3] for i in range(len(WARPS))]
    levels = torch.stack([_levels(23, 23, kind, seed=i) for i, kind in enumerate(kinds)])
    matrices = torch.tensor([matrix for matrix, _ in WARPS.values()], dtype=torch.float64)
    actual = warp(levels, matrices)
    for i, (name, (_, how)) in enumerate(WARPS.items()):
        expected = _from_pil(_pil_warp(_pil(levels[i]), how))
        assert torch.equal(actual[i], expected), name
    for dtype in (torch.float32, torch.float64):
        floats = warp(levels.to(dtype) / 255, matrices)
        assert floats.dtype == dtype
        _check_floats(floats, actual, "warp")


TONES = {
    "autocontrast": (autocontrast, ImageOps.autocontrast),
    "equalize": (equalize, ImageOps.equalize),
    "posterize 4": (lambda x: posterize(x, 4), lambda x: ImageOps.posterize(x, 4)),
    "posterize 1": (lambda x: posterize(x, 1), lambda x: ImageOps.posterize(x, 1)),
    "solarize 231": (
        lambda x: solarize(x, torch.full((len(x),), 231)),
        lambda x: ImageOps.solarize(x, 231),
    ),
    "solarize 0": (
        lambda x: solarize(x, torch.zeros(len(x), dtype=torch.int64)),
        lambda x: ImageOps.solarize(x, 0),
    ),
}


@pytest.mark.parametrize("name", TONES)
@pytest.mark.parametrize("size", [1, 5, 37])
def test_tones(name, size):
    function, oracle = TONES[name]
    levels = torch.stack([_levels(size, size, kind, seed=size) for kind in KINDS])
    before = levels.clone()
    actual = function(levels)
    for image, result, kind in zip(levels, actual, KINDS, strict=True):
        assert torch.equal(result, _from_pil(oracle(_pil(image)))), kind
    assert torch.equal(levels, before)
    for dtype in (torch.float32, torch.float64):
        floats = function(levels.to(dtype) / 255)
        assert floats.dtype == dtype
        _check_floats(floats, actual, "tone")


def test_equalize_clips_what_pillow_clips():
    """A brightest level that holds nearly all pixels leaves steps of one: levels beyond 255."""
    levels = _levels(37, 37, "noise")[None].clone()
    levels[..., 10:, :] = 200
    assert torch.equal(equalize(levels)[0], _from_pil(ImageOps.equalize(_pil(levels[0]))))


def test_autocontrast_keeps_rounding_errors_small():
    image = torch.full((1, 3, 4, 4), 0.5)
    image[0, 0, 1, 2] += 1e-6
    assert torch.equal(autocontrast(image), image)
    image[0, 0, 1, 2] = 0.75
    assert autocontrast(image)[0, 0].unique().tolist() == [0.0, 1.0]

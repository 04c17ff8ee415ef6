"""CAV-MAE's video input: against PIL's own calls, and tensors against the PIL path."""

import numpy as np
import pytest
import torch

from fasttta.data import cavmae_frame

Image = pytest.importorskip("PIL.Image")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
# In levels of 1/255. uint8: torch and PIL (fixed point) round a value near .5 apart, in each of
# two passes. float: not rounded at all, measured 1.1.
TOLERANCES = {"uint8": 1.01, "float": 1.5}

# width, height of the image; of the resized image; left, top of the crop
SHAPES = [
    (533, 300, 397, 224, 86, 0),  # 397.97 is cut to 397; 86.5 rounds to the even 86
    (535, 300, 399, 224, 88, 0),  # 87.5 rounds to the even 88
    (301, 537, 224, 399, 0, 88),
    (300, 300, 224, 224, 0, 0),
    (224, 224, 224, 224, 0, 0),
    (300, 224, 300, 224, 38, 0),
    (100, 80, 280, 224, 28, 0),
    (7, 9, 224, 288, 0, 32),
    (1, 1, 224, 224, 0, 0),
]


def _pixels(width, height, kind="noise", seed=0):
    generator = np.random.default_rng(seed)
    if kind == "edges":  # only black and white: bicubic overshoots everywhere
        return 255 * generator.integers(0, 2, (height, width, 3), dtype=np.uint8)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_pil_path(shape):
    width, height, new_width, new_height, left, top = shape
    image = Image.fromarray(_pixels(width, height))
    resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    crop = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64)
    expected = ((crop / 255 - MEAN) / STD).transpose(2, 0, 1)
    actual = cavmae_frame(image)
    assert actual.shape == (3, 224, 224)
    assert actual.dtype == torch.float32
    assert np.abs(actual.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_match_pil(shape, kind):
    pixels = _pixels(*shape[:2], kind)
    expected = cavmae_frame(Image.fromarray(pixels), **PLAIN)
    levels = torch.from_numpy(pixels)
    floats = levels.permute(2, 0, 1) / 255
    for image, name in ((pixels, "uint8"), (levels, "uint8"), (floats, "float")):
        actual = cavmae_frame(image, **PLAIN)
        assert actual.dtype == torch.float32
        assert actual.shape == expected.shape
        assert actual.is_contiguous()
        assert 255 * (actual - expected).abs().max() < TOLERANCES[name]
        assert 0 <= actual.min() <= actual.max() <= 1
    rounded = 255 * cavmae_frame(levels, **PLAIN)
    assert (rounded - rounded.round()).abs().max() < 1e-4
    assert (rounded.round() != 255 * expected).float().mean() < 0.01


def test_solid_colour_is_normalised_by_channel():
    pixels = np.empty((50, 60, 3), dtype=np.uint8)
    pixels[:] = (255, 0, 51)
    value = torch.tensor([1.0, 0.0, 0.2])
    expected = (value - torch.tensor(MEAN)) / torch.tensor(STD)
    images = (Image.fromarray(pixels), pixels, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    for image in images:
        actual = cavmae_frame(image)
        assert (actual - expected[:, None, None]).abs().max() < 1e-5


def test_other_size_and_statistics():
    image = Image.fromarray(_pixels(30, 20))
    resized = np.asarray(image.resize((16, 11), Image.Resampling.BICUBIC))[:, 2:13]
    actual = cavmae_frame(image, size=11, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    expected = (resized.transpose(2, 0, 1) / 255 - np.array([[[0.1]], [[0.2]], [[0.3]]])) / (
        np.array([[[1.0]], [[2.0]], [[4.0]]])
    )
    assert np.abs(actual.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pil_modes_are_converted_before_resizing(mode):
    image = Image.fromarray(_pixels(40, 30)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(_pixels(40, 30, seed=1)[:, :, 0]))
    assert torch.equal(cavmae_frame(image, size=20), cavmae_frame(image.convert("RGB"), size=20))


def test_strided_and_read_only_arrays():
    pixels = _pixels(40, 30)
    expected = cavmae_frame(pixels[::-1, :, ::-1].copy(), size=20)
    assert torch.equal(cavmae_frame(pixels[::-1, :, ::-1], size=20), expected)
    read_only = np.ascontiguousarray(pixels[::-1, :, ::-1])
    read_only.flags.writeable = False
    assert torch.equal(cavmae_frame(read_only, size=20), expected)


def test_does_not_write_into_the_image():
    for image in (torch.from_numpy(_pixels(20, 20)), torch.rand(3, 20, 20)):
        before = image.clone()
        cavmae_frame(image, size=20)
        cavmae_frame(image, size=11)
        assert torch.equal(image, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_float_dtypes(dtype):
    image = torch.rand(3, 30, 40).to(dtype)
    assert torch.equal(cavmae_frame(image), cavmae_frame(image.float()))
    assert torch.equal(cavmae_frame(image.numpy()), cavmae_frame(image))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("frame.jpg", TypeError, "image is a str"),
        (torch.zeros(8, 8, 3, dtype=torch.int64), TypeError, "image is torch.int64"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"\[3, 8, 8\].*permute\(1, 2, 0\)"),
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, r"shape \[8, 8\]"),
        (torch.zeros(8, 8, 3), ValueError, r"\[8, 8, 3\].*permute\(2, 0, 1\)"),
        (torch.zeros(1, 3, 8, 8), ValueError, r"shape \[1, 3, 8, 8\]"),
        (torch.zeros(3, 0, 8), ValueError, "at least one pixel"),
        (torch.full((3, 8, 8), -0.01), ValueError, "from -0.01 .*already normalised"),
        (torch.full((3, 8, 8), 1.5), ValueError, r"to 1.5; needed \[0, 1\].*already normalised"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "from nan"),
        (Image.new("I;16", (8, 8)), ValueError, "mode 'I;16'"),
        (Image.new("F", (8, 8)), ValueError, "mode 'F'"),
        (Image.new("RGB", (0, 8)), ValueError, "image is 0x8"),
    ],
)
def test_image_errors(image, error, message):
    with pytest.raises(error, match=message):
        cavmae_frame(image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"mean": (0.5, 0.5)}, "mean is"),
        ({"std": (0.5, 0.5)}, "std is"),
        ({"std": (0.5, 0.5, 0.0)}, "std is"),
    ],
)
def test_setting_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        cavmae_frame(torch.zeros(3, 8, 8), **settings)

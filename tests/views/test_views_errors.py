"""Views and images that cannot be used: the message names the argument, found and needed."""

import pytest
import torch

from fasttta.views import Views, make_views

Image = pytest.importorskip("PIL.Image")

PHOTO = Image.new("RGB", (9, 8), (10, 200, 90))
GOOD = {"base": torch.rand(2, 3, 4, 4), "mix": torch.rand(2, 3, 4, 4), "weight": torch.rand(2)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": [1.0]}, TypeError, "base is a list"),
        ({"base": torch.rand(3, 4, 4)}, ValueError, r"base has shape \[3, 4, 4\]; needed \[N, 3"),
        ({"base": torch.rand(2, 1, 4, 4)}, ValueError, r"base has shape \[2, 1, 4, 4\]"),
        ({"base": torch.rand(0, 3, 4, 4)}, ValueError, "none of them empty"),
        ({"base": torch.rand(2, 3, 4, 5)}, ValueError, "square"),
        ({"base": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, "base is torch.uint8"),
        ({"base": torch.rand(2, 3, 4, 4) - 1}, ValueError, "base has pixels.*already normalised"),
        ({"base": torch.full((2, 3, 4, 4), torch.nan)}, ValueError, "base has pixels from nan"),
        ({"mix": torch.rand(2, 3, 5, 5)}, ValueError, r"mix has shape \[2, 3, 5, 5\]"),
        ({"mix": torch.rand(2, 3, 4, 4).double()}, TypeError, "mix is torch.float64 and base"),
        ({"mix": torch.full((2, 3, 4, 4), 255.0)}, ValueError, "mix has pixels from 255 to 255"),
        ({"weight": torch.rand(3)}, ValueError, r"weight has shape \[3\]; needed \[2\]"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, TypeError, "weight is torch.int64"),
        ({"weight": torch.tensor([0.0, 1.1])}, ValueError, r"weight has values from 0 to 1.1"),
        ({"region": torch.zeros(2, 4, 4)}, TypeError, "region is torch.float32; needed uint8"),
        ({"region": torch.zeros(1, 4, 4).byte()}, ValueError, r"region has shape \[1, 4, 4\]"),
        ({"region": torch.full((2, 4, 4), 3).byte()}, ValueError, "region has values from 3 to 3"),
    ],
)
def test_views_errors(change, error, message):
    with pytest.raises(error, match=message):
        Views(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([], ValueError, "empty list"),
        ("cat.jpg", TypeError, "image is a str; needed a PIL image"),
        ([PHOTO, None], TypeError, "image 1 is a NoneType"),
        (torch.rand(4, 8, 8), ValueError, r"image has shape \[4, 8, 8\]"),
        (torch.rand(8, 8, 3), ValueError, r"permute\(2, 0, 1\)"),
        (torch.rand(1, 3, 8, 8), ValueError, r"shape \[1, 3, 8, 8\]"),
        (torch.rand(3, 0, 8), ValueError, "at least one pixel"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"\[3, 8, 8\].*permute\(1, 2, 0\)"),
        (torch.zeros(8, 8, 3, dtype=torch.int64), TypeError, "image is torch.int64"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "image has pixels from nan"),
        (torch.full((3, 8, 8), -2.1), ValueError, "from -2.1 .*already normalised"),
        ([torch.zeros(3, 8, 8), torch.full((3, 8, 8), 255.0)], ValueError, "image 1 has pixels"),
        (Image.new("I;16", (8, 8)), ValueError, "mode 'I;16'"),
        (Image.new("RGB", (0, 8)), ValueError, "image is 0x8"),
    ],
)
def test_image_errors(image, error, message):
    with pytest.raises(error, match=message):
        make_views(image, 2, generator=torch.Generator(), resolution=8)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n": 0}, ValueError, "n is 0"),
        ({"resolution": 0}, ValueError, "resolution is 0"),
        ({"base_view": "five"}, ValueError, "base_view is 'five'"),
        ({"generator": None}, TypeError, "generator is NoneType"),
        ({"generator": 3}, TypeError, "generator is int"),
    ],
)
def test_setting_errors(settings, error, message):
    with pytest.raises(error, match=message):
        make_views(PHOTO, **{"generator": torch.Generator(), **settings})

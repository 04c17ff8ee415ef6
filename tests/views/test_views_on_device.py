"""Views made on a device: one copy from the host, and the pixels of the CPU.

Without a GPU the device's way is run on the CPU, and copies are counted on the meta device.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from host_copies import HostCopies

from fasttta.views import make, make_views, operations, resample

SHAPES = [(31, 40), (64, 64), (20, 90), (24, 24), (9, 7)]


def picture(height, width, kind):
    x = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    if kind == "levels":
        return (x * 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    return x.double() if kind == "float64" else x


def seeded():
    return torch.Generator().manual_seed(3)


def on_device(image, n, device="cpu", size=24, base_view="crop", augment=True, reference=False):
    """The way of a GPU, on any device."""
    pixels = make.read_image(image, "image")
    return make._on_device(
        pixels, n, size, seeded(), base_view, augment, reference, torch.device(device)
    )


def equal(a, b, tolerance):
    for name in ("base", "mix", "weight"):
        x, y = getattr(a, name).cpu(), getattr(b, name)
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert (x - y).abs().max() <= tolerance, name


@pytest.mark.parametrize("kind", ["levels", "float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_base_views_are_those_of_the_cpu(shape, kind, n):
    image = picture(*shape, kind)
    for base_view in ("crop", "flip"):
        options = {"base_view": base_view, "augment": False}
        expected = make_views(image, n, generator=seeded(), resolution=24, **options)
        # float32 interpolation rounds its coordinates
        equal(on_device(image, n, **options), expected, 1e-12 if kind == "float64" else 5e-6)


@pytest.mark.parametrize("kind", ["levels", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_levels_are_those_of_the_cpu_to_the_bit(shape, kind):
    image = picture(*shape, kind)
    for base_view in ("crop", "flip"):
        options = {"base_view": base_view, "reference": True}
        expected = make_views(image, 9, generator=seeded(), resolution=24, **options)
        equal(on_device(image, 9, **options), expected, 0)


def test_chains_are_those_of_the_cpu(monkeypatch):
    """From the same base views: rounding in these may turn a level over."""
    monkeypatch.setattr(resample, "_PRODUCTS", 0)  # one crop after the other, as on the CPU
    for shape in SHAPES:
        image = picture(*shape, "float32")
        expected = make_views(image, 20, generator=seeded(), resolution=24)
        equal(on_device(image, 20), expected, 0)


def test_both_ways_use_the_same_random_numbers():
    generators = seeded(), seeded()
    image = picture(31, 40, "float32")
    make_views(image, 5, generator=generators[0], resolution=24)
    pixels = make.read_image(image, "image")
    make._on_device(pixels, 5, 24, generators[1], "crop", True, False, torch.device("cpu"))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("size", [(500, 375), (224, 224), (30, 900)])
def test_crops_at_once(size):
    """Reduced, enlarged, at the border, of a single pixel, mirrored."""
    height, width = size
    image = torch.rand(3, height, width, generator=seeded())
    crops, _ = make.draw(30, height, width, seeded())
    crops += [
        operations.Crop(0, 0, height, width, True),
        operations.Crop(height - 1, width - 1, 1, 1, False),
        operations.Crop(3, 5, 24, 24, True),
        operations.Crop(0, width - 25, 7, 25, False),
    ]
    taps = resample.taps_of(crops, size, 24, torch.float32).floats
    expected = torch.stack(operations.crop_views(image, crops, 24))
    assert (resample.resampled(image, taps) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("options", [
    {}, {"base_view": "flip"}, {"augment": False}, {"reference": True},
    {"reference": True, "base_view": "flip"},
])  # fmt: skip
@pytest.mark.parametrize("n", [1, 2, 9])
def test_one_copy(options, n):
    """Of a host image; large images, whose crops are resized one after the other, included."""
    for image in (picture(31, 40, "float32"), np.zeros((40, 33, 3), np.uint8)):
        with HostCopies() as copies:
            views = make_views(
                image, n, generator=seeded(), resolution=24, device="meta", **options
            )
        assert views.base.shape == (n, 3, 24, 24)
        assert views.base.device.type == "meta"
        assert len(copies.to_device) == 1, copies.to_device


def test_one_copy_of_what_is_drawn(monkeypatch):
    """The image lies on the device."""
    monkeypatch.setattr(make, "check_range", lambda **_: False)  # one read from the device
    for products in (0, resample._PRODUCTS):
        monkeypatch.setattr(resample, "_PRODUCTS", products)
        with HostCopies() as copies:
            make_views(torch.empty(3, 31, 40, device="meta"), 9, generator=seeded(), resolution=24)
        assert len(copies.to_device) == 1, copies.to_device

"""Views of an image: what they are made of, seeds, devices, errors."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fasttta.data import Views as PublicViews
from fasttta.views import Views, make_views
from fasttta.views.chains import mix_chains
from fasttta.views.draw import DEPTH, OPERATIONS, draw

# levels of 1/255, on average over a view, between floats and views rounded at every step; the
# mean holds posterize's jumps of 16 levels
TOLERANCES = {"base": 0.5, "mix": 3.0}


def _image(height=61, width=83, seed=0):
    """PIL, smooth with some noise: flat areas and ties are rare, as in photographs."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    noise = generator.integers(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(smooth, dtype=np.int64) * 0.95 + noise).astype(np.uint8))


def _floats(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _make(image=None, n=9, seed=0, resolution=32, **settings):
    image = _image() if image is None else image
    return make_views(image, n, generator=_seeded(seed), resolution=resolution, **settings)


def _equal(a, b):
    return all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("base", "mix", "weight"))


def test_public_name():
    assert PublicViews is Views


@pytest.mark.parametrize("base_view", ["crop", "flip"])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("shape", [(61, 83), (40, 33), (32, 32), (9, 200), (1, 1)])
def test_views(shape, base_view, reference):
    views = _make(_image(*shape), base_view=base_view, reference=reference)
    assert len(views) == 9
    assert views.resolution == 32
    assert views.base.shape == views.mix.shape == (9, 3, 32, 32)
    assert views.base.dtype == views.mix.dtype == views.weight.dtype == torch.float32
    assert torch.equal(views.mix[0], views.base[0])
    assert views.weight[0] == 1
    assert len(views.weight.unique()) == 9
    assert views.region is None
    Views(views.base, views.mix, views.weight)  # its checks hold
    if base_view == "flip":
        for view in views.base:
            assert torch.equal(view, views.base[0]) or torch.equal(view, views.base[0].flip(2))


@pytest.mark.parametrize("shape", [(61, 83), (90, 40)])
def test_rounding_is_all_that_reference_adds(shape):
    # equalize divides pixels by 255 levels: at 32 x 32 one pixel of the brightest moves all by 20
    settings = {"image": _image(*shape), "n": 33, "resolution": 128}
    floats, levels = _make(**settings), _make(**settings, reference=True)
    assert torch.equal(floats.weight, levels.weight)
    for name in ("base", "mix"):
        gap = 255 * (getattr(floats, name) - getattr(levels, name)).abs()
        assert gap.mean((1, 2, 3)).max() < TOLERANCES[name]


def _pil_operation(image, name, level, sign):
    size = image.size[0]
    bilinear = Image.Resampling.BILINEAR
    matrix = {
        "shear_x": (1, sign * 0.03 * level, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * 0.03 * level, 1, 0),
        "translate_x": (1, 0, sign * int(size / 30 * level), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * int(size / 30 * level)),
    }
    if name in matrix:
        return image.transform(image.size, Image.Transform.AFFINE, matrix[name], bilinear)
    if name == "rotate":
        return image.rotate(sign * int(3 * level), bilinear)
    if name == "posterize":
        return ImageOps.posterize(image, 4 - int(0.4 * level))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - int(25.6 * level))
    return getattr(ImageOps, name)(image)


def test_reference_is_pillow_from_end_to_end():
    """The official loader's chains written with Pillow, fed with the same random numbers."""
    image, n, size = _image(75, 90), 40, 64
    views = _make(image, n=n + 1, resolution=size, reference=True)
    crops, draws = draw(n, 75, 90, _seeded())
    tried = set()
    for i, crop in enumerate(crops):
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        part = image.crop(box)  # width first: Pillow 13 may take the height first
        for shape in ((size, crop.height), (size, size)):
            part = part.resize(shape, Image.Resampling.BILINEAR)
        part = ImageOps.mirror(part) if crop.flip else part
        assert torch.equal(_floats(part), views.base[i + 1])
        mix = torch.zeros(3, size, size)
        for i_chain in range(3):
            chain = part
            for i_step in range(int(draws.depth[i, i_chain])):
                at = i, i_chain, i_step
                name = OPERATIONS[draws.operation[at]]
                tried.add(name)
                chain = _pil_operation(chain, name, draws.level[at].item(), draws.sign[at].item())
            mix += draws.share[i, i_chain] * _floats(chain)
        assert (mix - views.mix[i + 1]).abs().max() < 2e-7
    assert tried == set(OPERATIONS)


def test_kinds_of_input_agree():
    image = _image()
    array = torch.from_numpy(np.array(image))
    expected = _make(image)
    assert _equal(_make(array), expected)
    assert _equal(_make(_floats(image)), expected)
    assert _equal(_make(_floats(image).half().float().half()), _make(_floats(image).half().float()))
    assert _equal(_make(_floats(image), reference=True), _make(image, reference=True))
    for mode in ("L", "RGBA", "P"):
        assert _equal(_make(image.convert(mode)), _make(image.convert(mode).convert("RGB")))
    double = _make(_floats(image).double())
    assert double.base.dtype == double.mix.dtype == torch.float64
    assert (double.base - expected.base).abs().max() < 1e-6


def test_all_levels_survive_floats():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    views = _make(levels / 255.0, n=1, resolution=16, reference=True)
    assert torch.equal(views.base[0], levels / 255.0)


def test_small_perturbations_are_kept():
    """An adversarial image in floats must not be rounded away, but in reference mode it is cut."""
    clean = _floats(_image(32, 32))
    adversarial = (clean + 0.3 / 255).clamp(0, 1)
    assert (_make(adversarial).base[0] > _make(clean).base[0]).float().mean() > 0.9
    assert _equal(_make(adversarial, reference=True), _make(clean, reference=True))


def test_seeds():
    first, again, other = _make(), _make(), _make(seed=1)
    assert _equal(first, again)
    assert torch.equal(first.base[0], other.base[0])
    assert not torch.equal(first.base[1:], other.base[1:])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert _equal(_make(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_smaller_sets_begin_larger_ones():
    many = _make(n=21)
    for n in (1, 2, 9, 20):
        few = _make(n=n)
        for name in ("base", "mix", "weight"):
            assert torch.equal(getattr(few, name), getattr(many, name)[:n])


def test_several_images():
    images = [_image(61, 83), _floats(_image(20, 90, seed=1)), _image(33, 32, seed=2)]
    views = _make(images)
    generator = _seeded()
    for image, found in zip(images, views, strict=True):
        assert _equal(make_views(image, 9, generator=generator, resolution=32), found)
    assert isinstance(_make(images[:1]), list)


def test_without_augmentation():
    plain, augmented = _make(augment=False), _make()
    assert torch.equal(plain.mix, plain.base)
    assert torch.equal(plain.base, augmented.base)
    assert (plain.augmix - plain.base).abs().max() < 1e-7


def test_augmix_is_the_weighted_sum():
    views = _make(_floats(_image()).double())
    weight = views.weight.double()[:, None, None, None]
    assert (views.augmix - (views.mix + weight * (views.base - views.mix))).abs().max() < 1e-12
    assert torch.equal(views.augmix[0], views.base[0])


def test_distributions():
    crops, draws = draw(4000, 100, 150, _seeded())
    area = torch.tensor([c.height * c.width / 15000 for c in crops])
    aspect = torch.tensor([c.width / c.height for c in crops])
    assert area.min() >= 0.075
    assert area.max() <= 1
    small = area[area < 0.4]  # of these, all aspects fit: uniform between 0.08 and 0.4
    assert abs(small.mean() - 0.24) < 0.005
    assert abs(small.var() - 0.32**2 / 12) < 0.0005
    assert aspect.min() >= 0.73
    assert aspect.max() <= 1.37
    assert abs(aspect[area < 0.4].log().mean()) < 0.02
    assert abs(sum(c.flip for c in crops) / 4000 - 0.5) < 0.03
    for c in crops:
        assert min(c.top, c.left) >= 0
        assert c.top + c.height <= 100
        assert c.left + c.width <= 150
    assert (draws.share.sum(1) - 1).abs().max() < 1e-6
    assert (draws.share.mean(0) - 1 / 3).abs().max() < 0.02
    assert abs(draws.share.var(0).mean() - 1 / 18) < 0.005  # of Dirichlet(1, 1, 1)
    assert abs(draws.weight.mean() - 0.5) < 0.02
    assert abs(draws.weight.var() - 1 / 12) < 0.005  # of the uniform Beta(1, 1)
    counts = draws.operation.flatten().bincount()
    assert len(counts) == len(OPERATIONS)
    assert (counts / counts.sum() - 1 / 9).abs().max() < 0.01
    assert (draws.depth.flatten().bincount()[1:] / 12000 - 1 / DEPTH).abs().max() < 0.02
    assert abs(draws.sign.double().mean()) < 0.02
    assert draws.level.min() >= 0.1
    assert draws.level.max() < 1


@pytest.mark.parametrize(("shape", "crop"), [((10, 400), (10, 13)), ((400, 10), (13, 10))])
def test_extreme_shapes_fall_back_to_the_centre(shape, crop):
    crops, _ = draw(50, *shape, _seeded())
    centred = [c for c in crops if (c.height, c.width) == crop]
    assert len(centred) > 10
    for c in centred[:3]:
        assert (c.top, c.left) == ((shape[0] - crop[0]) // 2, (shape[1] - crop[1]) // 2)


def test_chains_leave_their_input():
    base = torch.rand(4, 3, 16, 16, generator=_seeded())
    before = base.clone()
    mix_chains(base, draw(4, 16, 16, _seeded())[1])
    assert torch.equal(base, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reference", [False, True])
def test_gpu_equals_cpu(reference):
    image = _image(200, 300)
    cpu = _make(image, n=64, resolution=224, reference=reference)
    gpu = _make(image, n=64, resolution=224, reference=reference, device="cuda")
    assert gpu.base.device.type == "cuda"
    for name in ("base", "mix"):
        gap = (getattr(cpu, name) - getattr(gpu, name).cpu()).abs()
        # a value on a threshold may fall on either side of it
        assert (gap > 1e-4).float().mean() < 1e-4


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
        ([_image(), None], TypeError, "image 1 is a NoneType"),
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
        _make(image)


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
        make_views(_image(), **{"generator": _seeded(), **settings})

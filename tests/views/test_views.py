"""Views of an image: what they are made of, seeds, devices."""

import numpy as np
import pytest
import torch

from fasttta.data import Views as PublicViews
from fasttta.views import Views, make_views
from fasttta.views.make import DEPTH, draw, mix_chains
from fasttta.views.operations import OPERATIONS

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

# levels of 1/255, on average over a view, between floats and views rounded at every step; the
# mean holds posterize's jumps of 16 levels
TOLERANCES = {"base": 0.5, "mix": 3.0}
# Share of pixels that another device's rounding may move by more than 1e-4 and by more than a
# level. One pixel on the other side of a threshold moves a level of equalize's table, so a whole
# bin by 1/255; posterize and solarize jump. Measured, float64 for the other device: 6e-4, 3e-5.
DEVICE = {1e-4: 3e-3, 1.01 / 255: 1e-4}


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
    for image, values in zip(images, views, strict=True):
        assert _equal(make_views(image, 9, generator=generator, resolution=32), values)
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


def test_made_in_inference_mode():
    image = _floats(_image())
    expected = _make(image)
    with torch.inference_mode():
        views = _make(image.clone())
    assert _equal(views, expected)
    assert not views.base.is_inference()
    assert not views.mix.is_inference()


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
    # every place is as likely, both edges included
    few = [(c.top, 100 - c.height) for c in crops if 0 < 100 - c.height <= 4]
    assert len(few) > 20
    assert {top == 0 for top, _ in few} == {top == free for top, free in few} == {True, False}
    shares = torch.tensor([(c.top / (100 - c.height), c.left / (150 - c.width)) for c in crops
                           if c.height < 70])  # fmt: skip
    assert (shares.mean(0) - 0.5).abs().max() < 0.02
    assert (draws.share.sum(1) - 1).abs().max() < 1e-6
    assert (draws.share.mean(0) - 1 / 3).abs().max() < 0.02
    assert abs(draws.share.var(0).mean() - 1 / 18) < 0.005  # of Dirichlet(1, 1, 1)
    assert abs(draws.weight.mean() - 0.5) < 0.02
    assert abs(draws.weight.var() - 1 / 12) < 0.005  # of the uniform Beta(1, 1)
    counts = draws.operation.flatten().bincount()
    assert len(counts) == len(OPERATIONS)
    assert (counts / counts.sum() - 1 / 9).abs().max() < 0.01
    depths = draws.depth.flatten().bincount(minlength=DEPTH + 1) / 12000
    assert depths.tolist() == pytest.approx([0, *[1 / DEPTH] * DEPTH], abs=0.02)
    assert abs(draws.sign.double().mean()) < 0.02
    assert draws.level.min() >= 0.1
    assert draws.level.max() < 1
    assert draws.level.mean().item() == pytest.approx(0.55, abs=0.01)


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


def _check_devices(one, other):
    for name in ("base", "mix"):
        gap = (getattr(one, name).cpu() - getattr(other, name).cpu()).abs()
        for size, share in DEVICE.items():
            assert (gap > size).double().mean() < share
        assert gap.median() < 1e-6


def test_other_rounding_moves_few_pixels():
    image = _floats(_image(200, 300))
    settings = {"n": 17, "resolution": 112}
    _check_devices(_make(image, **settings), _make(image.double(), **settings))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reference", [False, True])
def test_gpu_equals_cpu(reference):
    image = _image(200, 300)
    cpu = _make(image, n=64, resolution=224, reference=reference)
    gpu = _make(image, n=64, resolution=224, reference=reference, device="cuda")
    assert gpu.base.device.type == "cuda"
    _check_devices(cpu, gpu)

"""Views of an image against the official loaders' way of making them, in Pillow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fasttta.views import make, make_views, operations

Image, ImageOps = (pytest.importorskip(f"PIL.{name}") for name in ("Image", "ImageOps"))


@pytest.mark.parametrize("kind", ["levels", "floats"])
@pytest.mark.parametrize("views", [64])
def bench_views(views, kind, device, full, measure):
    """Crops and augmentation chains of a 500 x 375 image; the reference is what official loaders
    do, in Pillow, from the same random numbers. "levels": 8-bit views as Pillow's, to the bit;
    "floats", the default: nothing is rounded, so that only the crops are compared."""
    height, width, size, n = (375, 500, 224, views) if full else (40, 37, 24, 5)
    coarse = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(4))
    image = nnf.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)
    image = (image * 255).to(torch.uint8).permute(1, 2, 0).contiguous()

    def ours():
        made = make_views(image, n, generator=torch.Generator().manual_seed(0), resolution=size,
                           reference=kind == "levels", device=device)  # fmt: skip
        return outputs(made.base, made.mix)

    # on a GPU a crop may round to the next level, and chains make more of it: see tests/views
    exact = kind == "levels" and device.type == "cpu"

    def outputs(base, mix):
        return (base, mix) if exact else (base,)

    measure(
        ours,
        lambda: outputs(*(x.to(device) for x in pillow_views(image, n, size))),
        tolerance=1e-6 if exact else 2 / 255,
        rounds=3,
        warmup=0,
        shape="500 x 375 to 224",
        headline=kind == "floats",
    )


def pillow_views(image: Tensor, n: int, size: int) -> tuple[Tensor, Tensor]:
    """Base views and chain mixtures [n, 3, R, R] by Pillow, one at a time."""

    def tensor(x) -> Tensor:
        return torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).view(
            x.height, x.width, 3
        ).permute(2, 0, 1).float() / 255  # fmt: skip

    def step(x, name: str, level: float, sign: int):
        if name in ("autocontrast", "equalize"):
            return getattr(ImageOps, name)(x)
        if name == "posterize":
            return ImageOps.posterize(x, 4 - int(0.4 * level))
        if name == "solarize":
            return ImageOps.solarize(x, 256 - int(25.6 * level))
        if name == "rotate":
            return x.rotate(sign * int(3 * level), resample=Image.Resampling.BILINEAR)
        pixels = sign * int(size / 30 * level)
        rows = {
            "shear_x": (1, sign * 0.03 * level, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, sign * 0.03 * level, 1, 0),
            "translate_x": (1, 0, pixels, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, pixels),
        }
        affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return x.transform(x.size, affine, rows[name], resample=bilinear)

    source = Image.fromarray(image.numpy())
    generator = torch.Generator().manual_seed(0)
    crops, draws = make.draw(n - 1, source.height, source.width, generator)
    anchor = operations.centre_view(image.permute(2, 0, 1), size).float() / 255
    bases, mixes = [anchor], [anchor]
    for i, crop in enumerate(crops):
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        base = source.crop(box)
        for shape in ((size, base.height), (size, size)):  # Pillow 13 would choose the order
            base = base.resize(shape, Image.Resampling.BILINEAR)
        base = ImageOps.mirror(base) if crop.flip else base
        mix = torch.zeros_like(anchor)
        for c in range(make.CHAINS):
            x = base
            for s in range(draws.depth[i, c]):
                name = operations.OPERATIONS[draws.operation[i, c, s]]
                x = step(x, name, draws.level[i, c, s].item(), draws.sign[i, c, s].item())
            mix += draws.share[i, c] * tensor(x)
        bases.append(tensor(base))
        mixes.append(mix)
    return torch.stack(bases), torch.stack(mixes)

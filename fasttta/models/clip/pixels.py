"""What CLIP's image towers take: pixels in [0, 1], normalised inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ...views.image import shown

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def check_pixels(pixels: Tensor, size: int, device: torch.device, name: str = "pixels") -> None:
    """Raises unless pixels are [N, 3, size, size], floating point, on the device and (read on the
    host, CPU only) finite and within [0, 1], up to what a perturbed image may be off by rounding.
    """
    if not isinstance(pixels, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(pixels).__name__}")
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or not len(pixels):
        raise ValueError(f"{name} must be [N, 3, {size}, {size}], found {list(pixels.shape)}")
    if not pixels.is_floating_point():
        raise TypeError(f"{name} must be floating point in [0, 1], found {pixels.dtype}")
    if pixels.device != device:
        raise ValueError(f"{name} is on {pixels.device}, the model on {device}")
    if device.type != "cpu":
        return
    low, high = (x.item() for x in pixels.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too
        if not torch.isfinite(pixels).all():
            raise ValueError(f"{name} holds non-finite values (NaN or infinity)")
        raise ValueError(
            f"{name} runs {shown(low, high)}, needed [0, 1]: it looks like normalised "
            "input; CLIP normalises inside: give the image as before Normalize"
        )

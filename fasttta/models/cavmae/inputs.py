"""What a batch of audio or video must be so that a CAV-MAE can take it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_input(
    name: str, x: Tensor, patches: nn.Conv2d, tokens: int, device: torch.device
) -> None:
    """Checks one input of a batch.

    Args:
        name: ``"audio"``: x must be [B, frames, mel bins]; ``"video"``: [B, channels, rows,
            columns].
        patches: the convolution that cuts it into patches.
        tokens: for how many of these the model has positions.
        device: of the model.

    Raises:
        TypeError, ValueError: it cannot be used; the message says why.
    """
    is_audio = name == "audio"
    layout = "[B, frames, mel bins]" if is_audio else "[B, channels, rows, columns]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, found {type(x).__name__}")
    shape = tuple(x.shape)
    rank = 3 if is_audio else 4
    if x.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions {layout}, found shape {shape}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point and normalised, found {x.dtype}")
    if x.device != device:
        raise ValueError(
            f"{name} is on {x.device}, the model on {device}; move one: {name}.to({str(device)!r})"
        )
    if shape[0] == 0:
        raise ValueError(f"{name} is an empty batch, shape {shape}; needed at least 1 sample")
    if is_audio and shape[1:] == (128, 1024):
        # the patch count of the published size fits either way round
        raise ValueError(f"{name} of shape {shape} looks transposed, needed {layout}")
    ph, pw = patches.kernel_size
    # audio arrives as [frames, mel bins] and is cut as [mel bins, frames]
    h, w = (shape[2], shape[1]) if is_audio else shape[2:]
    channels = 1 if is_audio else shape[1]
    if channels != patches.in_channels:
        raise ValueError(
            f"{name} has {channels} channels, needed {patches.in_channels}; found shape {shape}"
        )
    if h % ph or w % pw or (h // ph) * (w // pw) != tokens:
        raise ValueError(
            f"{name} of shape {shape} gives {h / ph:g} x {w / pw:g} patches of {ph} x {pw}, the "
            f"checkpoint has positions for {tokens} tokens"
        )

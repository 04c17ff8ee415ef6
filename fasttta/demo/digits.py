"""The demo's task: a handwritten digit together with the same digit spoken."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import CAVMAE
from ..source_stats import SourceStats
from .corruptions import CORRUPTIONS

__all__ = ["CORRUPTIONS", "Digits", "load_data", "load_model", "load_statistics", "stream"]

MODEL_PATH = Path(__file__).with_name("model.safetensors")
DATA_PATH = Path(__file__).with_name("data.npz")
STATISTICS_PATH = Path(__file__).with_name("statistics.safetensors")
SEVERITIES = (1, 8)  # lowest and highest; 5 is the strongest of the usual benchmarks


class Digits(NamedTuple):
    """The test set: neither its images nor its speakers were seen in training."""

    images: Tensor  # [I, 8, 8], grey levels in [0, 1]
    image_labels: Tensor  # [I], 0 to 9
    audio: Tensor  # [U, 64 frames, 32 mel bins], natural logarithm of mel power
    audio_labels: Tensor  # [U], 0 to 9
    speakers: list[str]  # [U], the espeak-ng voice of each utterance
    audio_floor: float  # the lowest value in audio, the recording's noise floor
    audio_norm: tuple[float, float]  # mean and standard deviation over the training set
    video_norm: tuple[float, float]


def load_model() -> CAVMAE:
    """The demo's CAV-MAE of 265,162 parameters, trained on clean digits, in evaluation mode."""
    return CAVMAE.from_checkpoint(MODEL_PATH, num_heads=4)


def load_statistics() -> SourceStats:
    """The model's statistics over 32 clean pairs of the training set, which is not shipped."""
    return SourceStats.load(STATISTICS_PATH)


def load_data() -> Digits:
    """The test images and utterances, clean and not normalised."""
    with np.load(DATA_PATH, allow_pickle=False) as file:
        audio = torch.from_numpy(file["audio"]).float() * float(file["audio_scale"])
        return Digits(
            images=torch.from_numpy(file["images"]).float() / 16,
            image_labels=torch.from_numpy(file["image_labels"]).long(),
            audio=audio + float(file["audio_offset"]),
            audio_labels=torch.from_numpy(file["audio_labels"]).long(),
            speakers=file["speaker_names"][file["speakers"]].tolist(),
            audio_floor=float(file["audio_offset"]),
            audio_norm=(float(file["audio_mean"]), float(file["audio_std"])),
            video_norm=(float(file["video_mean"]), float(file["video_std"])),
        )


def enlarge(images: Tensor) -> Tensor:
    """Grey images [n, 8, 8] -> [n, 1, 32, 32], bilinear."""
    return F.interpolate(images[:, None], size=32, mode="bilinear")


def stream(
    corruption: str,
    *,
    severity: float = 5,
    samples: int = 1194,
    batch: int = 64,
    seed: int = 0,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of an image and an utterance of the same digit, corrupted and normalised.

    Args:
        corruption: a name in ``CORRUPTIONS``, whose functions describe their parameters.
        severity: from 1 to 8, also in between.
        samples: number of pairs, all different; the default is twice the number of images.
        batch: pairs in a batch; the last may be smaller.
        seed: of the choice and order of pairs and of the corruption's noise. The pairs of a seed
            are the same for every corruption and severity.

    Returns:
        A list of (audio [b, 64, 32], video [b, 1, 32, 32], labels [b]).

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"corruption={corruption!r} is unknown; known: {', '.join(CORRUPTIONS)}")
    low, high = SEVERITIES
    if not low <= severity <= high:
        raise ValueError(f"severity={severity} is out of range; known: {low} to {high}")
    if batch < 1:
        raise ValueError(f"batch={batch}; needed at least 1 sample")
    data = load_data()
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.nonzero(data.image_labels[:, None] == data.audio_labels)  # [P, 2]
    if not 1 <= samples <= len(pairs):
        raise ValueError(f"samples={samples}; needed 1 to {len(pairs)}, the number of pairs")
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:samples]]
    video = enlarge(data.images)[pairs[:, 0]]
    audio = data.audio[pairs[:, 1]]
    labels = data.image_labels[pairs[:, 0]]

    functions = CORRUPTIONS[corruption]
    if "video" in functions:
        video = functions["video"](video, severity, generator)
    if "audio" in functions:
        power = functions["audio"](audio.exp(), severity, generator)
        audio = power.log().clamp(min=data.audio_floor)
    video = (video - data.video_norm[0]) / data.video_norm[1]
    audio = (audio - data.audio_norm[0]) / data.audio_norm[1]
    return list(zip(audio.split(batch), video.split(batch), labels.split(batch), strict=True))

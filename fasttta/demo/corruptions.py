"""Corruptions of the demo's digits, drawn afresh for every sample.

Video corruptions take grey images [n, 1, 32, 32] in [0, 1] and return the same. Audio corruptions
take mel powers [n, 64 frames, 32 bins] and return the same: powers of independent sources add (the
cross terms have zero mean and are left out), a filter multiplies, a room convolves along time.
All are called ``corruption(x, severity, generator)``. The random draws do not depend on the
severity, so that a higher one is the same disturbance, only stronger.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]

SAMPLE_RATE = 16000
FRAME_SHIFT = 0.01  # seconds


def gaussian_noise(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Adds normal noise of standard deviation 0.06 severity to every pixel."""
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
    return (x + 0.06 * severity * noise).clamp(0, 1)


def impulse_noise(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Sets a share 0.05 severity of the pixels to black or white, evenly."""
    draw = torch.rand(x.shape, generator=generator, dtype=torch.float32)
    value = (torch.rand(x.shape, generator=generator, dtype=torch.float32) < 0.5).float()
    return torch.where(draw < 0.05 * severity, value, x)


def blur(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur, standard deviation 0.8 severity pixels of the 32 x 32 image."""
    position = torch.arange(32, dtype=torch.float32)
    kernel = torch.exp(-((position[:, None] - position) ** 2) / (2 * (0.8 * severity) ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)  # [32, 32], renormalised at the border
    return kernel @ x @ kernel.T


def contrast(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Shrinks each image's deviation from its mean by exp(-0.4 severity)."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean + math.exp(-0.4 * severity) * (x - mean)


def fog(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Covers each image with fog of four octaves: (x + w fog) / (1 + w), w = 0.3 severity."""
    layers = x.new_zeros(())
    for octave in (2, 4, 8, 16):
        cells = torch.rand(len(x), 1, octave, octave, generator=generator, dtype=torch.float32)
        layers = layers + F.interpolate(cells, size=32, mode="bilinear") * (2 / octave)
    low, high = layers.amin((2, 3), keepdim=True), layers.amax((2, 3), keepdim=True)
    weight = 0.3 * severity
    return (x + weight * (layers - low) / (high - low)) / (1 + weight)


def occlusion(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Hides a square of side 4 severity pixels, somewhere in the image, under mid-grey."""
    centre = 32 * torch.rand(len(x), 2, 1, generator=generator, dtype=torch.float32)
    inside = (
        torch.arange(32, dtype=torch.float32) + 0.5 - centre
    ).abs() < 2 * severity  # [n, 2, 32]
    return torch.where((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0.5, x)


def _mel(frequency: Tensor | float) -> Tensor:
    return 1127 * torch.log1p(torch.as_tensor(frequency, dtype=torch.float32) / 700)


def _mel_centres() -> Tensor:
    """Centre frequencies [32] in Hz of the mel bins (Kaldi's, 20 Hz to 8 kHz)."""
    edges = torch.linspace(float(_mel(20.0)), float(_mel(8000.0)), 34, dtype=torch.float32)
    return 700 * torch.expm1(edges[1:-1] / 1127)


def _mel_response(frequency: Tensor) -> Tensor:
    """Power [32, len(frequency)] that a tone of unit power leaves in each mel bin.

    The triangular filter times the power gain of the filter bank's pre-emphasis 0.97.
    """
    edges = torch.linspace(float(_mel(20.0)), float(_mel(8000.0)), 34, dtype=torch.float32)
    distance = (_mel(frequency) - edges[1:-1, None]).abs() / (edges[1] - edges[0])
    gain = 1 + 0.97**2 - 1.94 * torch.cos(2 * math.pi * frequency / SAMPLE_RATE)
    return (1 - distance).clamp(min=0) * gain


def _add(power: Tensor, noise: Tensor, snr: float) -> Tensor:
    """power + noise, scaled to this ratio (dB) of the two means over each sample."""
    ratio = power.mean((1, 2), keepdim=True) / noise.mean((1, 2), keepdim=True)
    return power + noise * ratio * 10 ** (-snr / 10)


def white_noise(power: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Adds white noise at a signal-to-noise ratio of 35 - 4 severity dB (of mel powers).

    A bin sums k independent spectral lines, so that its power is Gamma(k) distributed; drawn by
    the approximation of Wilson and Hilferty, the cube of a normal.
    """
    response = _mel_response(
        torch.arange(257, dtype=torch.float32) * SAMPLE_RATE / 512
    )  # [32, 257]
    # a 25 ms Hann window makes one of 78 Hz, 2.49 of the 31.25 Hz steps: mean(w^4) / mean(w^2)^2
    lines = response.sum(1) ** 2 / (response**2).sum(1) / 2.49
    lines = lines.clamp(min=1)
    z = torch.randn(power.shape, generator=generator, dtype=torch.float32)
    gamma = (1 - 1 / (9 * lines) + z / (3 * lines.sqrt())).clamp(min=0) ** 3
    return _add(power, response.sum(1) * gamma, 35 - 4 * severity)


def babble(power: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Adds 4 other utterances of the tensor at 20 - 4 severity dB signal-to-noise ratio.

    Each is turned round in time by a random number of frames. A lone sample babbles to itself.
    """
    n, frames, _ = power.shape
    noise = torch.zeros_like(power)
    for _ in range(4):
        step = 1 + (torch.rand(n, generator=generator, dtype=torch.float32) * (n - 1)).long()
        other = (torch.arange(n) + step) % n
        shift = torch.randint(frames, (n, 1), generator=generator)
        noise += power[other[:, None], (torch.arange(frames) + shift) % frames]
    return _add(power, noise, 20 - 4 * severity)


def low_pass(power: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Butterworth low-pass of order 4 at 8000 / 2 ** (0.7 severity) Hz."""
    cutoff = 8000 / 2 ** (0.7 * severity)
    return power / (1 + (_mel_centres() / cutoff) ** 8)


def reverb(power: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A room whose tail decays by 60 dB in 0.2 severity seconds, with severity times the energy
    of the direct sound; the tail's energy in each 10 ms is exponentially distributed.
    """
    n, frames, _ = power.shape
    lag = torch.arange(frames)
    decay = torch.exp(-math.log(1e6) * FRAME_SHIFT / (0.2 * severity) * lag.float())
    tail = decay * (lag > 0)
    tail = tail * severity / tail.sum()
    tail = tail * torch.empty(n, frames, dtype=torch.float32).exponential_(generator=generator)
    response = tail + (lag == 0)  # [n, frames]
    delay = lag[:, None] - lag  # [to, from]
    return (response[:, delay.clamp(min=0)] * (delay >= 0)) @ power


def hum(power: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Adds mains hum of 50 or 60 Hz at 35 - 4 severity dB signal-to-noise ratio.

    Harmonic h up to the 40th has the power 1 / h^2 times an exponentially distributed factor, the
    same in all frames.
    """
    n = len(power)
    harmonic = torch.arange(1, 41)
    strength = (
        torch.empty(n, 40, dtype=torch.float32).exponential_(generator=generator) / harmonic**2
    )
    is_60 = torch.rand(n, 1, generator=generator, dtype=torch.float32) < 0.5
    of_60, of_50 = (strength @ _mel_response(mains * harmonic.float()).T for mains in (60, 50))
    noise = torch.where(is_60, of_60, of_50)  # [n, 32]
    return _add(power, noise[:, None].expand_as(power), 35 - 4 * severity)


# name -> what it does to which modality
CORRUPTIONS: dict[str, dict[str, Corruption]] = {
    "clean": {},
    "gaussian": {"video": gaussian_noise},
    "impulse": {"video": impulse_noise},
    "blur": {"video": blur},
    "contrast": {"video": contrast},
    "fog": {"video": fog},
    "occlusion": {"video": occlusion},
    "white": {"audio": white_noise},
    "babble": {"audio": babble},
    "low-pass": {"audio": low_pass},
    "reverb": {"audio": reverb},
    "hum": {"audio": hum},
    "gaussian+babble": {"video": gaussian_noise, "audio": babble},
    "contrast+hum": {"video": contrast, "audio": hum},
}

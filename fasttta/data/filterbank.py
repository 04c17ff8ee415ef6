"""Kaldi's log-mel filterbank in plain torch, and CAV-MAE's audio input made from it."""

from __future__ import annotations

import functools
import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import dense

# Kaldi floors energies here before the log, in float64 as well; a silent bin is ln of it, -15.94.
ENERGY_FLOOR = torch.finfo(torch.float32).eps
RATE = 16000  # samples per second that CAV-MAE was trained at
_LOUDEST = 8.0  # decoded and mixed audio peaks at 1 to 2, integer levels in the hundreds


@functools.lru_cache(maxsize=16)
def _hanning(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kaldi's hanning window [length]: symmetric, both ends exactly zero."""
    with torch.inference_mode(False):  # a cached inference tensor would break later backwards
        window = torch.hann_window(length, periodic=False, dtype=torch.float64, device="cpu")
        return window.to(device, dtype)


def _mel(frequency: float) -> float:
    return 1127.0 * math.log1p(frequency / 700.0)


@functools.lru_cache(maxsize=16)
def _mel_filters(
    sample_rate: float,
    fft_size: int,
    mel_bins: int,
    low_freq: float,
    high_freq: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Triangles, straight in mel and not in Hz [fft_size / 2 + 1, mel_bins].

    A filter between two FFT bins is empty and always gives the floor: at 16 kHz and 128 filters
    that is so for one of them. Kaldi refuses such a setting, torchaudio and CAV-MAE do not.
    """
    with torch.inference_mode(False):
        edges = torch.arange(mel_bins + 2, dtype=torch.float64, device="cpu")
        width = (_mel(high_freq) - _mel(low_freq)) / (mel_bins + 1)
        edges = _mel(low_freq) + edges * width
        bins = torch.arange(fft_size // 2 + 1, dtype=torch.float64, device="cpu")
        mel = 1127.0 * torch.log1p(bins * (sample_rate / fft_size) / 700.0)[:, None]
        rising = (mel - edges[:-2]) / width
        falling = (edges[2:] - mel) / width
        return torch.minimum(rising, falling).clamp(min=0.0).to(device, dtype)


def _checked(waveform: Tensor) -> Tensor:
    """The waveform as a plain tensor, if it can be used."""
    if not isinstance(waveform, Tensor):
        raise TypeError(f"waveform is a {type(waveform).__name__}; needed a torch tensor")
    waveform = dense("waveform", waveform)
    if not waveform.is_floating_point():
        raise TypeError(
            f"waveform is {waveform.dtype}; needed floating point in [-1, 1), "
            "for 16-bit samples: waveform / 32768"
        )
    if waveform.ndim not in (1, 2) or (waveform.ndim == 2 and waveform.shape[0] == 0):
        raise ValueError(
            f"waveform has shape {list(waveform.shape)}; needed [samples] or [channels, samples]"
        )
    return waveform


def _check_rate(sample_rate: float) -> None:
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, Real):
        raise TypeError(f"sample_rate is {sample_rate!r}; needed a number of samples per second")
    if not 0 < sample_rate < math.inf:
        raise ValueError(f"sample_rate is {sample_rate}; needed samples per second above zero")


def fbank(
    waveform: Tensor,
    sample_rate: float,
    *,
    mel_bins: int = 128,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    low_freq: float = 20.0,
    high_freq: float = 0.0,
    preemphasis: float = 0.97,
) -> Tensor:
    """Log-mel filterbank energies as Kaldi computes them [frames, mel_bins].

    What no argument sets is as in CAV-MAE: hanning window, only frames that lie wholly in the
    signal, DC offset removed per frame, FFT padded to a power of two, power spectrum,
    mel = 1127 ln(1 + f / 700), natural log, no energy column, no dither.

    Args:
        waveform: [samples], or [channels, samples] of which the first channel is used, in any
            floating dtype on any device. float64 stays float64, every other dtype gives float32.
        sample_rate: samples per second.
        mel_bins: number of triangular filters.
        frame_length: length of a frame in milliseconds.
        frame_shift: distance between the starts of neighbouring frames in milliseconds.
        low_freq: lower edge of the first filter in Hz.
        high_freq: upper edge of the last filter in Hz; if not positive, added to sample_rate / 2.
        preemphasis: coefficient c of x[i] - c x[i - 1] within a frame, where x[-1] = x[0] (the
            window is zero there).

    Raises:
        TypeError: waveform is no dense tensor or not floating point, or sample_rate no number.
        ValueError: waveform is shorter than one frame or has the wrong shape; a setting is out
            of range.

    Source: Kaldi, feat/feature-fbank.cc and feat/mel-computations.cc. Window and filters are
    computed in float64 and rounded once, where Kaldi works in float32.
    """
    waveform = _checked(waveform)
    _check_rate(sample_rate)
    if mel_bins < 1:
        raise ValueError(f"mel_bins is {mel_bins}; needed at least 1")
    if not 0 <= preemphasis <= 1:
        raise ValueError(f"preemphasis is {preemphasis}; needed a coefficient in [0, 1]")
    length = int(sample_rate * 0.001 * frame_length)  # Kaldi's order of products, and truncation
    shift = int(sample_rate * 0.001 * frame_shift)
    if length < 2:
        raise ValueError(
            f"frame_length is {frame_length} ms, {length} samples at {sample_rate} Hz; "
            "needed at least 2 samples"
        )
    if shift < 1:
        raise ValueError(
            f"frame_shift is {frame_shift} ms, {shift} samples at {sample_rate} Hz; "
            "needed at least 1 sample"
        )
    nyquist = 0.5 * sample_rate
    upper = high_freq if high_freq > 0 else nyquist + high_freq
    if not 0 <= low_freq < upper <= nyquist:
        raise ValueError(
            f"low_freq is {low_freq} Hz and high_freq {high_freq} Hz (upper edge {upper} Hz); "
            f"needed 0 <= low_freq < upper edge <= {nyquist} Hz, half of sample_rate"
        )
    samples = waveform.shape[-1]
    if samples < length:
        raise ValueError(
            f"waveform has shape {list(waveform.shape)}, {samples} samples at {sample_rate} Hz; "
            f"needed at least {length}, one frame of {frame_length} ms"
        )

    x = waveform if waveform.ndim == 1 else waveform[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    fft_size = 1 << (length - 1).bit_length()
    # autocast would round the spectrum to 8 bits in the product with the filters
    with torch.autocast(x.device.type, enabled=False):
        # contiguous: the order of sums, so the last digit, must not depend on the layout
        frames = x.to(dtype).contiguous().unfold(0, length, shift)  # [M, length]
        frames = frames - frames.mean(dim=1, keepdim=True)
        previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        frames = (frames - preemphasis * previous) * _hanning(length, dtype, x.device)
        spectrum = torch.fft.rfft(frames, n=fft_size)  # [M, fft_size / 2 + 1]
        power = spectrum.real.square() + spectrum.imag.square()
        filters = _mel_filters(
            sample_rate, fft_size, mel_bins, low_freq, upper, dtype, power.device
        )
        return (power @ filters).clamp(min=ENERGY_FLOOR).log()


def _check_samples(waveform: Tensor) -> None:
    """Raises ValueError unless samples are finite and in the range of floats, not of integers."""
    if not waveform.numel():
        return
    low, high = (x.item() for x in torch.aminmax(waveform.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("waveform holds non-finite values (NaN or infinity)")
    if max(-low, high) > _LOUDEST:
        raise ValueError(
            f"waveform has samples from {low:.4g} to {high:.4g}; needed [-1, 1). Levels of 16-bit "
            "integers? Divide by 32768 (of 24 bits by 2**23, of 32 bits by 2**31)"
        )


def _at_rate(waveform: Tensor, sample_rate: float, resample: bool) -> Tensor:
    """The waveform resampled to 16000 samples per second."""
    if not resample:
        raise ValueError(
            f"sample_rate is {sample_rate}; CAV-MAE was trained at {RATE}, and other rates give "
            "wrong features: give resample=True (pip install fasttta[audio]), or convert the file: "
            f"ffmpeg -i IN -ar {RATE} -c:a pcm_s16le OUT.wav"
        )
    if waveform.requires_grad and torch.is_grad_enabled():
        raise ValueError("resample=True has no gradient; give waveform.detach(), or 16000 Hz")
    try:
        import soxr
    except ImportError as error:
        raise ImportError(
            "resample=True needs the package soxr: pip install fasttta[audio]"
        ) from error
    samples = waveform.detach().cpu().numpy()  # soxr takes [samples, channels]
    resampled = torch.from_numpy(soxr.resample(samples.T, sample_rate, RATE).T.copy())
    return resampled.to(waveform.device)


def cavmae_audio(
    waveform: Tensor,
    sample_rate: float,
    *,
    resample: bool = False,
    frames: int = 1024,
    mel_bins: int = 128,
    mean: float = -5.081,
    std: float = 4.4849,
) -> Tensor:
    """CAV-MAE's audio input: the normalised log-mel spectrogram of one clip [frames, mel_bins].

    The mean over the whole clip (all channels) is subtracted, the filterbank taken of the first
    channel, padded with zeros or cut to ``frames``, then normalised. Padding comes before the
    normalisation, so with the defaults padded frames are +1.1329.

    Args:
        waveform: [samples] or [channels, samples], floating point in [-1, 1); 10 s give 998 frames.
            Peaks up to 8 are taken for loud mixes, what lies beyond for integer levels.
        sample_rate: samples per second; CAV-MAE was trained at 16000, and another rate shifts all
            its filters.
        resample: bring another rate to 16000 first, with soxr at its high quality; that passes
            through the CPU and has no gradient.
        frames: number of 10 ms frames to return.
        mel_bins: number of mel filters.
        mean: subtracted from the log energies.
        std: divides them after that.

    Raises:
        TypeError, ValueError: as `fbank`; frames below 1, std not above zero; another rate than
            16000 without ``resample``; samples that are not finite, or at integer levels.
        ImportError: ``resample`` without the package soxr.

    Source: Gong et al., "Contrastive Audio-Visual Masked Autoencoder", ICLR 2023, evaluation
    loader. Where that one puts 0.01 in place of a clip it cannot read, this raises.
    """
    waveform = _checked(waveform)
    _check_rate(sample_rate)
    if frames < 1:
        raise ValueError(f"frames is {frames}; needed at least 1")
    if not std > 0:
        raise ValueError(f"std is {std}; needed a number above zero")
    if waveform.dtype != torch.float64:
        waveform = waveform.float()
    _check_samples(waveform)
    if sample_rate != RATE:
        waveform, sample_rate = _at_rate(waveform, sample_rate, resample), RATE
    # fbank takes the mean off every frame anyway; this one decides about the last digit only
    features = fbank(waveform - waveform.mean(), sample_rate, mel_bins=mel_bins)
    features = F.pad(features, (0, 0, 0, frames - features.shape[0]))  # a negative pad cuts
    return (features - mean) / std

"""The filterbank against kaldi-native-fbank and its definition; CAV-MAE's audio input; WAV."""

import math
import struct
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch

from fasttta.data import cavmae_audio, fbank, load_wav
from fasttta.data.filterbank import _hanning, _mel_filters

kaldi_native_fbank = pytest.importorskip("kaldi_native_fbank")

# Largest absolute difference of log energies. A narrow filter may see a single FFT bin close to its
# foot; its weight, a difference of two mel values up to 3000, then keeps 3 digits in Kaldi's
# float32. Measured: 4.2e-4 with 64 and 128 filters, 7.5e-5 with fewer.
KALDI_TOLERANCES = {128: 2e-3, 64: 2e-3, 32: 3e-4, 23: 3e-4}
# Against the definition in float64, on noise. Measured: 4.6e-5 and 2.7e-13.
TOLERANCES = {torch.float32: 3e-4, torch.float64: 1e-10}
SILENCE = math.log(2.0**-23)


def _noise(*shape, seed=0, amplitude=0.1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return amplitude * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _chirp(samples, rate):
    """A sweep up to 0.4 of the sample rate, with noise that keeps every bin off the floor."""
    t = torch.arange(samples, dtype=torch.float64) / rate
    sweep = torch.sin(math.pi * 0.4 * rate * t * t / t[-1])
    return (0.1 * sweep + 0.05 + _noise(samples, amplitude=0.02)).float()


def _kaldi(x, rate, mel_bins, **settings):
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hanning"
    options.frame_opts.frame_length_ms = settings.get("frame_length", 25.0)
    options.frame_opts.frame_shift_ms = settings.get("frame_shift", 10.0)
    options.frame_opts.preemph_coeff = settings.get("preemphasis", 0.97)
    options.mel_opts.num_bins = mel_bins
    options.mel_opts.low_freq = settings.get("low_freq", 20.0)
    options.mel_opts.high_freq = settings.get("high_freq", 0.0)
    options.use_energy = False
    computer = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(rate, x.tolist())
    computer.input_finished()
    frames = [computer.get_frame(i) for i in range(computer.num_frames_ready)]
    return torch.from_numpy(np.stack(frames))


def _definition(x, rate, mel_bins):
    """Kaldi's features with 25 ms, 10 ms and 20 Hz in float64, filter by filter, by a plain DFT."""
    x = x.double().numpy()
    length, shift = rate * 25 // 1000, rate * 10 // 1000
    size = 2 ** math.ceil(math.log2(length))
    n = np.arange(length)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / (length - 1))
    hertz = np.arange(size // 2 + 1) * rate / size
    dft = np.exp(-2j * np.pi * np.outer(n, np.arange(size // 2 + 1)) / size)
    mel = 1127 * np.log(1 + hertz / 700)
    low, high = 1127 * math.log(1 + 20 / 700), 1127 * math.log(1 + rate / 2 / 700)
    edges = np.linspace(low, high, mel_bins + 2)
    rows = []
    for start in range(0, len(x) - length + 1, shift):
        frame = x[start : start + length] - x[start : start + length].mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs((frame * window) @ dft) ** 2
        row = []
        for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
            weights = np.where(
                mel < centre, (mel - left) / (centre - left), (right - mel) / (right - centre)
            )
            energy = (power * np.maximum(weights, 0.0)).sum()
            row.append(math.log(max(energy, 2.0**-23)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


# kaldi-native-fbank refuses settings in which a filter lies between two FFT bins. One of 128 does
# at 16 kHz from 20 Hz, several at 8 kHz: those are held to the definition, further below.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signal", ["noise", "chirp"])
@pytest.mark.parametrize(
    ("rate", "samples", "mel_bins", "low_freq"),
    [
        (16000, 18193, 128, 100.0),
        (16000, 18193, 32, 20.0),
        (16000, 400, 23, 20.0),
        (44100, 50001, 128, 20.0),
        (44100, 1102 + 440, 32, 20.0),
        (44100, 30011, 23, 20.0),
        (8000, 9097, 64, 20.0),
        (8000, 9097, 32, 20.0),
        (8000, 281, 23, 20.0),
    ],
)
def test_matches_kaldi(rate, samples, mel_bins, low_freq, signal, dtype):
    x = _noise(samples, seed=rate) if signal == "noise" else _chirp(samples, rate)
    expected = _kaldi(x, rate, mel_bins, low_freq=low_freq)
    actual = fbank(x.to(dtype), rate, mel_bins=mel_bins, low_freq=low_freq)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape == (1 + (samples - rate // 40) // (rate // 100), mel_bins)
    assert (actual - expected).abs().max() < KALDI_TOLERANCES[mel_bins]


@pytest.mark.parametrize(
    "settings",
    [
        {"frame_length": 64.0},
        {"frame_length": 20.0, "frame_shift": 7.5},
        {"high_freq": 5000.0},
        {"high_freq": -500.0, "low_freq": 100.0},
        {"preemphasis": 0.0},
        {"preemphasis": 0.5},
    ],
    ids=str,
)
def test_settings_match_kaldi(settings):
    x = _noise(16001)
    expected = _kaldi(x, 16000, 23, **settings)
    actual = fbank(x, 16000, mel_bins=23, **settings)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < KALDI_TOLERANCES[23]
    default = fbank(x, 16000, mel_bins=23)
    assert actual.shape != default.shape or (actual - default).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mel_bins", [128, 23, 1])
@pytest.mark.parametrize("rate", [16000, 8000, 11025])
def test_matches_definition(rate, mel_bins, dtype):
    x = _noise(rate // 5 + 77, dtype=dtype)
    actual = fbank(x, rate, mel_bins=mel_bins)
    assert (actual - _definition(x, rate, mel_bins)).abs().max() < TOLERANCES[dtype]


def test_filter_between_two_bins_gives_the_floor():
    features = fbank(_noise(4000), 16000, mel_bins=128)
    empty = (features == features.new_tensor(SILENCE)).all(dim=0)
    assert empty.sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.25])
def test_silence_is_the_log_of_float32_epsilon(level, dtype):
    x = torch.full((1601,), level, dtype=dtype)
    actual = fbank(x, 16000, mel_bins=32)
    assert torch.equal(actual, torch.full((8, 32), SILENCE, dtype=dtype))
    assert (actual - _kaldi(x, 16000, 32)).abs().max() < 2e-6


def test_constant_offset_makes_no_difference():
    x = _noise(1601, dtype=torch.float64)
    assert (fbank(x + 0.3, 16000) - fbank(x, 16000)).abs().max() < TOLERANCES[torch.float64]


def test_uses_the_first_channel_and_any_stride():
    x = _noise(3, 3202)
    expected = fbank(x[0].clone(), 16000)
    assert torch.equal(fbank(x, 16000), expected)
    strided = torch.stack([x[0], x[1]], dim=1)  # [samples, channels] in memory
    assert torch.equal(fbank(strided.T, 16000), expected)
    assert torch.equal(fbank(x[0, ::2], 8000), fbank(x[0, ::2].clone(), 8000))


def test_does_not_write_into_the_waveform():
    x = _noise(2, 1601)
    before = x.clone()
    fbank(x, 16000)
    cavmae_audio(x, 16000)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_to_float32(dtype):
    x = _noise(1601).to(dtype)
    assert torch.equal(fbank(x, 16000), fbank(x.float(), 16000))
    assert torch.equal(cavmae_audio(x, 16000), cavmae_audio(x.float(), 16000))


def test_autocast_changes_nothing():
    x = _noise(1601)
    expected = fbank(x, 16000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fbank(x, 16000), expected)


def test_gradient():
    x = _noise(30, dtype=torch.float64).requires_grad_()
    # 400 Hz: frames of 10 samples
    assert torch.autograd.gradcheck(lambda x: fbank(x, 400, mel_bins=4), x)


def test_matrices_cached_in_inference_mode_serve_a_backward():
    _hanning.cache_clear()
    _mel_filters.cache_clear()
    x = _noise(1601)
    with torch.inference_mode():
        fbank(x, 16000)
    x.requires_grad_()
    fbank(x, 16000).sum().backward()
    assert x.grad.abs().sum() > 0
    assert _hanning.cache_info().hits == _mel_filters.cache_info().hits == 1


@pytest.mark.parametrize(
    ("waveform", "settings", "error", "message"),
    [
        ([0.0] * 400, {}, TypeError, "waveform is a list"),
        (torch.zeros(400, dtype=torch.int16), {}, TypeError, r"torch.int16.*waveform / 32768"),
        (torch.zeros(1, 1, 400), {}, ValueError, r"waveform has shape \[1, 1, 400\]"),
        (torch.zeros(0, 400), {}, ValueError, r"waveform has shape \[0, 400\]"),
        (torch.zeros(()), {}, ValueError, r"waveform has shape \[\]"),
        (torch.zeros(399), {}, ValueError, r"399 samples at 16000 Hz; needed at least 400"),
        (torch.zeros(16000, 2), {}, ValueError, r"shape \[16000, 2\], 2 samples"),
        (torch.zeros(0), {}, ValueError, r"0 samples"),
        (torch.zeros(400), {"sample_rate": 0}, ValueError, "sample_rate is 0"),
        (torch.zeros(400), {"sample_rate": math.nan}, ValueError, "sample_rate is nan"),
        (torch.zeros(400), {"mel_bins": 0}, ValueError, "mel_bins is 0"),
        (torch.zeros(400), {"preemphasis": 1.5}, ValueError, "preemphasis is 1.5"),
        (torch.zeros(400), {"frame_length": 0.1}, ValueError, "frame_length is 0.1 ms, 1 samples"),
        (torch.zeros(400), {"frame_shift": 0.01}, ValueError, "frame_shift is 0.01 ms, 0 samples"),
        (torch.zeros(400), {"high_freq": 8001.0}, ValueError, r"needed .* <= 8000.0 Hz"),
        (torch.zeros(400), {"low_freq": 8000.0}, ValueError, "low_freq is 8000.0 Hz"),
        (torch.zeros(400), {"low_freq": -1.0}, ValueError, "low_freq is -1.0 Hz"),
    ],
)
def test_fbank_errors(waveform, settings, error, message):
    with pytest.raises(error, match=message):
        fbank(waveform, **{"sample_rate": 16000, **settings})


def test_ten_seconds_are_998_frames_and_26_of_padding():
    features = cavmae_audio(_noise(2, 160000), 16000)
    assert features.shape == (1024, 128)
    assert features.dtype == torch.float32
    padding = features[998:]
    assert torch.equal(padding, padding[:1, :1].expand_as(padding))
    assert padding[0, 0].item() == pytest.approx(1.1329, abs=5e-5)
    assert (features[997] - 1.1329).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_matches_definition(dtype):
    x = _noise(2, 4001, dtype=dtype) + 0.2
    features = cavmae_audio(x, 16000, frames=30)
    expected = (_definition(x[0], 16000, 128) + 5.081) / 4.4849
    assert features.dtype == dtype
    assert len(expected) == 23
    assert (features[:23] - expected).abs().max() < TOLERANCES[dtype]
    assert (features[23:] - 5.081 / 4.4849).abs().max() < 1e-6


def test_long_clip_is_cut_at_the_end():
    x = _noise(4001)
    whole = cavmae_audio(x, 16000, frames=23)
    assert torch.equal(cavmae_audio(x, 16000, frames=10), whole[:10])


def test_normalisation_settings():
    x = _noise(4001, dtype=torch.float64)
    features = cavmae_audio(x, 16000, frames=25, mel_bins=32, mean=2.0, std=0.5)
    assert features.shape == (25, 32)
    log_energies = fbank(x - x.mean(), 16000, mel_bins=32)
    torch.testing.assert_close(features[:23], (log_energies - 2.0) * 2.0)
    assert (features[23:] == -4.0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"std": 0.0}, "std is 0.0"),
        ({"std": math.nan}, "std is nan"),
        ({"mel_bins": -1}, "mel_bins is -1"),
    ],
)
def test_clip_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        cavmae_audio(torch.zeros(400), 16000, **settings)


def test_clip_shorter_than_one_frame():
    with pytest.raises(ValueError, match="needed at least 400"):
        cavmae_audio(torch.zeros(399), 16000)


def _write(path, data, *, channels=1, width=2, rate=16000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_levels(tmp_path, width):
    half = 2 ** (8 * width - 1)
    levels = [-half, -half // 2, -1, 0, 1, half // 2, half - 1]
    if width == 1:
        data = bytes(level + 128 for level in levels)
    else:
        data = b"".join(level.to_bytes(width, "little", signed=True) for level in levels)
    x, rate = load_wav(_write(tmp_path / "levels.wav", data, width=width, rate=44100))
    assert rate == 44100
    assert x.dtype == torch.float32
    expected = torch.tensor(levels, dtype=torch.float64) / half
    assert torch.equal(x[:, :-1], expected[None, :-1].float())
    assert 1 - 2 / half - 2**-24 <= x[0, -1].item() < 1.0


def test_wav_channels(tmp_path):
    data = struct.pack("<6h", 100, -1, 200, -2, 300, -3)
    x, rate = load_wav(_write(tmp_path / "stereo.wav", data, channels=2, rate=8000))
    assert rate == 8000
    assert x.is_contiguous()
    assert torch.equal(x * 2**15, torch.tensor([[100.0, 200.0, 300.0], [-1.0, -2.0, -3.0]]))


def test_wav_to_features(tmp_path):
    x = (_noise(4001) * 2**15).round().clamp(-(2**15), 2**15 - 1)
    path = _write(tmp_path / "clip.wav", x.short().numpy().astype("<i2").tobytes())
    features = cavmae_audio(*load_wav(path), frames=30)
    assert torch.equal(features, cavmae_audio(x / 2**15, 16000, frames=30))


def _header(bits, form=1, size=16):
    align = bits // 8
    chunk = struct.pack("<4sIHHIIHH", b"fmt ", 16, form, 1, 16000, 16000 * align, align, bits)
    chunk += struct.pack("<4sI", b"data", size) + bytes(size)
    return struct.pack("<4sI4s", b"RIFF", 4 + len(chunk), b"WAVE") + chunk


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no PCM WAV file .it ends too early"),
        (b"RI", "damaged or no PCM WAV file"),
        (b"ID3" + bytes(200), "does not start with RIFF id.*ffmpeg"),
        (_header(16)[:30], "damaged or no PCM WAV file"),
        (_header(16)[:-3], "cut short: found 13 bytes of samples, needed 16"),
        (_header(16, size=0), "holds no samples"),
        (_header(16, form=3), "16-bit floating-point samples.*ffmpeg -i .* -ar 16000"),
        (_header(64), "64-bit samples"),
    ],
)
def test_wav_errors(tmp_path, content, message):
    path = tmp_path / "odd.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_wav(path)
    assert "odd.wav" in str(caught.value)


def test_missing_wav(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.wav"):
        load_wav(tmp_path / "none.wav")


def test_import_brings_no_audio_or_image_library():
    code = (
        "import sys, torch; before = set(sys.modules); import fasttta.data; "
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'torch', 'fasttta'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

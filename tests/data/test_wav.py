"""WAV files made by hand: every header that recorders and converters write."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
import torch

from fasttta.data import cavmae_audio, load_wav

GUID_END = bytes.fromhex("000000001000800000aa00389b71")


def _fmt(tag, channels, width, rate=16000, bits=None, extensible=False, align=None):
    bits, align = bits or 8 * width, channels * width if align is None else align
    head = struct.pack(
        "<HHIIHH", 0xFFFE if extensible else tag, channels, rate, rate * align, align,
        8 * width if extensible else bits,
    )  # fmt: skip
    if extensible:
        head += struct.pack("<HHIH", 22, bits, 0, tag) + GUID_END
    return b"fmt ", head


def _chunk(name, body, size=None):
    size = len(body) if size is None else size
    return name + struct.pack("<I", size) + body + bytes(len(body) % 2)


def _wav(fmt, data, *, before=(), after=(), size=None, riff=None, kind=b"RIFF"):
    parts = b"".join(_chunk(*x) for x in (fmt, *before))
    parts += _chunk(b"data", data, size) + b"".join(_chunk(*x) for x in after)
    return kind + struct.pack("<I", 4 + len(parts) if riff is None else riff) + b"WAVE" + parts


def _read(tmp_path, content, name="clip.wav"):
    path = tmp_path / name
    path.write_bytes(content)
    return load_wav(path)


def _signal(channels, n=7, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (n, channels))


def _encoded(x, tag, width):
    """Samples [n, channels] as bytes, and what they are worth."""
    if tag == 3:
        values = x.astype("<f4" if width == 4 else "<f8")
        return values.tobytes(), values.astype(np.float64)
    half = 2 ** (8 * width - 1)
    levels = np.round(x * (half - 1)).astype(np.int64)
    data = (levels + (128 if width == 1 else 0)).astype("<i8").tobytes()
    data = b"".join(data[i : i + width] for i in range(0, len(data), 8))
    return data, levels / half


FORMATS = [(1, 1), (1, 2), (1, 3), (1, 4), (3, 4), (3, 8)]


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8, 17])
@pytest.mark.parametrize(("tag", "width"), FORMATS)
def test_every_format(tmp_path, tag, width, channels, extensible):
    data, values = _encoded(_signal(channels), tag, width)
    fmt = _fmt(tag, channels, width, rate=48000, extensible=extensible)
    x, rate = _read(tmp_path, _wav(fmt, data))
    assert rate == 48000
    assert x.shape == (channels, 7)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(values.T.astype(np.float32)))


def test_fewer_bits_than_places(tmp_path):
    """24 bits in 32, 20 in 24: the high ones count, as the standard says."""
    for width, bits in ((4, 24), (3, 20), (2, 12)):
        data, values = _encoded(_signal(2), 1, width)
        for extensible in (True, False):
            fmt = _fmt(1, 2, width, bits=bits, extensible=extensible)
            x, _ = _read(tmp_path, _wav(fmt, data))
            assert torch.equal(x, torch.from_numpy(values.T.astype(np.float32)))
    fmt = _fmt(1, 2, 2, align=0)
    data, values = _encoded(_signal(2), 1, 2)
    assert torch.equal(
        _read(tmp_path, _wav(fmt, data))[0], torch.from_numpy(values.T.astype(np.float32))
    )


PLACES = {
    "ffmpeg": (0xFFFFFFFF, 0xFFFFFFFF), "sox": (0x7FFFF000, 0x7FFFF024), "zeros": (0, 0),
    "no size": (0, 36), "no size of the samples": (0xFFFFFFFF, 5000),
    "another": (0xFFFFFFFF - 36, 0xFFFFFFFF), "too large": (4000, 0),
}  # fmt: skip


@pytest.mark.parametrize("rest", [0, 3])
@pytest.mark.parametrize("places", PLACES)
def test_written_into_a_pipe(tmp_path, places, rest):
    size, riff = PLACES[places]
    data, values = _encoded(_signal(2), 1, 2)
    content = _wav(
        _fmt(1, 2, 2), data, before=[(b"LIST", b"INFOISFT\x05\0\0\0Lavf1\0")], size=size, riff=riff
    )
    x, _ = _read(tmp_path, content + bytes(rest))
    assert torch.equal(x, torch.from_numpy(values.T.astype(np.float32)))


def test_other_chunks(tmp_path):
    """Before and behind, of odd size too; none is taken for samples."""
    data, values = _encoded(_signal(1, n=5), 1, 1)
    content = _wav(
        _fmt(1, 1, 1), data, before=[(b"bext", bytes(603)), (b"LIST", b"abc")],
        after=[(b"id3 ", bytes(11)), (b"LIST", bytes(4))],
    )  # fmt: skip
    x, _ = _read(tmp_path, content)
    assert torch.equal(x, torch.from_numpy(values.T.astype(np.float32)))


def test_sizes_of_64_bits(tmp_path):
    data, values = _encoded(_signal(2), 1, 2)
    ds64 = _chunk(b"ds64", struct.pack("<QQQI", 100, len(data), 7, 0))
    parts = ds64 + _chunk(*_fmt(1, 2, 2)) + _chunk(b"data", data, 0xFFFFFFFF)
    parts += _chunk(b"LIST", bytes(6))
    x, _ = _read(tmp_path, b"RF64\xff\xff\xff\xffWAVE" + parts)
    assert torch.equal(x, torch.from_numpy(values.T.astype(np.float32)))


DATA = bytes(16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_wav(_fmt(6, 1, 1), DATA), "holds A-law samples; needed 8-"),
        (_wav(_fmt(7, 1, 1, extensible=True), DATA), "holds mu-law samples"),
        (_wav(_fmt(85, 1, 1), DATA), "holds MP3 samples"),
        (_wav(_fmt(999, 1, 1), DATA), "holds format 999 samples"),
        (_wav(_fmt(3, 1, 2), DATA), "16-bit floating-point samples"),
        (_wav(_fmt(1, 1, 8), DATA), "64-bit samples"),
        (_wav((b"fmt ", _fmt(1, 1, 2, extensible=True)[1][:-1] + b"!"), DATA), "not known"),
        (_wav((b"fmt ", _fmt(1, 1, 2)[1][:12]), DATA), "format ends too early"),
        (_wav(_fmt(1, 0, 2), DATA), "names 0 channels"),
        (_wav(_fmt(1, 1, 2, rate=0), DATA), "sample rate of 0"),
        (_wav((b"junk", b""), DATA), "samples without a format"),
        (_wav(_fmt(1, 3, 2), DATA), "16 bytes of samples are no whole number of frames of 6"),
        (_wav(_fmt(1, 1, 2), b""), "holds no samples"),
        (_wav(_fmt(1, 1, 2), b"", size=0xFFFFFFFF, riff=0xFFFFFFFF), "holds no samples"),
        (_wav(_fmt(1, 1, 2), b"", after=[(b"LIST", DATA)]), "holds no samples"),
        (_wav(_fmt(1, 1, 2), DATA)[:-3], "cut short: found 13 bytes of samples, needed 16"),
        (_wav(_fmt(1, 1, 2), DATA, size=4000), "cut short: found 16 bytes.*needed 4000"),
        (_wav(_fmt(1, 1, 2), DATA)[:40], "has no samples"),
        (_wav(_fmt(1, 1, 2), DATA, kind=b"RIFX"), "does not start with RIFF id"),
        (b"fLaC" + bytes(100), "does not start with RIFF id"),
        (_wav(_fmt(3, 1, 4), struct.pack("<2f", 0.5, float("nan"))), "not finite"),
        (_wav(_fmt(3, 1, 8), struct.pack("<2d", 0.5, float("inf"))), "not finite"),
    ],
)  # fmt: skip
def test_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        _read(tmp_path, content, "odd name.wav")
    assert "odd name.wav" in str(caught.value)
    if "finite" not in message and "no samples; " not in message:
        assert "ffmpeg -i '" in str(caught.value)
        assert "-ar 16000" in str(caught.value)


def test_other_files_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=r"pip install fasttta\[audio\]; or convert it first"):
        _read(tmp_path, b"fLaC" + bytes(100), "a.flac")


def test_other_files_with_the_extra(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    x = _signal(2, n=400).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", x, 44100, subtype="PCM_16")
    waveform, rate = load_wav(tmp_path / "a.flac")
    assert rate == 44100
    assert waveform.shape == (2, 400)
    assert np.abs(waveform.numpy().T - x).max() < 2**-15
    # the same WAV by both readers
    soundfile.write(tmp_path / "b.wav", x, 8000, format="WAVEX", subtype="PCM_24")
    expected = soundfile.read(tmp_path / "b.wav", dtype="float32")[0]
    assert np.array_equal(load_wav(tmp_path / "b.wav")[0].numpy().T, expected)


def _tone(rate, seconds=1.0, channels=1):
    t = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    tones = sum(torch.sin(2 * torch.pi * f * t + f) for f in (220.0, 997.0, 3100.0)) / 10
    return tones.float().repeat(channels, 1)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 15999, 16000.5])
def test_another_rate_is_refused(rate):
    with pytest.raises(
        ValueError, match=rf"sample_rate is {rate}; .*resample=True.*fasttta\[audio\].*-ar 16000"
    ):
        cavmae_audio(_tone(22050), rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_resampling(rate, dtype):
    pytest.importorskip("soxr")
    expected = cavmae_audio(_tone(16000).to(dtype), 16000, frames=90)
    features = cavmae_audio(_tone(rate, channels=2).to(dtype), rate, resample=True, frames=90)
    assert features.dtype == dtype
    # below 3.1 kHz, where the tones are; above lies the resampler's floor
    assert (features - expected)[:, :60].abs().mean() < 0.02
    assert cavmae_audio(_tone(16000), 16000, resample=True, frames=9).shape == (9, 128)


def test_resampling_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r"soxr: pip install fasttta\[audio\]"):
        cavmae_audio(_tone(8000), 8000, resample=True)
    with pytest.raises(ValueError, match="has no gradient"):
        cavmae_audio(_tone(8000).requires_grad_(), 8000, resample=True)


@pytest.mark.parametrize("rate", ["16000", None, True, torch.tensor(16000), [16000]])
def test_rates_that_are_no_numbers(rate):
    with pytest.raises(TypeError, match="sample_rate is .*needed a number"):
        cavmae_audio(_tone(16000), rate)


@pytest.mark.parametrize("rate", [0, -16000, float("nan"), float("inf")])
def test_rates_that_cannot_be(rate):
    with pytest.raises(ValueError, match="sample_rate is .*above zero"):
        cavmae_audio(_tone(16000), rate)


def test_rates_of_numpy():
    assert torch.equal(
        cavmae_audio(_tone(16000), np.int64(16000)), cavmae_audio(_tone(16000), 16000)
    )


@pytest.mark.parametrize("scale", [2**15, 2**23, 2**31, -(2**15)])
def test_integer_levels(scale):
    with pytest.raises(ValueError, match=r"samples from .*; needed \[-1, 1\).*Divide by 32768"):
        cavmae_audio(_tone(16000) * scale, 16000)


def test_loud_mixes_are_taken():
    cavmae_audio(_tone(16000) * 10, 16000)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_samples_that_are_not_finite(value):
    x = _tone(16000)
    x[0, 77] = value
    with pytest.raises(ValueError, match="waveform holds non-finite values"):
        cavmae_audio(x, 16000)


def test_waveforms_of_other_classes():
    x = _tone(16000)
    with pytest.raises(TypeError, match="waveform is a sparse COO tensor"):
        cavmae_audio(x.to_sparse(), 16000)
    features = cavmae_audio(torch.nn.Parameter(x, requires_grad=False), 16000)
    assert type(features) is torch.Tensor

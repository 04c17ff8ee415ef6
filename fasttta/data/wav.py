"""WAV files of every usual kind, read with the standard library; others through soundfile."""

from __future__ import annotations

import os
import shlex
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .filterbank import RATE

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_NAMES = {2: "ADPCM", 6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 80: "MPEG", 85: "MP3"}
# an extensible header names its format in the first two bytes of an identifier that ends so
_GUID_END = bytes.fromhex("000000001000800000aa00389b71")
# what programs that write into a pipe, and cannot go back, put in place of a size: ffmpeg
# 0xFFFFFFFF, sox 0x7FFFF000
_UNKNOWN = 0x7FFF0000


class _Format(NamedTuple):
    tag: int
    channels: int
    rate: int
    width: int  # bytes of a sample


def load_wav(path: str | os.PathLike) -> tuple[Tensor, int]:
    """Read an audio file: (waveform [channels, samples] float32, samples per second).

    Integer samples come in [-1, 1), floating ones as they are.

    Args:
        path: a WAV file (RIFF or RF64, with an extensible header or not, also one that was written
            into a pipe and does not know its length) of 8-, 16-, 24- or 32-bit integers or 32- or
            64-bit floats, any number of channels. With the package soundfile also FLAC, Ogg, MP3
            and what else it reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, empty or holds other samples; says how to convert it.
    """
    name = os.fsdecode(path)
    convert = f"convert it first: ffmpeg -i {shlex.quote(name)} -ar {RATE} -c:a pcm_s16le OUT.wav"
    with open(name, "rb") as file:
        start = file.read(12)
        if len(start) == 12 and (start[:4] not in (b"RIFF", b"RF64") or start[8:] != b"WAVE"):
            return _other(name, convert)
        content = start + file.read()
    try:
        kind, samples = _parse(content)
    except _Damaged as error:
        raise ValueError(f"{name!r} {error}; {convert}") from error
    values = _to_float(samples, kind)
    if not torch.isfinite(values).all():
        raise ValueError(f"{name!r} holds samples that are not finite (NaN or infinity)")
    return values.view(-1, kind.channels).T.contiguous(), kind.rate


class _Damaged(Exception):
    """A file cannot be read; the message completes a sentence that begins with its name."""


def _parse(content: bytes) -> tuple[_Format, bytearray]:
    """The format, and the samples as bytes, without the rest of a frame at the end."""
    if len(content) < 12:
        raise _Damaged("is damaged or no PCM WAV file (it ends too early)")
    view, position, kind, long_size = memoryview(content), 12, None, None
    (riff,) = struct.unpack_from("<I", content, 4)
    while position + 8 <= len(content):
        chunk, size = struct.unpack_from("<4sI", content, position)
        position += 8
        body = view[position : position + size]
        if chunk == b"ds64" and len(body) >= 16:  # RF64: sizes of 64 bits
            (long_size,) = struct.unpack_from("<Q", body, 8)
        elif chunk == b"fmt ":
            kind = _format(bytes(body))
        elif chunk == b"data":
            if kind is None:
                raise _Damaged("is damaged or no PCM WAV file (samples without a format)")
            if size == 0xFFFFFFFF and long_size:
                size = long_size
            # the sizes of a file that was written into a pipe say nothing
            piped = size >= _UNKNOWN and size != long_size
            if riff >= _UNKNOWN or riff <= position - 8:
                piped = piped or size == 0 or position + size > len(content)
            return kind, _frames(kind, view[position:], None if piped else size)
        position += size + size % 2  # chunks begin at even places
    if kind is None:
        raise _Damaged("is damaged or no PCM WAV file (it ends too early)")
    raise _Damaged("is damaged or no PCM WAV file (it has no samples)")


def _format(body: bytes) -> _Format:
    if len(body) < 16:
        raise _Damaged("is damaged or no PCM WAV file (its format ends too early)")
    tag, channels, rate, _, align, bits = struct.unpack_from("<HHIIHH", body)
    if tag == _EXTENSIBLE:
        if len(body) < 40 or body[26:40] != _GUID_END:
            raise _Damaged("holds samples of a format that is not known")
        (tag,) = struct.unpack_from("<H", body, 24)
    if not channels or not rate:
        raise _Damaged(f"names {channels} channels at a sample rate of {rate}; needed above zero")
    # of 20 or 24 bits in wider places the high ones count
    width = align // channels if align and align % channels == 0 else (bits + 7) // 8
    widths = {_PCM: (1, 2, 3, 4), _FLOAT: (4, 8)}.get(tag, ())
    if width not in widths or bits > 8 * width:
        if tag == _PCM:
            samples = f"{bits}-bit samples"
        elif tag == _FLOAT:
            samples = f"{bits}-bit floating-point samples"
        else:
            samples = f"{_NAMES.get(tag, f'format {tag}')} samples"
        raise _Damaged(
            f"holds {samples}; needed 8-, 16-, 24- or 32-bit integers or 32- or 64-bit floats"
        )
    return _Format(tag, channels, rate, width)


def _frames(kind: _Format, data: memoryview, size: int | None) -> bytearray:
    """The first ``size`` bytes of samples, which must be full frames; None: all full frames."""
    frame = kind.channels * kind.width
    if size is None:
        size = len(data) // frame * frame
    if size > len(data):
        raise _Damaged(
            f"is cut short: found {len(data)} bytes of samples, needed {size} by its header"
        )
    if size % frame:
        raise _Damaged(
            f"is damaged: {size} bytes of samples are no whole number of frames of {frame}"
        )
    if not size:
        raise _Damaged("holds no samples; needed at least one")
    return bytearray(data[:size])


def _to_float(data: bytearray, kind: _Format) -> Tensor:
    """Little-endian samples as float32; integers in [-1, 1)."""
    if kind.tag == _FLOAT:
        dtype = torch.float32 if kind.width == 4 else torch.float64
        return torch.frombuffer(data, dtype=dtype).to(torch.float32, copy=True)
    if kind.width == 1:  # the only width that WAV stores without sign
        return (torch.frombuffer(data, dtype=torch.uint8).to(torch.float32) - 128) / 128
    if kind.width == 2:
        return torch.frombuffer(data, dtype=torch.int16).to(torch.float32) / 2**15
    if kind.width == 3:
        low, middle, high = torch.frombuffer(data, dtype=torch.uint8).view(-1, 3).int().unbind(1)
        values = low + middle * 2**8 + (high ^ 0x80) * 2**16 - 2**23
        return values.to(torch.float32) / 2**23
    values = torch.frombuffer(data, dtype=torch.int32).to(torch.float32) / 2**31
    return values.clamp(max=1 - 2**-24)  # the top 64 of 2**32 levels round to 1.0


def _other(name: str, convert: str) -> tuple[Tensor, int]:
    """Reads a file of another kind than WAV, with soundfile."""
    try:
        import soundfile
    except ImportError as error:
        raise ValueError(
            f"{name!r} is no PCM WAV file (file does not start with RIFF id); for FLAC, Ogg and "
            f"MP3: pip install fasttta[audio]; or {convert}"
        ) from error
    try:
        samples, rate = soundfile.read(name, dtype="float32", always_2d=True)
    except (RuntimeError, TypeError, OSError) as error:
        raise ValueError(
            f"{name!r} is no PCM WAV file (file does not start with RIFF id), and soundfile cannot "
            f"read it: {error}; {convert}"
        ) from error
    if not len(samples):
        raise ValueError(f"{name!r} holds no samples; needed at least one")
    values = torch.from_numpy(samples)
    if not torch.isfinite(values).all():
        raise ValueError(f"{name!r} holds samples that are not finite (NaN or infinity)")
    return values.T.contiguous(), int(rate)

"""Images inside a report: PNG files as data URIs, and tables that hold them."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor


def png_file(pixels: Tensor) -> bytes:
    """A PNG file of an image [3, H, W] in [0, 1], 8 bits per channel.

    Raises:
        ValueError: it is no such image.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise ValueError(f"pixels has shape {list(pixels.shape)}; needed [3, H, W], not empty")
    if not torch.isfinite(pixels).all():
        raise ValueError("pixels holds NaN or infinity; needed values in [0, 1]")
    levels = (pixels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = levels.shape[1:]
    rows = torch.zeros(height, 1 + 3 * width, dtype=torch.uint8)  # each begins with filter 0
    rows[:, 1:] = levels.permute(1, 2, 0).reshape(height, -1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    data = zlib.compress(bytes(rows.flatten().tolist()), 9)
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    )


def data_uri(pixels: Tensor) -> str:
    """An image [3, H, W] in [0, 1] as a ``data:`` URI of a PNG file."""
    return "data:image/png;base64," + base64.b64encode(png_file(pixels)).decode()


@dataclass(frozen=True)
class Picture:
    """Args: source: a data URI; text: what is seen, for those who do not see it."""

    source: str
    text: str

    def html(self) -> str:
        if not self.source.startswith("data:image/png;base64,"):
            raise ValueError(f"source={self.source[:40]!r}: needed a data URI of a PNG file")
        return f'<img src="{escape(self.source)}" alt="{escape(self.text)}">'


@dataclass(frozen=True)
class Share:
    """A number from 0 to 1, written and as a bar."""

    value: float

    def html(self) -> str:
        return f'<b>{self.value:.2f}</b><i class="bar" style="width:{60 * self.value:.0f}px"></i>'


@dataclass(frozen=True)
class Gallery:
    """A table of pictures, numbers and text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Picture | Share]]
    caption: str = ""

    def html(self) -> str:
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in self.header)
        body = "".join(
            f"<tr>{''.join(f'<td>{_inside(cell)}</td>' for cell in row)}</tr>" for row in self.rows
        )
        note = f'<p class="note">{escape(self.caption)}</p>' if self.caption else ""
        return (
            f'<figure class="card gallery"><h3>{escape(self.title)}</h3><div class="scroll"><table>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</figure>"
        )


def _inside(cell: str | Picture | Share) -> str:
    return escape(cell) if isinstance(cell, str) else cell.html()

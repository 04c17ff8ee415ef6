"""Pictures inside reports."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from fasttta.evaluate.document import Document, Text
from fasttta.evaluate.pictures import Gallery, Picture, Share, data_uri, png_file


def _read(content: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(content))
    assert image.mode == "RGB"
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.view(image.height, image.width, 3).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (32, 3)])
def test_png_files_hold_the_pixels(shape):
    levels = torch.randint(256, (3, *shape), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_read(png_file(levels / 255)), levels.byte())
    beyond = torch.tensor([-0.5, 1.5, 0.5]).view(3, 1, 1)
    assert _read(png_file(beyond)).flatten().tolist() == [0, 255, 128]
    uri = data_uri(levels / 255)
    assert uri.startswith("data:image/png;base64,")
    assert base64.b64decode(uri.split(",")[1]) == png_file(levels / 255)


def test_what_is_no_image():
    for bad, match in (
        (torch.zeros(4, 4), r"shape \[4, 4\]; needed \[3, H, W\]"),
        (torch.zeros(3, 0, 4), "not empty"),
        (torch.full((3, 2, 2), torch.nan), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=match):
            png_file(bad)
    with pytest.raises(ValueError, match="needed a data URI"):
        Picture("https://example.org/x.png", "x").html()


def test_gallery():
    uri = data_uri(torch.rand(3, 2, 2))
    gallery = Gallery("A <b>", ["picture", "share"], [[Picture(uri, 'an "x"'), Share(0.25)]], "<i>")
    page = Document("t", [Text("x"), gallery]).html()
    assert page.count("<img ") == 1
    assert 'alt="an &quot;x&quot;"' in page
    assert "A &lt;b&gt;" in page
    assert "&lt;i&gt;" in page
    assert "<b>0.25</b>" in page
    assert "width:15px" in page

"""Pictures inside reports."""

from __future__ import annotations

import base64
import io

import pytest
import torch

from fasttta.evaluate.document import Document, Gallery, Picture, Share, Text, data_uri

Image = pytest.importorskip("PIL.Image")


def _pixels(uri: str) -> torch.Tensor:
    """Levels [3, H, W] of the PNG file in a data URI."""
    kind, content = uri.split(",")
    assert kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.mode == "RGB"
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.view(image.height, image.width, 3).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (32, 3)])
def test_data_uris_hold_the_pixels(shape):
    levels = torch.randint(256, (3, *shape), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_pixels(data_uri(levels / 255)), levels.byte())
    assert data_uri(levels / 255) == data_uri(levels / 255)
    beyond = torch.tensor([-0.5, 1.5, 0.5]).view(3, 1, 1)
    assert _pixels(data_uri(beyond)).flatten().tolist() == [0, 255, 128]


def test_other_tensors_and_sources_are_refused():
    for bad, match in (
        (torch.zeros(4, 4), r"shape \[4, 4\]; needed \[3, H, W\]"),
        (torch.zeros(3, 0, 4), "not empty"),
        (torch.full((3, 2, 2), torch.nan), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=match):
            data_uri(bad)
    with pytest.raises(ValueError, match="needed a data URI"):
        Picture("https://example.org/x.png", "x")


def test_gallery():
    uri = data_uri(torch.rand(3, 2, 2))
    gallery = Gallery("A <b>", ["picture", "share"], [[Picture(uri, 'an "x"'), Share(0.25)]], "<i>")
    page = Document("t", [Text("x"), gallery]).html()
    assert page.count("<img ") == 1
    assert 'alt="an &#34;x&#34;"' in page
    assert "A &lt;b&gt;" in page
    assert "&lt;i&gt;" in page
    assert "<b>0.25</b>" in page
    assert "width:15px" in page

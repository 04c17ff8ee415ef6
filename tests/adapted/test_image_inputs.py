"""Images as arrays, and pixels that rounding has put outside [0, 1]."""

from __future__ import annotations

import clips
import numpy as np
import pytest
import torch

import fasttta
from fasttta.data import Views, attack, cavmae_frame
from fasttta.views.views import shown

ABOVE, BELOW = float(np.nextafter(np.float32(1), np.float32(2))), -1e-7


@pytest.fixture
def clip():
    return clips.tiny_clip()


def _levels(seed=0, *shape):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 31, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("method", ["tpt", "source", "rada"])
def test_arrays_are_images(clip, method):
    if method == "rada":
        adapted = fasttta.adapt(clip, "rada", classes=clips.tiny_ids(), heads=2, views=4)
    else:
        adapted = clips.adapt(clip, method)
    levels = _levels()
    expected = adapted.step(torch.from_numpy(levels)).logits
    frozen = levels.copy()
    frozen.flags.writeable = False
    for image in (levels, frozen, levels[::-1][::-1], np.asfortranarray(levels)):
        assert torch.equal(adapted.step(image).logits, expected)
    floats = np.ascontiguousarray(levels.transpose(2, 0, 1).astype(np.float32) / 255)
    assert torch.equal(adapted.predict(floats), adapted.predict(torch.from_numpy(floats)))
    batch = _levels(1, 2)
    both = adapted.step(batch).logits
    assert torch.equal(both, adapted.step([batch[0], batch[1]]).logits)
    assert both.shape == (2, 6)


@pytest.mark.parametrize(
    ("image", "error", "match"),
    [
        (_levels().transpose(2, 0, 1), ValueError, r"uint8 with shape \[3, 31, 40\]; needed \[H"),
        (_levels().astype(np.int64), TypeError, "int64; needed uint8 or floating point"),
        (_levels().astype(np.float64), ValueError, r"needed \[3, H, W\]"),
        (np.array(["a"]), TypeError, "image 0"),
    ],
)
def test_arrays_that_are_none(clip, image, error, match):
    with pytest.raises(error, match=match):
        clips.adapt(clip, "source").step(image)


def test_rounding_is_clamped(clip):
    image = torch.rand(3, 24, 24)
    image[0, 0, :2] = torch.tensor([1.0, 0.0])
    beyond = image.clone()
    beyond[0, 0, :2] = torch.tensor([ABOVE, BELOW])
    adapted = clips.adapt(clip, "tpt")
    assert torch.equal(adapted.step(beyond).logits, adapted.step(image).logits)
    assert torch.equal(cavmae_frame(beyond, size=24), cavmae_frame(image, size=24))
    views = Views(beyond[None], beyond[None], torch.tensor([ABOVE]))
    assert torch.equal(views.base, image[None])
    assert float(views.weight) == 1
    assert float(beyond[0, 0, 0]) > 1  # the caller's stays
    attacked = attack.pgd(lambda x: x.mean((2, 3)), beyond[None], "pseudo", steps=0)
    assert torch.equal(attacked.pixels, image[None])


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-2.11790393, 2.64, "from -2.118 to 2.64"), (0.0, 1.00001, "from 0 to 1.00001"),
        (-1e-5, 1.0, "from -1e-05 to 1"), (0.0, 255.0, "from 0 to 255"),
    ],
)  # fmt: skip
def test_messages_show_what_lies_outside(clip, low, high, text):
    assert shown(low, high) == text
    image = torch.full((3, 24, 24), low)
    image[0, 0, 0] = high
    for call in (clips.adapt(clip, "source").step, lambda x: cavmae_frame(x, size=24)):
        with pytest.raises(ValueError, match=f"pixels {text}; needed"):
            call(image)
    image = torch.full((1, 3, 24, 24), min(low, 0.0))
    image[0, 0, 0] = max(high, 1.002)
    with pytest.raises(ValueError, match="pixels runs from .* to (2.64|1.002|255), needed"):
        clip.encode_image(image)


@pytest.mark.parametrize("kind", ["levels", "floats"])
def test_advice_on_the_order_of_axes_is_a_call_that_works(clip, kind):
    """An array has no ``permute``; a shape that no order mends gets no such advice."""
    adapted = clips.adapt(clip, "source")
    right = _levels()
    if kind == "floats":
        right = (right / 255).transpose(2, 0, 1)
    wrong = right.transpose((2, 0, 1) if kind == "levels" else (1, 2, 0)).copy()
    for image in (wrong, torch.from_numpy(wrong)):
        for reads in (adapted, cavmae_frame):
            with pytest.raises(ValueError, match="if it is") as raised:
                reads(image)
            call = str(raised.value).rpartition(", give ")[2]
            assert call.startswith("image.")
            mended = eval(call, {"image": image})  # a call of our own message
            assert torch.equal(reads(mended), reads(right))
    grey = right[:, :, 0] if kind == "levels" else right[0]
    for reads in (adapted, cavmae_frame):
        with pytest.raises(ValueError, match="needed") as raised:
            reads(grey)
        assert "image." not in str(raised.value)

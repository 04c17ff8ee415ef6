"""CLIP's pixel normalisation: its constants lie where the model lies, and keep their digits."""

from __future__ import annotations

import copy

import pytest
import torch
from clips import tiny_clip, tiny_ids, tiny_views
from host_copies import HostCopies

import fasttta
from fasttta.methods.view_ensemble import similarity_weights
from fasttta.models import CLIP


def scale_of(model, dtype):
    """Mean and standard deviation that a pass in ``dtype`` subtracts and divides by."""
    return model.pixel_mean.to(dtype).flatten(), model.pixel_std.to(dtype).flatten()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_conversions_round_once(dtype):
    model = tiny_clip().half().float().to(dtype)
    for x, values in zip(scale_of(model, dtype), (model.mean, model.std), strict=True):
        assert torch.equal(x, torch.tensor(values, dtype=dtype))


def test_the_working_copy_has_them_in_its_precision():
    adapted = fasttta.adapt(tiny_clip().half(), "mta", classes=tiny_ids(), precision="fp32")
    working = adapted._clip
    assert working.pixel_mean.dtype == torch.float32
    assert torch.equal(working.pixel_mean.flatten(), torch.tensor(working.mean))


def test_checkpoints_do_not_hold_them():
    model = tiny_clip()
    assert not [name for name in model.state_dict() if "pixel" in name]
    loaded, copied = CLIP.from_checkpoint(model.state_dict()), copy.deepcopy(model)
    assert loaded.pixel_mean.device.type == "cpu"
    assert torch.equal(copied.pixel_mean, model.pixel_mean)
    with torch.device("meta"):
        empty = tiny_clip()
    empty.load_state_dict(model.state_dict(), assign=True)
    pixels = torch.rand(2, 3, 24, 24)
    assert torch.equal(empty.encode_image(pixels), model.encode_image(pixels))
    emptied = tiny_clip().to("meta").to_empty(device="cpu")
    assert torch.equal(emptied.pixel_std, tiny_clip().pixel_std)


def test_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_clip()
    pixels = torch.rand(1, 3, 24, 24).requires_grad_()
    x = model._normalised(pixels)
    (gradient,) = torch.autograd.grad(x.sum(), pixels)
    assert torch.equal(gradient[0, :, 0, 0], 1 / torch.tensor(model.std))


@pytest.mark.parametrize("resnet", [False, True])
def test_a_pass_copies_nothing_from_the_host(resnet):
    model = tiny_clip(resnet=resnet).to("meta")
    size, text = model.resolution, torch.empty(6, 12, device="meta")
    with HostCopies() as copies:
        model.encode_image(torch.empty(3, 3, size, size, device="meta"))
        model.attention_maps(torch.empty(3, 3, size, size, device="meta"), text)
    assert copies.to_device == []


@pytest.mark.parametrize("n", [1, 8, 40])
def test_a_pattern_of_neighbours_is_not_copied(n):
    pattern = tuple(i % 3 != 0 for i in range(n))
    with HostCopies() as copies:
        similarity_weights(torch.empty(1, n, 4, device="meta"), 5, 0.01, pattern)
    assert copies.to_device == []


def test_a_copy_is_counted():
    with HostCopies() as copies:
        tiny_views(3).to("meta")
        torch.tensor([1.0, 2.0], device="meta")
        torch.empty(5, device="meta").new_tensor([1.0])
    assert copies.to_device == [[3, 3, 24, 24], [3, 3, 24, 24], [3], [2], [1]]

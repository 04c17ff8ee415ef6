"""With torch.set_default_device new tensors come where the user wants them, draws and counters do
not: a CUDA default is shown by another device that is never the CPU."""

from __future__ import annotations

import pytest
import torch
from cases import tiny_stats
from clips import image as tiny_image
from clips import tiny_clip, tiny_ids, tiny_views

import fasttta
from fasttta.views.make import draw

OPTIONS = {
    "abpem": {"k": 3, "window": 2}, "eata": {"e_margin": 9.0}, "sar": {"e_margin": 9.0},
    "brimpr": {"prompts": (2, 3), "source_stats": tiny_stats()}, "rada": {"heads": 3},
}  # fmt: skip


@pytest.mark.parametrize("method", fasttta.methods.names("fusion"))
def test_fusion_steps(tiny_model, tiny_batch, method):
    def run():
        adapted = fasttta.adapt(model, method, seed=3, **OPTIONS.get(method, {}))
        return [adapted.step(*batch).logits for batch in batches]

    model, batches = tiny_model(), [tiny_batch(seed=s) for s in range(2)]
    expected = run()
    with torch.device("meta"):
        logits = run()
    assert all(map(torch.equal, logits, expected))


@pytest.mark.parametrize("method", fasttta.methods.names("vision-language"))
def test_episodes(method):
    def run():
        adapted = fasttta.adapt(clip, method, classes=ids, **options)
        return torch.stack((adapted.step(views=views).logits, adapted(image)))

    options = {"heads": 4} if method == "rada" else {}
    options = {"select": 0.5} if method.endswith("tpt") else options
    clip, ids, views, image = tiny_clip(), tiny_ids(), tiny_views(), tiny_image(3)
    expected = run()
    with torch.device("meta"):
        logits = run()
    assert torch.equal(logits, expected)


def test_draws():
    expected, _ = draw(3, 8, 8, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        drawn, _ = draw(3, 8, 8, torch.Generator().manual_seed(0))
    assert drawn == expected

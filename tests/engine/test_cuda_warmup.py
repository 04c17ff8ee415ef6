"""On a GPU: after a warm-up no batch of a stream waits for a compiler or a capture."""

from __future__ import annotations

import pytest
import torch
from cases import differing, snapshot
from clips import image, tiny_clip, tiny_ids

import fasttta
from fasttta.ops import first_use

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def _slow(made):
    """What took as long as a compilation, or was captured."""
    return [x for x in made if x.kind == "graph" or x.seconds > first_use.SHORT]


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_stream_waits_for_nothing(tiny_model, tiny_batch, engine, precision):
    options = {"k": 3, "window": 3, "precision": precision, "engine": engine}
    adapted = fasttta.adapt(tiny_model().cuda(), "abpem", **options)
    adapted.step(*(x.cuda() for x in tiny_batch(5, seed=1)))
    before, random = snapshot(adapted), torch.cuda.get_rng_state()
    adapted.warmup(*(x.cuda() for x in tiny_batch(5)))
    assert differing(before, adapted) == []
    assert torch.equal(random, torch.cuda.get_rng_state())
    adapted.reset()
    with first_use.recording() as made:
        for seed, size in enumerate((5, 5, 2, 5, 3, 1, 4)):
            batch = [x.cuda() for x in tiny_batch(size, seed=seed)]
            adapted.step(*batch)
            adapted.predict(*batch)
        torch.cuda.synchronize()
    assert _slow(made) == []


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_images_wait_for_nothing(engine):
    options = {"classes": tiny_ids(), "views": 64, "engine": engine}
    adapted = fasttta.adapt(tiny_clip().cuda(), "tpt", **options)
    adapted.warmup([image(i).cuda() for i in range(4)])
    with first_use.recording() as made:
        for count in (4, 1, 3, 2):
            adapted.step([image(i).cuda() for i in range(count)])
        torch.cuda.synchronize()
    assert _slow(made) == []

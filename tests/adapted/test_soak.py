"""A long stream: flat memory, finite numbers, the same again with the same seed.

``FASTTTA_SOAK=10000 pytest tests/adapted/test_soak.py`` takes minutes; the default is 400 steps.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import fasttta

STEPS = int(os.environ.get("FASTTTA_SOAK", "400"))


def _resident() -> int:
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_soak(tiny_model):
    model = tiny_model(audio_tokens=2, video_tokens=2, dim=4, num_heads=1, depth=(1, 1, 1))
    first, second = (
        fasttta.adapt(model, "abpem", k=3, window=2, lr=1e-4, seed=3) for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    early = 0
    for step in range(STEPS):
        audio = torch.randn(2, 4, 4, generator=generator)
        video = torch.randn(2, 3, 3, 6, generator=generator)
        logits = first(audio, video)
        assert torch.isfinite(logits).all(), step
        if step < STEPS // 10:
            assert torch.equal(second(audio, video), logits), step
        if step == STEPS // 10:
            early = _resident()
    assert all(torch.isfinite(x).all() for x in first.tuned.values())
    assert _resident() - early < 8 * 2**20

"""Launch plans: which GPUs share them, and that one made for a family never exceeds its memory."""

from __future__ import annotations

import pytest
import torch
from fasttta.kernels import (
    flat_attention_plan,
    launch,
    launch_plan,
    score_moments_per_head_plan,
    score_moments_plan,
)


@pytest.mark.parametrize(
    ("capability", "family"),
    [(7, "sm_80"), (8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (11, "sm_100"), (12, "sm_120")],
)
def test_family(capability, family):
    """12.x has no tcgen05 (as 10.x and 11.x have) and no wgmma (as 9.x has): no plan of theirs."""
    assert launch_plan.family(capability) == family


def test_a_gpu_is_asked_for_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    assert launch._architecture.__wrapped__(0) == "sm_120"


def test_later_gpus_are_planned_without_tensor_memory():
    assert launch_plan.family(13) == "sm_120"


def test_consumer_gpus_have_99_kilobytes_a_block():
    """sm_86 and sm_89, which are planned as sm_80, and sm_120."""
    assert launch_plan.SHARED_MEMORY["sm_80"] == launch_plan.SHARED_MEMORY["sm_120"] == 101376
    assert launch_plan.SHARED_MEMORY["sm_90"] == 232448


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("sm_80", "ieee"), ("sm_90", "tf32x3"), ("sm_100", "tf32x3"), ("sm_120", "ieee")],
)
def test_float32_products(architecture, expected):
    assert launch_plan.precision(architecture, False) == expected
    assert launch_plan.precision(architecture, True) == "ieee"


@pytest.mark.parametrize("architecture", launch_plan.SHARED_MEMORY)
@pytest.mark.parametrize("half", [False, True])
def test_moments_of_each_head(architecture, half):
    """A program a modality of a side of a head, whose loads run ahead: stages above 1."""
    sizes = 8, 12, [512, 196], 64
    tokens = score_moments_per_head_plan.token_moments(architecture, half, *sizes)
    assert (tokens.grid, tokens.constants["BT"]) == ((48, 8), 32)
    assert tokens.constants["TWICE"] is (architecture == "sm_100")
    gradients = score_moments_per_head_plan.gradients(architecture, half, *sizes, False, False)
    assert gradients.grid == (48, 8)
    assert tokens.stages == gradients.stages == 3
    warp = architecture in ("sm_80", "sm_120")
    assert gradients.constants["BT"] == (32 if warp and not half else 64)
    assert gradients.registers == (255 if warp else None)
    assert score_moments_per_head_plan.moments(*sizes, False).grid == (12, 8)


@pytest.mark.parametrize(
    ("architecture", "half", "count", "d", "forward", "gradients"),
    [
        ("sm_90", False, 1000, 64, (128, 64, 8), (128, 32, 8)),
        ("sm_90", False, 37, 64, (64, 32, 8), (64, 32, 8)),  # one tile of 128 would be half empty
        ("sm_90", False, 1000, 128, (16, 16, 4), (16, 16, 4)),
        ("sm_90", True, 1000, 64, (64, 64, 4), (64, 32, 8)),
        ("sm_100", False, 1000, 64, (64, 32, 8), (64, 32, 8)),
        ("sm_80", False, 1000, 64, (32, 16, 8), (32, 16, 8)),
        ("sm_120", False, 1000, 64, (32, 16, 8), (32, 32, 8)),
        ("sm_120", True, 1000, 128, (64, 32, 4), (64, 32, 8)),
    ],
)
def test_tiles_of_flat_attention(architecture, half, count, d, forward, gradients):
    """Rows, columns and warps; programs of all rows of all heads, two kinds of them backward."""
    plans = (
        flat_attention_plan.forward(architecture, half, 48, count, d)[0],
        flat_attention_plan.gradients(architecture, half, 48, count, d),
    )
    for plan, expected in zip(plans, (forward, gradients), strict=True):
        assert (plan.constants["BM"], plan.constants["BN"], plan.warps) == expected
    assert plans[0].grid == (-(-count // forward[0]), 48)
    assert plans[1].grid == (2 * -(-count // gradients[0]), 48)


def test_large_score_tiles_share_the_processors_of_sm_90():
    """18 tiles of 128 x 256 a sample; smaller tiles and other GPUs have a program each."""
    spans = [512, 196]
    large = score_moments_plan.score_tiles("sm_90", True, 32, spans, 64)
    assert (large.grid, large.constants["PERSISTENT"]) == ((132,), True)
    assert (large.constants["TILES"], large.constants["BN"], large.warps) == (18, 256, 8)
    for architecture, half, batch in (
        ("sm_90", True, 8), ("sm_90", False, 32), ("sm_100", True, 32), ("sm_120", True, 32),
    ):  # fmt: skip
        other = score_moments_plan.score_tiles(architecture, half, batch, spans, 64)
        assert not other.constants["PERSISTENT"]
        assert other.grid == (other.constants["TILES"], batch)
        merging = score_moments_plan.merge_tiles(other, batch, spans, False)
        assert (merging.grid, merging.constants["TILES"]) == ((batch,), other.grid[0])


@pytest.mark.parametrize(("architecture", "stages"), [("sm_90", 3), ("sm_80", 2), ("sm_100", 2)])
def test_token_gradients_load_ahead(architecture, stages):
    _, table = score_moments_plan.weighted_scores(
        architecture, True, 32, [512, 196], 64, False, False
    )
    plan = score_moments_plan.token_gradients(architecture, True, 32, 12, 64, table)
    assert (plan.stages, plan.warps) == (stages, 8)

"""Launch plans: which GPUs share them, and that one made for a family never exceeds its memory."""

from __future__ import annotations

import pytest
import torch
from fasttta.kernels import launch, launch_plan


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

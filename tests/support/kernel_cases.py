"""Inputs of the kernels' tests, and fixtures under which short inputs take every path."""

from __future__ import annotations

import pytest
import torch
from fasttta.kernels import adaptation_head_plan, entropies_plan, launch_plan, score_moments_plan
from kernels_here import DEVICE, among_nan

# batch, heads, spans, head dim: odd on every axis, sizes of 1 and 2, three modalities, one
SCORE_SHAPES = [
    (2, 3, (20, 13), 6),
    (1, 1, (2, 2), 1),
    (2, 2, (7, 2, 5), 5),
    (1, 2, (9,), 4),
    (1, 2, (35, 18), 40),
]


def qk(batch, heads, spans, d, dtype=torch.float32, offset=0.0, seed=0):
    """q and k as views of a packed qkv product [B, T, 3, H, d] that lies among nan."""
    generator = torch.Generator("cpu").manual_seed(seed)
    qkv = torch.randn(batch, sum(spans), 3, heads, d, generator=generator, device="cpu") + offset
    q, k, _ = among_nan(qkv.to(DEVICE, dtype)).permute(2, 0, 3, 1, 4)
    return q, k


def score_options(q, spans, per_head, scale=None):
    """(spans, scale, per_head) of the operations on scores."""
    return list(spans), q.shape[3] ** -0.5 if scale is None else scale, per_head


def logits(n, c, kind="random", dtype=torch.float32):
    """Logits [n, c] among nan: random, with ties, extreme, equal, or with -inf in every third."""
    generator = torch.Generator("cpu").manual_seed(n * c)
    x = torch.randn(n, c, generator=generator, device="cpu")
    if kind == "ties":
        x = x.round() * torch.tensor([1.0, -1.0])[: n * c % 2 + 1][-1]  # -0 and 0 are one value
    elif kind == "extreme":
        x = x * 400
    elif kind == "equal":
        x = torch.zeros_like(x)
    elif kind == "masked":
        x[:, ::3] = -torch.inf
    return among_nan(x.to(DEVICE, dtype))


@pytest.fixture(name="per_head", params=[False, True], ids=["mean", "each"])
def per_head_fixture(request):
    """Moments of the head mean, or of each head."""
    return request.param


@pytest.fixture(name="small_tiles")
def small_tiles_fixture(monkeypatch):
    """Several tiles of scores on short spans."""
    monkeypatch.setattr(
        score_moments_plan, "score_tile", lambda *_: score_moments_plan.Tile(16, 32, 4, 1)
    )


@pytest.fixture(name="chunked", params=[False, True], ids=["in-one-piece", "in-chunks"])
def chunked_fixture(request, monkeypatch):
    """Rows that stay in registers, or the kernels of rows that do not, with short chunks."""
    if not request.param:
        return
    monkeypatch.setattr(entropies_plan, "ROW_CLASSES", 0)
    for module, name in (
        (entropies_plan, "long_rows"),
        (entropies_plan, "long_row_gradient"),
        (adaptation_head_plan, "long_gradient"),
    ):
        full = getattr(module, name)

        def small(*args, full=full):
            plan = full(*args)
            return launch_plan.Plan(plan.grid, plan.constants | {"BC": 128}, plan.warps)

        monkeypatch.setattr(module, name, small)

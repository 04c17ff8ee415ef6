"""Covariances and means of each head's tokens against the default, at any mean and shift."""

from __future__ import annotations

import pytest
import torch
from fasttta.kernels import launch
from kernel_cases import SCORE_SHAPES, qk, score_options
from kernels_here import DEVICE, HALVES, KERNELS, check, composite, poisoned  # noqa: F401


@pytest.mark.parametrize("shape", SCORE_SHAPES, ids=str)
def test_shapes(shape):
    check("token_moments", *qk(*shape), list(shape[2]))


def test_several_tiles_of_tokens():
    check("token_moments", *qk(1, 1, (150, 33), 24), [150, 33])


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])  # which transposes, or loads again
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype, architecture, monkeypatch):
    """High and rest of a centred token hold what float32 sums need: nothing is lost to the type."""
    monkeypatch.setattr(launch, "architecture", lambda _: architecture)
    q, k = qk(1, 2, (70, 18), 24, dtype)
    tokens = KERNELS["token_moments"](q, k, [70, 18])
    exact = composite.token_moments(q.double(), k.double(), [70, 18])
    assert (tokens - exact).abs().max() < 2e-6 * exact.abs().max()


def _error(q, spans):
    """Of covariances [d, d], relative to the standard deviations of their channels."""
    tokens = KERNELS["token_moments"](q, q, spans)[:, :, 0, :, :-1].double()
    exact = composite.token_moments(q.double(), q.double(), spans)[:, :, 0, :, :-1]
    std = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    return ((tokens - exact).abs() / (std[..., :, None] * std[..., None, :])).max()


@pytest.mark.parametrize("offset", [0.0, 100.0, 10_000.0])
def test_means_of_any_size_cost_no_digits(offset):
    """The mean of a channel, up to 10,000 deviations, is taken away before anything is squared."""
    q, _ = qk(1, 1, (100, 40), 16, offset=offset)
    assert _error(q, [100, 40]) < 2e-6


@pytest.mark.parametrize("place", [0, 31, 99])
def test_an_outlier_costs_no_digits_wherever_it_stands(place):
    """Other tokens' variance survives one token 1000 deviations away, also at the first place.

    The outlier stands in channel 0: the other channels must not notice.
    """
    q, _ = qk(1, 1, (100,), 16)
    q = q.clone()
    q[:, :, place, 0] += 1000.0
    assert _error(q, [100]) < 2e-6


def test_first_tokens_far_from_the_others():
    """A first tile whose mean is 2000 away from the rest: its own variance is what is measured."""
    q, _ = qk(1, 1, (200,), 16)
    q = q.clone()
    q[:, :, :32] += 2000.0
    assert _error(q, [200]) < 4e-6


def test_equal_tokens_have_no_variance():
    """Not even of round-off: 0.1 is no sum of 40 of them divided by 40."""
    q = torch.full((1, 1, 40, 8), 0.1, device=DEVICE)
    tokens = KERNELS["token_moments"](q, q, [33, 7])
    assert (tokens[..., :-1, :] == 0).all()
    assert (tokens[..., -1, :] == q[0, 0, 0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_loss_takes_them_as_they_are(dtype):
    """Both directions of attention_bootstrap: the same bits whether they are given or computed."""
    q, k = qk(2, 2, (20, 13), 8, dtype)
    options = *score_options(q, (20, 13), True), False
    tokens = KERNELS["token_moments"](q, k, [20, 13])
    computed = KERNELS["attention_bootstrap"](q, k, *options)
    given = KERNELS["attention_bootstrap"](q, k, *options, None, None, tokens)
    assert all(torch.equal(x, y) for x, y in zip(given, computed, strict=True))
    args = torch.ones(2, device=DEVICE), q, k, *computed[1:], *options
    computed = KERNELS["attention_bootstrap_backward"](*args)
    given = KERNELS["attention_bootstrap_backward"](*args, None, None, tokens)
    assert all(torch.equal(x, y) for x, y in zip(given, computed, strict=True))
    # they are read, and not computed again
    args = *args, None, None, torch.full_like(tokens, torch.nan)
    assert KERNELS["attention_bootstrap_backward"](*args)[0].isnan().all()

"""Methods with options for the tiny model, and what equal means."""

from __future__ import annotations

import torch


def tiny_stats():
    """Source statistics that fit the tiny model: 1 and 2 encoder blocks of width 12."""
    from fasttta import SourceStats

    generator = torch.Generator().manual_seed(0)

    def pair(n):
        mean = torch.randn(n, 12, generator=generator)
        return torch.rand(n, 12, generator=generator) + 0.1, mean

    return SourceStats(audio=pair(1), video=pair(2), joint=pair(1))


METHODS = {
    "source": {},
    "tent": {"lr": 1e-3},
    # margins that some of the tiny model's samples are above and some below
    "eata": {"lr": 1e-3, "e_margin": 1.9, "d_margin": 0.999},
    "sar": {"lr": 1e-3, "e_margin": 1.9, "rho": 0.01},
    "read": {"lr": 1e-3},
    "abpem": {"k": 3, "window": 3, "lr": 1e-3},
    "brimpr": {"lr": 1e-3, "prompts": (2, 3), "source_stats": tiny_stats()},
    "rada": {"lr": 1e-3, "heads": 3},
}


def flat(result):
    """The tensors of a StepResult, in a fixed order."""
    yield result.logits
    yield result.logits_before
    yield result.n_used
    for group in (result.losses, result.stats):
        for name in sorted(group):
            yield group[name]


def same(a, b):
    """Two results bit for bit, nan equal to nan."""
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    return all(torch.allclose(x, y, **exact) for x, y in zip(flat(a), flat(b), strict=True))


def state_equal(a, b):
    """All that two adapted models would save, bit for bit."""
    x, y = a._state.tensors(), b._state.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)

"""Whether the outputs of a bench and of its reference agree; without that there is no ratio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]
ROUNDING = 16 * torch.finfo(torch.float32).eps  # differences that are never an error, in float32


def difference(returned: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Largest error of the leading samples that ``wanted`` has: absolute, and as a share of the
    largest value wanted."""
    assert returned.isfinite().all(), "the outputs are not finite"
    wanted = wanted.detach().double()
    returned = (
        returned.detach().double()[: len(wanted)] if wanted.ndim else returned.detach().double()
    )
    worst = (returned - wanted).abs().max().item()
    return worst, worst / max(wanted.abs().max().item(), torch.finfo(torch.float64).tiny)


def agreement(
    outputs: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    exact: tuple[Tensor, ...] | None,
    tolerance: float | None,
    rounding: float = ROUNDING,
    noise: dict[int, float] | None = None,
    most: float | None = None,
) -> tuple[float, float]:
    """Errors of the outputs against ``exact``, else the reference; fails where they disagree.

    Without a tolerance the reference's own error in the same type is the measure: four times that,
    and at least ``rounding``, as a reference may come close to the exact value by chance, and not
    more than ``most``: a reference that is far off excuses nothing. ``noise``
    keeps the largest such error of each output from one call to the next: a loss that drifts from
    the exact one through several steps also crosses it.
    """
    errors, noise = [], {} if noise is None else noise
    truth = expected if exact is None else exact
    for i, (returned, reference, wanted) in enumerate(zip(outputs, expected, truth, strict=True)):
        allowed = tolerance
        if allowed is None:
            noise[i] = max(noise.get(i, 0.0), difference(reference, wanted)[1])
            allowed = max(4 * noise[i], rounding)
            allowed = allowed if most is None else min(allowed, most)
        errors.append(difference(returned, wanted))
        apart = difference(returned, reference)[1]
        assert errors[-1][1] <= allowed, f"output {i} is {errors[-1][1]:.1e} off, not {allowed:.1e}"
        # the reference may be as far off on the other side
        limit = max(2 * allowed, allowed + noise.get(i, 0.0))
        assert apart <= limit, f"output {i} is {apart:.1e} from the reference's: no ratio"
    return max(e[0] for e in errors), max(e[1] for e in errors)


def check(
    run: Run,
    reference: Run | None,
    exact: tuple[Tensor, ...] | Run | None,
    *,
    tolerance: float | None,
    rounding: float,
    most: float | None = None,
    times: int,
) -> dict[str, Any]:
    """Calls both sides, and what is exact, in turn, and compares their outputs after each call.

    Args:
        times: how often.

    Returns:
        Errors of the last call and what they are against, as the results file has them.

    Raises:
        AssertionError: the outputs disagree.
    """
    noise: dict[int, float] = {}
    for _ in range(times):
        outputs = run()
        expected = outputs if reference is None else reference()
        truth = exact() if callable(exact) else exact
        errors = agreement(outputs, expected, truth, tolerance, rounding, noise, most)
    return {
        "max_abs_error": errors[0],
        "relative_error": errors[1],
        "against": "reference" if truth is None else str(truth[0].dtype)[6:],
    }

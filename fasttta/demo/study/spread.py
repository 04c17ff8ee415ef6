"""Means with spreads, and how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Spread = dict[str, float]  # {"mean": ..., "std": ...}


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (divisor n - 1; 0 for a single value)."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std}


def shown(value: Spread, digits: int = 1, sign: bool = False, several: bool = True) -> str:
    """mean ± std; the mean alone unless it is of several values."""
    plus = "+" if sign else ""
    deviation = f" ±{value['std']:.{digits}f}" if several else ""
    return f"{value['mean']:{plus}.{digits}f}{deviation}"


def several_seeds(study: Mapping[str, Any]) -> bool:
    """Whether a study's results are means over more than one seed."""
    return len(study["protocol"]["seeds"]) > 1


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: 1 where y rises whenever x does; 0 where one of them is constant."""
    if len(x) < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return statistics.correlation(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(o == value for o in values) - 1) / 2
        for value in values
    ]

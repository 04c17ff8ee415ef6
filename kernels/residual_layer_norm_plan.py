"""Launch plans of the residual addition and its LayerNorm. Pure Python, no Triton."""

from __future__ import annotations

from .launch_plan import Plan, cdiv, power_of_2

_PARTS = 1024  # partial sums of a tuned weight: 8 blocks of threads for each of an H200's SMs


def _row(width: int) -> tuple[dict[str, object], int]:
    """Block of a row, which stays in registers, and its warps: 8 values a thread where it can."""
    block = power_of_2(max(32, width))
    return {"BD": block}, min(16, max(1, block // 256))


def rows(n: int, width: int) -> Plan:
    """Plan of the forward pass: a program a row."""
    constants, warps = _row(width)
    return Plan((n,), constants, warps)


def gradient(n: int, width: int, tuned: bool) -> Plan:
    """Plan of the gradient: a program ``ROWS`` rows, which are one unless it sums their part of a
    tuned weight's gradient. A power of two, so that few kernels are compiled.

    Args:
        n, width: rows and channels.
        tuned: whether weight and bias have a gradient.
    """
    constants, warps = _row(width)
    many = power_of_2(max(8, cdiv(n, _PARTS))) if tuned else 1
    return Plan((cdiv(n, many),), constants | {"ROWS": many}, warps)

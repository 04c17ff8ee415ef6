"""Launch plans of rows in float8. Pure Python, no Triton."""

from __future__ import annotations

from .launch_plan import Plan, cdiv, power_of_2

WIDEST = 16384  # values of a row that stays in registers


def rows(n: int, width: int, interpreted: bool, activation: str | None = None) -> Plan:
    """Plan for n rows: 16 values a thread, so that a row is read once.

    Args:
        n, width: of x [n, width].
        interpreted: whether Triton's interpreter runs it, whose cast to float8 truncates.
        activation: "", "gelu" or "quick_gelu", of kernels that have one.
    """
    bd = power_of_2(max(32, width))
    warps = 4 if bd <= 2048 else min(16, bd // 512)
    br = max(1, 512 * warps // bd)
    constants: dict[str, object] = {"ROUND": interpreted, "BR": br, "BD": bd}
    if activation is not None:
        constants["ACTIVATION"] = activation
    return Plan((cdiv(n, br),), constants, warps)

"""Launch plans of activations: GELU and QuickGELU. Pure Python, no Triton."""

from __future__ import annotations

from .launch_plan import Plan, cdiv

BLOCK = 2048  # values of a program: 16 a thread, two loads of 16 bytes in half types


def elements(n: int, quick: bool) -> Plan:
    """Plan of n values; quick: QuickGELU, with a sigmoid in place of the normal distribution."""
    return Plan((cdiv(n, BLOCK),), {"QUICK": quick, "BN": BLOCK}, 4)

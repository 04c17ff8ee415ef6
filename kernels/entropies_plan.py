"""Launch plans of the entropies of rows of logits. Pure Python, no Triton.

The adaptation head starts with the same launches: adaptation_head_plan.py has the others.
"""

from __future__ import annotations

from .launch_plan import Plan, cdiv, power_of_2

ROW_CLASSES = 4096  # a row of at most so many logits stays in registers


def rows(n: int, classes: int, k: int, bits: int, samples: int) -> Plan:
    """Plan for rows that stay in registers: a warp a sample up to 512 classes, whose sums need no
    barrier.

    For more classes ptxas would spill 16 bytes to fit more blocks than a launch has.

    Args:
        n, classes: samples and classes of the logits.
        k: classes that count.
        bits: of a logit's key, 32, or fewer where half types need no more.
        samples: that a program takes.
    """
    bc = power_of_2(max(32, classes))
    constants = {"SELECT": k < classes, "BITS": bits, "PACKED": classes < 1024, "BC": bc}
    if bc <= 512:
        return Plan((cdiv(n, samples),), constants, 1)
    return Plan((cdiv(n, samples),), constants, 8 if bc <= 1024 else 16, registers=128)


def long_rows(n: int, classes: int, k: int, bits: int) -> Plan:
    """Plan for longer rows: a program a sample, BC classes at a time. Arguments as in ``rows``."""
    return Plan((n,), {"SELECT": k < classes, "BITS": bits, "BC": 4096}, 16)


def long_row_gradient(n: int, classes: int, k: int, bits: int) -> Plan:
    """Plan for the gradient of longer rows. Arguments as in ``rows``."""
    return Plan((n,), {"SELECT": k < classes, "BITS": bits, "BC": 2048}, 8)

"""Launch plans of the adaptation head, besides those of its rows. Pure Python, no Triton.

entropies_plan.py has the launches of the rows, which come first.
"""

from __future__ import annotations

from .launch_plan import Plan, cdiv, power_of_2

MOST_PARTS = 256  # partial sums of predictions: the second launch reads them all


def samples_per_program(n: int) -> int:
    """Samples that a program of the rows takes, so that there are at most MOST_PARTS parts."""
    return cdiv(n, MOST_PARTS)


def balance(n: int, classes: int, softmax_sum: bool) -> Plan:
    """Plan of the second launch: a program BR samples.

    Args:
        n, classes: samples and classes of the logits.
        softmax_sum: whether the class distribution is the softmax of the predictions' sum.
    """
    bc = power_of_2(max(32, classes))
    rows = 4096 // bc  # 16 elements a thread
    constants = {"SOFTMAX_SUM": softmax_sum, "BR": rows, "BC": bc, "BN": 256}
    return Plan((cdiv(n, rows),), constants, 8)


def long_columns(classes: int) -> Plan:
    """Plan of the sums over samples, for rows of any length: a program BC classes."""
    return Plan((cdiv(classes, 256),), {"BR": 16, "BC": 256}, 8)


def long_gradient(n: int, classes: int, k: int, bits: int, softmax_sum: bool) -> Plan:
    """Plan of the gradient of rows longer than entropies_plan.ROW_CLASSES: a program a sample.

    Args:
        k, bits: classes that count, and bits of a logit's key; the rest as in ``balance``.
    """
    constants = {"SELECT": k < classes, "BITS": bits, "SOFTMAX_SUM": softmax_sum}
    # with the 64 that ptxas takes of its own accord Triton 3.6's spills 8 bytes on sm_100
    return Plan((n,), constants | {"BC": 2048, "BN": 256}, 8, registers=128)

"""Launch plans of total variation and of the reliability ensemble. Pure Python, no Triton."""

from __future__ import annotations

from collections.abc import Mapping

from .launch_plan import Plan, cdiv, power_of_2


def _blocks(height: int, width: int) -> dict[str, int]:
    return {"BH": min(16, power_of_2(height)), "BW": min(256, power_of_2(width))}


def _warps(constants: Mapping[str, int]) -> int:
    return max(1, constants["BH"] * constants["BW"] // 512)  # 16 elements a thread


def strips(n: int, height: int, width: int, logits: bool = False) -> Plan:
    """Plan of the sums: a program a strip of BH rows of a map.

    Args:
        n, height, width: of the maps.
        logits: whether each map has one more program, for its row of logits.
    """
    constants = _blocks(height, width)
    count = cdiv(height, constants["BH"])
    warps = _warps(constants)
    return Plan((count + logits, n), constants | {"STRIPS": count, "BC": 1024}, warps)


def gradient(n: int, height: int, width: int) -> Plan:
    """Plan of the gradient: a program a strip of BH rows of a map."""
    constants = _blocks(height, width)
    return Plan((cdiv(height, constants["BH"]), n), constants, _warps(constants))


def ensemble(strips: int, classes: int) -> Plan:
    """Plan of the ensemble after ``strips``: a program BC classes.

    Args:
        strips: of a map.
        classes: of the logits.
    """
    constants = {"STRIPS": strips, "BS": power_of_2(strips), "BN": 32, "BC": 64}
    return Plan((cdiv(classes, constants["BC"]),), constants, 4)


def small_ensemble(n: int, height: int, width: int, classes: int) -> Plan | None:
    """Plan of everything in one program, or None where that would be long.

    64 maps of 14 x 14 with 100 classes are 75 KB.
    """
    if n > 128 or height * width > 256 or classes > 400:
        return None
    bn = power_of_2(max(16, n))
    return Plan((1,), {"BN": bn, "BP": 4096 // bn}, 8)

"""Launch plans of flat attention. Pure Python, no Triton.

float16 is computed in float32: K times a share, times a gradient, may leave its range. So ``half``
is true for bfloat16 alone.
"""

from __future__ import annotations

from .launch_plan import Plan, cdiv, integer, power_of_2, precision, warp_products

WIDEST_HEAD = 128  # channels of which a tile of rows stays in registers


def _flat(
    architecture: str, half: bool, d: int, count: int
) -> tuple[dict[str, object], dict[str, int]]:
    """Constants, and warps, stages and registers.

    float32 on sm_90: four warps multiply 64 rows (wgmma), so that eight on 64 rows share the
    columns of a product, 16 each of 32, and need twice the barriers of eight on 128 rows.
    """
    bd = power_of_2(max(16, d))
    rows, columns, warps = 64, 32, 8
    if not half and (warp_products(architecture) or architecture == "gfx942"):
        rows, columns = 32, 16
    elif not half and bd > 64:  # a product is three, and operands of all are registers
        rows, columns, warps = 16, 16, 4
    elif not half and architecture == "sm_90" and count > 64:
        rows = 128
    constants = {
        "BM": rows, "BN": columns, "BD": bd, "WIDE": not half,
        "PRECISION": precision(architecture, half),
    }  # fmt: skip
    return constants, {"warps": warps, "stages": 2, "registers": 255}


def forward(architecture: str, half: bool, heads: int, count: int, d: int) -> tuple[Plan, Plan]:
    """Plans of the forward: row attention, then the weighting of the rows; a program BM rows.

    Args:
        architecture: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        half: whether tensors are bfloat16.
        heads: of the batch together.
        count, d: classes K, and channels of a head.
    """
    constants, options = _flat(architecture, half, d, count)
    if half:
        columns = 32 if d > 64 and warp_products(architecture) else 64
        constants, options = constants | {"BN": columns}, options | {"warps": 4}
    elif constants["BM"] == 128:
        constants = constants | {"BN": 64}  # the gradients of float16 spill 16 bytes with them
    grid = cdiv(count, integer(constants, "BM")), heads
    weights = {"BM": constants["BM"], "BD": constants["BD"], "BK": 1024}
    return Plan(grid, constants, **options), Plan(grid, weights, 4)


def head_sums(heads: int) -> Plan:
    """Plan of the backward's first launch: a program a head.

    For half types ptxas would spill 16 bytes to fit more blocks than a launch has.
    """
    return Plan((heads,), {"BK": 1024, "BE": 2048}, 8, registers=64)


def gradients(architecture: str, half: bool, heads: int, count: int, d: int) -> Plan:
    """Plan of the backward's second launch: programs of dq and of dk, dv in turn, BM rows each.

    Arguments are those of ``forward``.
    """
    constants, options = _flat(architecture, half, d, count)
    if architecture == "sm_120" and not half and d <= 64:
        constants["BN"] = 32  # float16 in tiles of 16 spills 8 bytes there
    return Plan((2 * cdiv(count, integer(constants, "BM")), heads), constants, **options)

"""Launch plans of attention with a shared prefix. Pure Python, no Triton.

Complete sequences are packed into tiles of at most TILE_TOKENS tokens. float16 is computed in
float32, as in flat attention: ``half`` is true for bfloat16 alone.
"""

from __future__ import annotations

from .launch_plan import Plan, cdiv, integer, power_of_2, precision, warp_products

TILE_TOKENS = 64  # of complete sequences, that kernels take at once


def widest_head(half: bool) -> int:
    """The most channels of a head whose tiles stay in registers.

    A float32 product is three, or keeps its operands, so it has room for fewer.
    """
    return 128 if half else 64


def _prefix(
    architecture: str, half: bool, prefix: int, d: int, last: bool
) -> tuple[dict[str, object], dict[str, int]]:
    """Constants, and warps and registers. BP: keys of the prefix at a time. Last tokens are few:
    a tile has 16 if sequences have four."""
    rows, columns = (64 if d <= 64 else 16, 32) if half else (64, 16)
    if half and architecture == "sm_120":  # 64 rows spill 56 bytes there, none on sm_80
        rows = min(rows, 32)
    if not half and (warp_products(architecture) or architecture == "gfx942"):
        rows = 16 if warp_products(architecture) else 32
    constants = {
        "BM": min(rows, 16) if last else rows, "BN": columns,
        "BP": min(columns, power_of_2(max(16, prefix))), "BD": power_of_2(max(16, d)),
        "BS": TILE_TOKENS, "LAST": last, "WIDE": not half,
        "PRECISION": precision(architecture, half),
    }  # fmt: skip
    return constants, {"warps": 8, "registers": 255}


def forward(
    architecture: str, half: bool, heads: int, tiles: int, prefix: int, d: int, last: bool
) -> Plan:
    """Plan of the forward: a program BM queries of a tile.

    Args:
        architecture: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        half: whether tensors are bfloat16.
        heads: of the batch together.
        tiles: of packed sequences.
        prefix, d: tokens of the prefix, and channels of a head.
        last: whether the queries are the sequences' last tokens alone.
    """
    constants, options = _prefix(architecture, half, prefix, d, last)
    return Plan((tiles * (TILE_TOKENS // integer(constants, "BM")), heads), constants, **options)


def gradients(
    architecture: str, half: bool, heads: int, tiles: int, prefix: int, d: int, last: bool
) -> Plan:
    """Plan of the backward's first launch: programs of a tile's queries, of its keys, and of its
    part in the gradients of the prefix. Arguments are those of ``forward``."""
    constants, options = _prefix(architecture, half, prefix, d, last)
    parts = 2 * (TILE_TOKENS // integer(constants, "BM")) + cdiv(prefix, integer(constants, "BP"))
    return Plan((tiles * parts, heads), constants, **options)


def prefix_sum(batch: int, size: int) -> Plan:
    """Plan of the backward's second launch, which adds the tiles' parts of the prefix.

    Args:
        batch, size: samples, and elements of one's prefix.
    """
    return Plan((cdiv(2 * size, 128), batch), {"BT": 16, "BE": 128}, 4)

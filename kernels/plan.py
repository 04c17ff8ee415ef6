"""Launch plans: grid, blocks, warps and stages as functions of shapes. Pure Python, no Triton.

Blocks are those that compile without spills for the family; the choice between them follows from
operation and wave counts, none has been timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

# bytes that one block may use
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclass(frozen=True)
class Plan:
    """How a kernel is started; constants are its constexpr arguments."""

    grid: tuple[int, ...]
    constants: Mapping[str, object]
    warps: int
    stages: int = 1
    registers: int | None = None  # a thread may have; None: as many as ptxas thinks best (NVIDIA)


def size(constants: Mapping[str, object], name: str) -> int:
    """A constant that is a number."""
    value = constants[name]
    assert isinstance(value, int), f"{name} is {value!r}"
    return value


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


# --------------------------------------------------------------------------- head-mean attention


class Tile(NamedTuple):
    """A tile of scores: queries x keys. It lies within one block of modalities."""

    rows: int
    columns: int
    warps: int
    stages: int


class Block(NamedTuple):
    """Scores of modality i's queries against modality j's keys, as kernels look it up."""

    first_tile: int
    column_tiles: int
    i: int
    j: int
    first_row: int
    first_column: int
    rows: int
    columns: int
    offset: int  # in a sample's workspace
    pitch: int  # of a row there: 16 elements divide it, so rows start aligned


def blocks(spans: Sequence[int], tile: Tile, self_blocks: bool) -> tuple[Block, ...]:
    starts = [0, *accumulate(spans)]
    found, tiles, offset = [], 0, 0
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans):
            if i == j and not self_blocks:
                continue
            across, pitch = cdiv(columns, tile.columns), cdiv(columns, 16) * 16
            found.append(
                Block(tiles, across, i, j, starts[i], starts[j], rows, columns, offset, pitch)
            )
            tiles += cdiv(rows, tile.rows) * across
            offset += rows * pitch
    return tuple(found)


def _tiles(table: Sequence[Block], tile: Tile) -> int:
    return sum(cdiv(b.rows, tile.rows) * b.column_tiles for b in table)


def workspace(table: Sequence[Block]) -> int:
    """Elements of a sample's workspace."""
    return sum(b.rows * b.pitch for b in table)


def precision(architecture: str, half: bool) -> str:
    """Of tl.dot. Three TF32 products keep float32's digits, which a single one would not."""
    return "tf32x3" if not half and architecture in ("sm_90", "sm_100") else "ieee"


def score_tile(architecture: str, half: bool, batch: int, spans: Sequence[int]) -> Tile:
    if not half:
        return Tile(64, 64, 8, 2) if architecture == "sm_80" else Tile(64, 128, 8, 2)
    if architecture == "gfx942":
        return Tile(128, 128, 8, 2)
    large = Tile(128, 128, 8, 3) if architecture == "sm_80" else Tile(128, 256, 8, 3)
    programs = batch * _tiles(blocks(spans, large, True), large)
    # of fewer than three waves the last, partly filled one costs more than smaller tiles do
    return large if programs >= 3 * _PROCESSORS[architecture] else Tile(64, 128, 4, 3)


def _head_chunk(d: int, half: bool) -> int:
    """Channels that one step of a dot product takes: short of d where that wastes less."""
    longest = 64 if half else 32  # 128 bytes
    if d > longest // 2 and cdiv(d, longest) * longest > cdiv(d, longest // 2) * (longest // 2):
        longest //= 2
    return min(longest, power_of_2(max(d, 16)))


def _scores(architecture: str, half: bool, d: int, tile: Tile, table: tuple) -> dict[str, object]:
    return {
        "BLOCKS": tuple(map(tuple, table)), "D": d, "BD": _head_chunk(d, half),
        "BM": tile.rows, "BN": tile.columns, "PRECISION": precision(architecture, half),
    }  # fmt: skip


def score_tiles(architecture: str, half: bool, batch: int, spans: Sequence[int], d: int) -> Plan:
    tile = score_tile(architecture, half, batch, spans)
    table = blocks(spans, tile, True)
    constants = _scores(architecture, half, d, tile, table)
    return Plan((_tiles(table, tile), batch), constants, tile.warps, tile.stages)


def merge_tiles(tiles: Plan, spans: Sequence[int], pair_query: bool) -> Plan:
    count, batch = tiles.grid
    constants = {name: tiles.constants[name] for name in ("BLOCKS", "BM", "BN")}
    blocks, places = power_of_2(max(2, len(spans) ** 2)), power_of_2(max(2, count))
    constants |= {
        "TILES": count, "M": len(spans), "BB": blocks, "BT": places, "PAIR_QUERY": pair_query,
    }  # fmt: skip
    warps = min(8, max(1, blocks * places // 1024))
    return Plan((batch,), constants, warps)


def weighted_scores(
    architecture: str,
    half: bool,
    batch: int,
    spans: Sequence[int],
    d: int,
    self_blocks: bool,
    pair_query: bool,
) -> tuple[Plan, tuple[Block, ...]]:
    tile = score_tile(architecture, half, batch, spans)
    if half and tile.columns == 256:
        tile = Tile(128, 128, 8, 3)
    table = blocks(spans, tile, self_blocks)
    constants = _scores(architecture, half, d, tile, table)
    constants |= {"M": len(spans), "PAIR_QUERY": pair_query}
    return Plan((_tiles(table, tile), batch), constants, tile.warps, tile.stages), table


def token_gradients(
    architecture: str, half: bool, batch: int, heads: int, d: int, table: tuple[Block, ...]
) -> Plan:
    """Rows of dq and dk: a table of the modalities and one of the blocks that each takes part in.

    ROWS: by modality (first row tile, first token, tokens). SOURCES: by modality, and for each
    one that it meets, the other's (first token, tokens) and the (index, offset, pitch) of the
    block with own queries and of that with own keys.
    """
    if half:  # more than one block in a sum: two accumulators
        bm, bn, bk, warps = 128, 128 if len(table) == 2 else 64, 64, 8
    else:
        bm, bn, bk, warps = 64, 64, 32, 8 if architecture == "sm_80" else 4
    at = {(b.i, b.j): (n, b) for n, b in enumerate(table)}
    rows, sources, tiles = [], [], 0
    for m in sorted({b.i for b in table}):
        own = [
            (b.first_column, b.columns, n, b.offset, b.pitch, at[j, i][0], *at[j, i][1][-2:])
            for (i, j), (n, b) in at.items()
            if i == m
        ]
        first = next(b for b in table if b.i == m)
        rows.append((tiles, first.first_row, first.rows))
        tiles += cdiv(first.rows, bm)
        sources += own
    constants = {
        "ROWS": tuple(rows), "SOURCES": tuple(sources), "BLOCKS": len(table), "D": d,
        "BM": bm, "BN": bn, "BK": bk, "PRECISION": precision(architecture, half),
    }  # fmt: skip
    return Plan((2 * tiles * cdiv(heads * d, bn), batch), constants, warps, 2)


# --------------------------------------------------------------------------- per-head attention

LONGEST_HEAD = 64  # channels of which covariances stay in registers


def unsuitable(spans: Sequence[int], d: int, per_head: bool) -> str | None:
    """Which shapes the attention kernels are not made for; None if for these they are."""
    if per_head:
        return None if d <= LONGEST_HEAD else f"it needs heads of at most {LONGEST_HEAD} channels"
    # one program merges a sample's tiles: 5000 tokens of two modalities
    tiles = sum(cdiv(count, 64) for count in spans) ** 2
    if power_of_2(tiles) * power_of_2(len(spans) ** 2) <= 2**15:
        return None
    return f"it needs a table of at most 2^15 tiles and blocks, found spans={list(spans)}"


def head_moments(
    architecture: str, half: bool, batch: int, heads: int, spans: Sequence[int], d: int,
    pair_query: bool,
) -> Plan:  # fmt: skip
    tokens = 16 if half and architecture == "sm_80" else 64 if half else 32
    constants = _head(architecture, half, spans, d, pair_query)
    constants |= {"BT": tokens, "BB": power_of_2(max(2, len(spans) ** 2))}
    return Plan((heads, batch), constants, 8)


def head_gradients(
    architecture: str, half: bool, batch: int, heads: int, spans: Sequence[int], d: int,
    self_blocks: bool, pair_query: bool,
) -> Plan:  # fmt: skip
    constants = _head(architecture, half, spans, d, pair_query)
    tokens = 64 if architecture == "gfx942" else 128 if half else 32
    constants |= {"BT": tokens, "SELF": self_blocks}
    return Plan((2 * heads, batch), constants, 8 if half or architecture != "sm_80" else 16)


def _head(
    architecture: str, half: bool, spans: Sequence[int], d: int, pair_query: bool
) -> dict[str, object]:
    return {
        "SPANS": tuple(spans), "D": d, "BD": power_of_2(max(16, d)), "HALF": half,
        "PRECISION": precision(architecture, half), "PAIR_QUERY": pair_query,
    }  # fmt: skip


# --------------------------------------------------------------------------- flat attention

WIDEST_HEAD = 128  # channels of which a tile of rows stays in registers


def _flat(architecture: str, half: bool, d: int) -> tuple[dict[str, object], dict[str, int]]:
    """Constants, and warps, stages and registers. float16 is computed in float32: K times a share,
    times a gradient, may leave its range."""
    bd = power_of_2(max(16, d))
    rows, columns, warps = 64, 32, 8
    if not half and architecture in ("sm_80", "gfx942"):
        rows, columns = 32, 16
    elif not half and bd > 64:  # a product is three, and operands of all are registers
        rows, columns, warps = 16, 16, 4
    constants = {
        "BM": rows, "BN": columns, "BD": bd, "WIDE": not half,
        "PRECISION": precision(architecture, half),
    }  # fmt: skip
    return constants, {"warps": warps, "stages": 2, "registers": 255}


def flat_attention(
    architecture: str, half: bool, heads: int, count: int, d: int
) -> tuple[Plan, Plan]:
    """The two launches of the forward; heads of the whole batch."""
    constants, options = _flat(architecture, half, d)
    if half:
        constants, options = constants | {"BN": 64}, options | {"warps": 4}
    grid = cdiv(count, size(constants, "BM")), heads
    weights = {"BM": constants["BM"], "BD": constants["BD"], "BK": 1024}
    return Plan(grid, constants, **options), Plan(grid, weights, 4)


def flat_sums(heads: int) -> Plan:
    """For half types ptxas would spill 16 bytes to fit more blocks than a launch has."""
    return Plan((heads,), {"BK": 1024, "BE": 2048}, 8, registers=64)


def flat_gradients(architecture: str, half: bool, heads: int, count: int, d: int) -> Plan:
    constants, options = _flat(architecture, half, d)
    return Plan((2 * cdiv(count, size(constants, "BM")), heads), constants, **options)


# --------------------------------------------------------------------------- shared prefix

TILE_TOKENS = 64  # of packed sequences, whole ones, that kernels take at once


def widest_prefix_head(half: bool) -> int:
    """Channels of which tiles stay in registers: a float32 product is three, or keeps operands."""
    return 128 if half else 64


def _prefix(
    architecture: str, half: bool, prefix: int, d: int, last: bool
) -> tuple[dict[str, object], dict[str, int]]:
    """Constants, and warps and registers; BP: keys of the prefix at a time. Last tokens are few:
    a tile has 16 if sequences have four. float16 is computed in float32, as in flat attention."""
    rows, columns = (64 if d <= 64 else 16, 32) if half else (64, 16)
    if not half and architecture in ("sm_80", "gfx942"):
        rows = 16 if architecture == "sm_80" else 32
    constants = {
        "BM": min(rows, 16) if last else rows, "BN": columns,
        "BP": min(columns, power_of_2(max(16, prefix))), "BD": power_of_2(max(16, d)),
        "BS": TILE_TOKENS, "LAST": last, "WIDE": not half,
        "PRECISION": precision(architecture, half),
    }  # fmt: skip
    return constants, {"warps": 8, "registers": 255}


def prefix_attention(
    architecture: str, half: bool, heads: int, tiles: int, prefix: int, d: int, last: bool
) -> Plan:
    """Heads of the whole batch; last: queries are the sequences' last tokens alone."""
    constants, options = _prefix(architecture, half, prefix, d, last)
    return Plan((tiles * (TILE_TOKENS // size(constants, "BM")), heads), constants, **options)


def prefix_gradients(
    architecture: str, half: bool, heads: int, tiles: int, prefix: int, d: int, last: bool
) -> Plan:
    constants, options = _prefix(architecture, half, prefix, d, last)
    parts = 2 * (TILE_TOKENS // size(constants, "BM")) + cdiv(prefix, size(constants, "BP"))
    return Plan((tiles * parts, heads), constants, **options)


def prefix_sum(batch: int, size: int) -> Plan:
    return Plan((cdiv(2 * size, 128), batch), {"BT": 16, "BE": 128}, 4)


# --------------------------------------------------------------------------- adaptation head

ROW_CLASSES = 4096  # a row of at most so many logits stays in registers
HEAD_PARTS = 256  # at most so many partial sums of predictions: the second launch reads them all


def head_rows(n: int, classes: int, k: int, bits: int, samples: int) -> Plan:
    """A warp a sample up to 512 classes: its sums need no barrier.

    For more ptxas would spill 16 bytes to fit more blocks than a launch has.
    """
    bc = power_of_2(max(32, classes))
    constants = {"SELECT": k < classes, "BITS": bits, "PACKED": classes < 1024, "BC": bc}
    if bc <= 512:
        return Plan((cdiv(n, samples),), constants, 1)
    return Plan((cdiv(n, samples),), constants, 8 if bc <= 1024 else 16, registers=128)


def head_batch(n: int, classes: int, softmax_sum: bool) -> Plan:
    bc = power_of_2(max(32, classes))
    rows = 4096 // bc  # 16 elements a thread
    constants = {"SOFTMAX_SUM": softmax_sum, "BR": rows, "BC": bc, "BN": 256}
    return Plan((cdiv(n, rows),), constants, 8)


def large_samples(n: int, classes: int, k: int, bits: int) -> Plan:
    return Plan((n,), {"SELECT": k < classes, "BITS": bits, "BC": 4096}, 16)


def large_columns(classes: int) -> Plan:
    return Plan((cdiv(classes, 256),), {"BR": 16, "BC": 256}, 8)


def large_gradient(n: int, classes: int, k: int, bits: int, softmax_sum: bool) -> Plan:
    select = {"SELECT": k < classes, "BITS": bits}
    return Plan((n,), select | {"SOFTMAX_SUM": softmax_sum, "BC": 2048, "BN": 256}, 8)


# --------------------------------------------------------------------------- total variation


def _map_blocks(height: int, width: int) -> dict[str, int]:
    return {"BH": min(16, power_of_2(height)), "BW": min(256, power_of_2(width))}


def _map_warps(constants: Mapping[str, int]) -> int:
    return max(1, constants["BH"] * constants["BW"] // 512)  # 16 elements a thread


def map_strips(n: int, height: int, width: int, rows: bool = False) -> Plan:
    """A program a strip of a map; with rows one more a map, for its row of logits."""
    constants = _map_blocks(height, width)
    strips = cdiv(height, constants["BH"])
    warps = _map_warps(constants)
    return Plan((strips + rows, n), constants | {"STRIPS": strips, "BC": 1024}, warps)


def map_gradient(n: int, height: int, width: int) -> Plan:
    constants = _map_blocks(height, width)
    return Plan((cdiv(height, constants["BH"]), n), constants, _map_warps(constants))


def ensemble(strips: int, classes: int) -> Plan:
    constants = {"STRIPS": strips, "BS": power_of_2(strips), "BN": 32, "BC": 64}
    return Plan((cdiv(classes, constants["BC"]),), constants, 4)


def small_ensemble(n: int, height: int, width: int, classes: int) -> Plan | None:
    """All maps in one program, where that is short: 64 maps of 14 x 14, 100 classes are 75 KB."""
    if n > 128 or height * width > 256 or classes > 400:
        return None
    bn = power_of_2(max(16, n))
    return Plan((1,), {"BN": bn, "BP": 4096 // bn}, 8)

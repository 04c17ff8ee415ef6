"""Launch plans of the head-mean score moments: tiles of scores, their table, and token gradients.

Used by score_moments.py, for attention_bootstrap too. Pure Python, no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .launch_plan import Plan, cdiv, integer, power_of_2, precision, warp_products

_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
_MOST_PLACES = 2**15  # tiles times blocks, powers of two, that one program of the merge holds


class Tile(NamedTuple):
    """Shape and launch options of a tile of scores, which lies within one block of modalities."""

    rows: int  # queries
    columns: int  # keys
    warps: int
    stages: int


class Block(NamedTuple):
    """Scores of modality i's queries against modality j's keys: a row of the kernels' table.

    score_blocks.py names the places of these fields for the kernels.
    """

    first_tile: int
    column_tiles: int
    i: int
    j: int
    first_row: int  # token
    first_column: int  # token
    rows: int
    columns: int
    offset: int  # element in a sample's workspace
    pitch: int  # elements from one row to the next there: a multiple of 16, so rows start aligned


class TokenRows(NamedTuple):
    """Rows of dq and dk that belong to a modality: a row of the kernels' table."""

    first_tile: int
    first_token: int
    tokens: int


class Source(NamedTuple):
    """A block that a modality's gradient sums over: a row of the kernels' table."""

    first_token: int  # of the other modality
    tokens: int
    block: int  # index in the table of blocks
    offset: int  # as in Block
    pitch: int


def blocks(spans: Sequence[int], tile: Tile, self_blocks: bool) -> tuple[Block, ...]:
    """The table of blocks, row by row.

    Args:
        spans: tokens of each modality.
        tile: how blocks are cut into tiles.
        self_blocks: whether the blocks (i, i) are in the table.
    """
    starts = [0, *accumulate(spans)]
    table: list[Block] = []
    tiles, offset = 0, 0
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans):
            if i == j and not self_blocks:
                continue
            across, pitch = cdiv(columns, tile.columns), cdiv(columns, 16) * 16
            table.append(
                Block(tiles, across, i, j, starts[i], starts[j], rows, columns, offset, pitch)
            )
            tiles += cdiv(rows, tile.rows) * across
            offset += rows * pitch
    return tuple(table)


def workspace(table: Sequence[Block]) -> int:
    """Elements of a sample's workspace, in which weighted scores lie block after block."""
    return sum(b.rows * b.pitch for b in table)


def unsuitable(spans: Sequence[int]) -> str | None:
    """What in the spans the kernels are not made for; None if nothing.

    One program merges a sample's tiles: those of 5000 tokens of two modalities.
    """
    tiles = sum(cdiv(count, 64) for count in spans) ** 2
    if power_of_2(tiles) * power_of_2(len(spans) ** 2) <= _MOST_PLACES:
        return None
    return f"it needs a table of at most 2^15 tiles and blocks, found spans={list(spans)}"


def _tiles(table: Sequence[Block], tile: Tile) -> int:
    return sum(cdiv(b.rows, tile.rows) * b.column_tiles for b in table)


def score_tile(architecture: str, half: bool, batch: int, spans: Sequence[int]) -> Tile:
    """The tile for so many samples: large ones where they fill the GPU three times over."""
    if not half:
        return Tile(64, 64, 8, 2) if warp_products(architecture) else Tile(64, 128, 8, 2)
    if architecture == "gfx942":
        return Tile(128, 128, 8, 2)
    large = Tile(128, 128, 8, 3) if warp_products(architecture) else Tile(128, 256, 8, 3)
    programs = batch * _tiles(blocks(spans, large, True), large)
    # of fewer than three waves the last, partly filled one costs more than smaller tiles do
    return large if programs >= 3 * _PROCESSORS[architecture] else Tile(64, 128, 4, 3)


def _head_chunk(d: int, half: bool) -> int:
    """Channels that one step of a dot product takes: short of d where that wastes less."""
    longest = 64 if half else 32  # 128 bytes
    if d > longest // 2 and cdiv(d, longest) * longest > cdiv(d, longest // 2) * (longest // 2):
        longest //= 2
    return min(longest, power_of_2(max(d, 16)))


def _scores(
    architecture: str, half: bool, d: int, tile: Tile, table: Sequence[Block]
) -> dict[str, object]:
    return {
        "BLOCKS": _plain(table), "D": d, "BD": _head_chunk(d, half),
        "BM": tile.rows, "BN": tile.columns, "PRECISION": precision(architecture, half),
    }  # fmt: skip


def _registers(architecture: str, half: bool) -> int | None:
    """Of its own accord Triton 3.6's ptxas takes 80 for float32 tiles on sm_120, and spills 16
    bytes."""
    return 255 if architecture == "sm_120" and not half else None


def score_tiles(architecture: str, half: bool, batch: int, spans: Sequence[int], d: int) -> Plan:
    """Plan of the forward's first launch: a program a tile, grid (tiles, samples), or as many
    programs as there are processors, grid (processors,), that take one tile after the other.

    Args:
        architecture: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        half: whether q and k are of a half type.
        batch, spans, d: samples, tokens of each modality, channels of a head.
    """
    tile = score_tile(architecture, half, batch, spans)
    table = blocks(spans, tile, True)
    count = _tiles(table, tile)
    # a tile of 128 x 256 fills a processor of sm_90, where nothing else could run during its end
    persistent = half and architecture == "sm_90" and tile.columns == 256
    constants = _scores(architecture, half, d, tile, table)
    constants |= {"TILES": count, "PERSISTENT": persistent}
    grid: tuple[int, ...] = (count, batch)
    if persistent:
        grid = (min(count * batch, _PROCESSORS[architecture]),)
    return Plan(grid, constants, tile.warps, tile.stages, _registers(architecture, half))


def merge_tiles(tiles: Plan, batch: int, spans: Sequence[int], pair_query: bool) -> Plan:
    """Plan of the forward's second launch: a program a sample.

    Args:
        tiles: the plan of ``score_tiles``.
        batch, spans: samples, and tokens of each modality.
        pair_query: whether block (i, j) is compared with (i, i), not with (j, j).
    """
    count = integer(tiles.constants, "TILES")
    constants = {name: tiles.constants[name] for name in ("BLOCKS", "BM", "BN")}
    blocks, places = power_of_2(max(2, len(spans) ** 2)), power_of_2(max(2, count))
    constants |= {
        "TILES": count, "M": len(spans), "BB": blocks, "BT": places, "PAIR_QUERY": pair_query,
    }  # fmt: skip
    warps = min(8, max(1, blocks * places // 1024))
    return Plan((batch,), constants, warps)


def weighted_scores(
    architecture: str, half: bool, batch: int, spans: Sequence[int], d: int, self_blocks: bool,
    pair_query: bool,
) -> tuple[Plan, tuple[Block, ...]]:  # fmt: skip
    """Plan of the backward's first launch, a program a tile, and its table of blocks.

    Args:
        self_blocks: whether the blocks (i, i) have a gradient.
        pair_query: as in ``merge_tiles``; the rest as in ``score_tiles``.
    """
    tile = score_tile(architecture, half, batch, spans)
    if half and tile.columns == 256:
        tile = Tile(128, 128, 8, 3)
    table = blocks(spans, tile, self_blocks)
    constants = _scores(architecture, half, d, tile, table)
    constants |= {"M": len(spans), "PAIR_QUERY": pair_query}
    registers = _registers(architecture, half)
    # the small tile: of its own accord ptxas takes 168, and Triton 3.6's spills 8 bytes with them
    registers = 255 if warp_products(architecture) and tile.warps == 4 else registers
    plan = Plan((_tiles(table, tile), batch), constants, tile.warps, tile.stages, registers)
    return plan, table


def _sources(table: Sequence[Block], keys: bool) -> list[Source]:
    """The blocks whose queries (or keys) are a modality's tokens: the first block of every
    modality, then the second, and so on."""
    sources: dict[int, list[Source]] = {}
    for index, b in sorted(enumerate(table), key=lambda x: (x[1].j, x[1].i) if keys else x[0]):
        mine = b.j if keys else b.i
        other = (b.first_row, b.rows) if keys else (b.first_column, b.columns)
        sources.setdefault(mine, []).append(Source(*other, index, b.offset, b.pitch))
    terms = zip(*(sources[m] for m in sorted(sources)), strict=True)
    return [source for term in terms for source in term]


def token_gradients(
    architecture: str, half: bool, batch: int, heads: int, d: int, table: tuple[Block, ...]
) -> Plan:
    """Plan of the backward's second launch: a program BM tokens of dq or of dk times BN channels.

    Its constants hold TOKEN_ROWS, a ``TokenRows`` for each modality, and QUERY_SOURCES and
    KEY_SOURCES, a ``Source`` for each term of dq and of dk and, within a term, each modality.

    Args:
        heads, d: heads, and channels of each.
        table: the blocks of ``weighted_scores``; the rest as in ``score_tiles``.
    """
    if half:  # more than one block in a sum: two accumulators
        bm, bn, bk, warps = 128, 128 if len(table) == 2 else 64, 64, 8
    else:
        bm, bn, bk, warps = 64, 64, 32, 8 if warp_products(architecture) else 4
    spans = {b.i: (b.first_row, b.rows) for b in table}
    rows, tiles = [], 0
    for m in sorted(spans):
        rows.append(TokenRows(tiles, *spans[m]))
        tiles += cdiv(rows[-1].tokens, bm)
    constants = {
        "TOKEN_ROWS": _plain(rows),
        "QUERY_SOURCES": _plain(_sources(table, keys=False)),
        "KEY_SOURCES": _plain(_sources(table, keys=True)),
        "BLOCKS": len(table), "D": d,
        "BM": bm, "BN": bn, "BK": bk, "PRECISION": precision(architecture, half),
    }  # fmt: skip
    # sums are 4 or 8 steps long: with three stages half of one is loaded before it begins, and
    # two programs still fit into a processor of sm_90, whose ends overlap with each other's work
    stages = 3 if half and architecture == "sm_90" else 2
    return Plan((2 * tiles * cdiv(heads * d, bn), batch), constants, warps, stages)


def _plain(table: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """A table of plain tuples, as Triton takes constants."""
    return tuple(map(tuple, table))

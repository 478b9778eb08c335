# SPDX-License-Identifier: Apache-2.0
"""Which four-bit kernel for which shape, with which tile, and how its work is cut among programs.

The choices of `batchery.kernels.w4a16`: simple models of time, in turns of the kernels' loops,
whose constants were fitted to sweeps on an H100 and an H200 (`benchmarks/marlin_tiles.py`,
`marlin_wide.py`). A plan is made once for each shape.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from batchery.kernels.multi_tensor import triton
from batchery.kernels.w4a16_layout import CHUNK
from batchery.kernels.w4a16_tiles import Tile
from batchery.kernels.w4a16_wide import Share, Wide

__all__ = ["best_split", "is_wide", "plan_tiles", "plan_wide", "stripes"]

INVARIANT_BATCH = 64
MOST_BATCH = 1024  # rows above which a dense product of dequantised weights beats the tiles
MOST_TILED = 64  # rows up to which tiles are faster where W is not tall
NARROW = 32  # rows up to which tiles are faster whatever W


class Price(NamedTuple):
    """What a tile costs.

    Attributes:
        tile: how a program works.
        held: programs of it that a processor runs side by side.
        turn: time of a turn of its loop, against other tiles for as many rows of x.
        lost: in turns, what a program loses at its ends.
        added: in turns, what adding up costs for each part of the columns.
    """

    tile: Tile
    held: int
    turn: float = 1.0
    lost: float = 0.0
    added: float = 0.25


# For batches of at most so many rows. Up to 64 rows and with 19 layers, on an H200, what is chosen
# took 1 % longer on average than the fastest of all that was tried, and 7 % at most in float16; in
# bfloat16 10 % at most, but at 64 rows 4 % on average and 23 % at most. Above, these stand in for
# the wide kernels where those cannot run.
_SCALED = Tile(128, 128, step=32, warps=8, stages=3, scale_weights=True)
PRICES: tuple[tuple[int, tuple[Price, ...]], ...] = (
    (8, (Price(Tile(8, 128, stages=3), 2, lost=1),)),
    (
        16,
        (
            Price(Tile(16, 64, stages=3), 4),
            Price(Tile(16, 128, stages=3), 2, turn=0.8, lost=1, added=0.35),
        ),
    ),
    (
        32,
        (
            Price(Tile(32, 64, stages=3), 3),
            Price(Tile(32, 128, stages=3), 2, added=0.5),  # see `_well_ordered`
        ),
    ),
    (64, (Price(Tile(64, 64, stages=3), 2, lost=0.5, added=1),)),
    (128, (Price(_SCALED, 2, lost=2, added=2),)),
    (MOST_BATCH, (Price(_SCALED, 1, lost=6, added=2),)),
)
# Where W is tall its tiles are many, and columns are not split. The first of two is for a W all of
# whose tiles are at work at once.
TALL: tuple[tuple[int, tuple[Tile, Tile]], ...] = (
    (8, (Tile(16, 64, stages=3), Tile(8, 64, stages=3))),
    (16, (Tile(16, 64, stages=3), Tile(16, 64))),
    (32, (Tile(32, 128, stages=3),) * 2),
    (64, (Tile(64, 128, warps=8, stages=2, scale_weights=True),) * 2),
)
AT_ONCE = 5  # tiles of 64 rows and up to 16 rows of x that a processor holds
INVARIANT = (2, 3, 0)  # programs held, turns lost, turns of adding up
MOST_SPLIT = 16

MOST_PARTS = 8  # that a tile is cut in evenly
# In turns of the loop: what a tile loses at its ends, what adding up costs for each part of a tile,
# and what stripes cost whose ends lie anywhere: their programs do not read the same rows in step.
LOST, ADDED, UNEVEN, SLOWER = 1.5, 1, 6, 1.06
IN_CACHE = 2**17  # rows of x times blocks up to which programs out of step find x in the cache
# Microseconds of a turn. These and the costs above fit a sweep on an H100 of eight layers and 32 to
# 2048 rows: what they choose took 1 % longer than the fastest of all that was tried.
FORMS = {
    Wide(256, 128, 1, 2): 2.79,
    Wide(128, 128, 2, 3): 1.51,
    Wide(64, 256, 3, 3): 2.09,
    Wide(64, 128, 4, 5): 1.22,
}


@lru_cache(maxsize=4096)
def is_wide(batch: int, rows: int, processors: int) -> bool:
    """Say whether the wide kernels are faster than the tiles, where they can run.

    Args:
        batch: rows of x.
        rows: rows of W, with padding.
        processors: of the device.
    """
    return batch > MOST_TILED or (batch > NARROW and rows // CHUNK > processors)


@lru_cache(maxsize=4096)
def plan_tiles(
    batch: int,
    rows: int,
    blocks: int,
    lanes: int,
    processors: int,
    invariant: bool,
    dtype: torch.dtype,
) -> tuple[Tile, int]:
    """Choose the tile, and the parts that columns are split in.

    Parts are taken so that the last round of programs is full, where that is worth the turns that
    each program loses at its ends, and those that adding up the parts takes.

    Args:
        batch: rows of x.
        rows: rows of W, with padding.
        blocks: blocks of columns.
        lanes: words of a row in a block.
        processors: of the device.
        invariant: let nothing depend on `batch` but the tile's width.
        dtype: of x.
    """

    def split_of(tile: Tile, batch: int, held: int, lost: float, added: float) -> tuple[float, int]:
        tiles = rows // tile.rows * -(-batch // tile.batch)
        steps = blocks * lanes // min(tile.step, lanes)
        return best_split(tiles, steps, processors * held, lost, added)

    if invariant:
        width = max(16, min(INVARIANT_BATCH, triton.next_power_of_2(batch)))
        tile = Tile(width, 64, stages=3)
        return tile, split_of(tile, 1, *INVARIANT)[1]
    chunks = rows // CHUNK
    if batch <= MOST_TILED and 2 * chunks > 3 * processors:
        at_once, in_rounds = next(tiles for most, tiles in TALL if batch <= most)
        tile = at_once if chunks <= AT_ONCE * processors else in_rounds
        return _well_ordered(tile, 1, dtype), 1
    found = {}
    for tile, held, turn, lost, added in next(
        (prices for most, prices in PRICES if batch <= most), PRICES[-1][1]
    ):
        turns, split = split_of(tile, batch, held, lost, added)
        found[turn * turns] = tile, split
    tile, split = found[min(found)]
    return _well_ordered(tile, split, dtype), split


def _well_ordered(tile: Tile, split: int, dtype: torch.dtype) -> Tile:
    """Give a tile of 128 rows by 32 the warps with which the assembler orders its loop well.

    It puts the unpacking of weights before or after the wait for the matrix instructions under way,
    by rules of its own; after it, the loop takes 1.2 to 1.3 times as long.
    """
    if (tile.batch, tile.rows) != (32, 128):
        return tile
    return tile._replace(warps=4 if (split > 1) == (dtype == torch.bfloat16) else 8)


def best_split(tiles: int, steps: int, places: int, lost: float, added: float) -> tuple[float, int]:
    """Return the turns that a product takes, and the parts to split the columns in for that.

    Args:
        tiles: of the output.
        steps: turns that one tile takes.
        places: programs that run side by side.
        lost: turns that a program loses at its ends.
        added: turns that adding up takes for each part.
    """

    def turns(split: int) -> float:
        rounds = -(-tiles * split // places)
        return rounds * (-(-steps // split) + lost) + (added * split if split > 1 else 0)

    return min((turns(split), split) for split in range(1, min(steps, MOST_SPLIT) + 1))


@lru_cache(maxsize=4096)
def plan_wide(batch: int, rows: int, blocks: int, processors: int) -> tuple[Wide, Share]:
    """Choose the form of a program, and what each program does.

    Args:
        batch: rows of x.
        rows: rows of W, with padding.
        blocks: blocks of columns, a turn of the loop each.
        processors: of the device.
    """
    found = {}
    for form, microseconds in FORMS.items():
        tiles = -(-rows // form.rows) * -(-batch // form.batch)
        share, turns = stripes(tiles, blocks, processors, batch * blocks <= IN_CACHE)
        found[form] = (microseconds * turns, share)
    form = min(found, key=lambda form: found[form][0])
    return form, found[form][1]


def stripes(tiles: int, blocks: int, processors: int, uneven: bool = True) -> tuple[Share, float]:
    """Share output tiles among programs.

    Args:
        tiles: of the output.
        blocks: turns that one tile takes.
        processors: of the device; they run a program each.
        uneven: allow stripes whose ends lie anywhere.

    Returns:
        How many whole tiles each program takes, how many tiles are left to be cut, and among how
        many programs (as many: they are not cut); and the turns that this takes, with its costs.
    """
    ways = {(0, tiles, tiles): -(-tiles // processors) * (blocks + LOST)}
    most = tiles // processors
    for whole in range(max(0, most - 1), most + 1):
        rest = tiles - whole * processors
        before = whole * (blocks + LOST)
        for parts in range(2, min(MOST_PARTS, blocks) + 1):
            if rest and parts * rest <= processors:
                cut = -(-blocks // parts) + LOST + ADDED * parts
                ways[whole, rest, parts * rest] = before + cut
        if uneven and rest % processors and processors % rest and processors <= rest * blocks:
            cut = SLOWER * rest * blocks / processors + LOST + UNEVEN
            ways[whole, rest, processors] = before + cut
    return min(ways.items(), key=lambda way: way[1])

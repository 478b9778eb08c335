# SPDX-License-Identifier: Apache-2.0
"""Which four-bit kernel for which shape, with which tile, and how its work is cut among programs.

The choices of `batchery.kernels.w4a16`: simple models of time, in turns of the kernels' loops,
whose constants were fitted to sweeps on an H100 (`benchmarks/marlin_tiles.py`, `marlin_wide.py`).
A plan is made once for each shape.
"""

import math
from functools import lru_cache

from batchery.kernels.multi_tensor import triton
from batchery.kernels.w4a16_layout import CHUNK, WIDEST
from batchery.kernels.w4a16_tiles import Tile
from batchery.kernels.w4a16_wide import Share, Wide

__all__ = ["best_split", "is_wide", "plan_tiles", "plan_wide", "stripes"]

INVARIANT_BATCH = 64
MOST_BATCH = 1024  # rows above which a dense product of dequantised weights beats the tiles
# By rows of x, the words of W from which the wide kernels are faster: they start more slowly.
LEAST_WIDE = ((16, math.inf), (32, 2**25), (64, 2**23))

Plan = tuple[int, Tile, int, float, float]

# For batches of at most so many rows: the tile; the programs of it that a processor runs side by
# side; and in turns of the loop, what a program loses at its ends, and what adding up costs for
# each part of the columns. The fastest of two sweeps on an H100.
_SCALED = Tile(128, 128, step=32, warps=8, stages=3, scale_weights=True)
TILES: tuple[Plan, ...] = (
    (8, Tile(8, 128, stages=3), 2, 1, 0.75),
    (16, Tile(16, 64, stages=3), 4, 2, 0.5),
    (32, Tile(32, 128, warps=8, stages=3), 2, 1, 1),
    (64, Tile(64, 128, step=32, warps=8, stages=3, scale_weights=True), 2, 2, 1.5),
    (128, _SCALED, 2, 2, 2),
    (MOST_BATCH, _SCALED, 1, 6, 2),
)
# Where tiles of 128 rows of W would occupy less than three eighths of the processors.
NARROW: tuple[Plan, ...] = (
    *TILES[:2],
    (32, Tile(32, 64, stages=3), 3, 8, 0.5),
    (64, Tile(64, 64, stages=3, scale_weights=True), 2, 6, 0),
    *TILES[4:],
)
# Where tiles of 64 rows of W are more than four for each processor; where they are three or four,
# and all at work at once, the tile of 16 rows of x does for fewer.
TALL: tuple[Plan, ...] = ((8, Tile(8, 64, stages=3), 4, 1, 0.75), *TILES[1:])
INVARIANT = (2, 3, 0)
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
    Wide(32, 256, 4, 4): 1.61,
}


@lru_cache(maxsize=4096)
def is_wide(batch: int, words: int) -> bool:
    """Say whether the wide kernels are faster than the tiles, where they can run.

    Args:
        batch: rows of x.
        words: of the weight.
    """
    return words >= next((least for most, least in LEAST_WIDE if batch <= most), 0)


@lru_cache(maxsize=4096)
def plan_tiles(
    batch: int, rows: int, blocks: int, lanes: int, processors: int, invariant: bool
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
    """
    chunks = rows // CHUNK
    if rows // WIDEST * 8 <= processors * 3:
        plans = NARROW
    elif chunks < processors * 3:
        plans = TILES
    else:
        plans = TALL if chunks > processors * 4 else TILES[1:]
    _, tile, held, lost, added = next((entry for entry in plans if batch <= entry[0]), plans[-1])
    if invariant:
        width = max(16, min(INVARIANT_BATCH, triton.next_power_of_2(batch)))
        tile, (held, lost, added), batch = Tile(width, 64, stages=3), INVARIANT, 1
    tiles = rows // tile.rows * -(-batch // tile.batch)
    steps = blocks * lanes // min(tile.step, lanes)
    return tile, best_split(tiles, steps, processors * held, lost, added)


def best_split(tiles: int, steps: int, places: int, lost: float, added: float) -> int:
    """Return the parts to split the columns in.

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

    return min(range(1, min(steps, MOST_SPLIT) + 1), key=turns)


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

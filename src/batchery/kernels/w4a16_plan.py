# SPDX-License-Identifier: Apache-2.0
"""Which four-bit kernel for which shape, with which form, and how its work is cut among programs.

The choices of `batchery.kernels.w4a16`: simple models of time, in turns of the kernels' loops,
whose constants were fitted to sweeps on an H100 and an H200, such as those of
`benchmarks/marlin_tiles.py` and `marlin_gluon.py`. A plan is made once for each shape.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar

from batchery.kernels.multi_tensor import triton
from batchery.kernels.w4a16_layout import CHUNK
from batchery.kernels.w4a16_narrow import Narrow
from batchery.kernels.w4a16_tiles import Tile
from batchery.kernels.w4a16_wide import Share, Wide

__all__ = [
    "CHAINED",
    "FORMS",
    "INVARIANT_BATCH",
    "MOST_BATCH",
    "MOST_NARROW",
    "NARROW",
    "best_split",
    "kernel_of",
    "plan_narrow",
    "plan_tiles",
    "plan_wide",
    "stripes",
]

INVARIANT_BATCH = 64
MOST_BATCH = 1024  # rows above which a dense product of dequantised weights beats the tiles

Form = TypeVar("Form", Tile, Narrow)


class Price(NamedTuple):
    """What a form of a kernel costs.

    Attributes:
        held: programs that take turns of that time side by side on a processor, as fitted.
        turn: time of a turn of its loop, against other forms for as many rows of x.
        lost: in turns, what a program loses at its ends.
        added: in turns, what adding up costs for each part of the columns.
    """

    held: int
    turn: float = 1.0
    lost: float = 0.0
    added: float = 0.25


# For batches of at most so many rows. With 19 layers on an H200 and up to 8 rows, what is chosen
# took 1 % longer on average than the fastest of all that was tried. See `kernel_of` for what else
# tiles are for.
_SCALED = Tile(128, 128, step=32, warps=8, stages=3, scale_weights=True)
TILES: tuple[tuple[int, dict[Tile, Price]], ...] = (
    (8, {Tile(8, 128, stages=3): Price(2, lost=1)}),
    (
        16,
        {
            Tile(16, 64, stages=3): Price(4),
            Tile(16, 128, stages=3): Price(2, turn=0.8, lost=1, added=0.35),
        },
    ),
    (32, {Tile(32, 64, stages=3): Price(3), Tile(32, 128, stages=3): Price(2, added=0.5)}),
    (64, {Tile(64, 64, stages=3): Price(2, lost=0.5, added=1)}),
    (128, {_SCALED: Price(2, lost=2, added=2)}),
    (MOST_BATCH, {_SCALED: Price(1, lost=6, added=2)}),
)
# Where W has more than 3 chunks for two processors, columns are not split. The first of two is for
# a W all of whose tiles are at work at once.
UNSPLIT: tuple[tuple[int, tuple[Tile, Tile]], ...] = (
    (8, (Tile(16, 64, stages=3), Tile(8, 64, stages=3))),
    (16, (Tile(16, 64, stages=3), Tile(16, 64))),
    (32, (Tile(32, 128, stages=3),) * 2),
    (64, (Tile(64, 128, warps=8, stages=2, scale_weights=True),) * 2),
)
MANY_CHUNKS = 3  # for a processor: above, W is tall
AT_ONCE = 5  # tiles of 64 rows and up to 16 rows of x that a processor holds
INVARIANT = (2, 3, 0)  # programs held, turns lost, turns of adding up
MOST_SPLIT = 16

# The same for the kernel of few rows. With 19 layers, float16 and bfloat16, on an H200, what is
# chosen took 1 to 2 % longer on average than the fastest of all that was tried, 12 % at most.
NARROW: tuple[tuple[int, dict[Narrow, Price]], ...] = (
    (
        16,
        {
            Narrow(16, 64, 3, 128): Price(3, 0.9, lost=2.5, added=0.35),
            Narrow(16, 128, 3, 168): Price(2, 0.7, lost=6, added=2.25),
        },
    ),
    (
        32,
        {
            Narrow(32, 64, 3, 168): Price(2, 0.7, lost=4, added=0.4),
            Narrow(32, 128, 3, 255): Price(2, 1.15, lost=5.5),
        },
    ),
    (
        64,
        {
            Narrow(64, 64, 2, 255): Price(2, 1.25, lost=2.5, added=0.4),
            Narrow(64, 128, 2, 255): Price(2, 1.3, lost=6.5, added=2),
            Narrow(32, 64, 3, 168): Price(3, 1.4, lost=0.5, added=0.55),
        },
    ),
)

# The same where kernels are chained, and the first words of a weight are there when x is: after
# whole decoding steps of an 8B shape on an H200, 1 to 32 sequences. A program's room matters beyond
# its own kernel: as many as find room gather on processors that are free first, and the next
# kernel's begin beside them only where some is left.
CHAINED: tuple[tuple[int, dict[Narrow, Price]], ...] = (
    (
        8,
        {
            Narrow(8, 64, 5, 168): Price(3, 0.9, lost=3, added=0.55),
            Narrow(8, 64, 4, 128): Price(4, lost=3, added=0.55),
            Narrow(8, 64, 7, 168): Price(2, 0.89, lost=3, added=0.55),
            Narrow(8, 128, 4, 168): Price(2, 1.02, lost=2.5, added=0.6),
        },
    ),
    (
        16,
        {
            Narrow(16, 64, 4, 168): Price(3, 0.9, lost=3, added=0.55),
            Narrow(16, 64, 3, 128): Price(4, lost=3, added=0.55),
            Narrow(16, 64, 5, 168): Price(2, 0.89, lost=3, added=0.55),
        },
    ),
    (
        32,
        {
            Narrow(32, 64, 3, 168): Price(3, lost=3, added=0.55),
            Narrow(32, 64, 4, 168): Price(2, 0.99, lost=3, added=0.55),
            Narrow(32, 128, 2, 255): Price(2, 1.7, lost=3, added=0.55),
        },
    ),
    NARROW[-1],
)

MOST_NARROW = NARROW[-1][0]  # rows of x that the kernel of few takes
MANY_WEIGHTS = 2**19  # for a processor: above, W is large
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
def kernel_of(
    batch: int, rows: int, columns: int, group: int, processors: int, chained: bool
) -> Literal["tiles", "narrow", "wide"]:
    """Choose the kernel where all can run: on Hopper, for rows of x at multiples of 16 bytes.

    By rows of x, in brackets where W is tall: tiles to 8 (16), then narrow to 64 (32), then wide.
    Groups below 128 leave narrow no large forms: tiles to 16, and of a large W wide from 33 on.
    Chained, narrow from one row on. Norms within products are narrow's, and do not go by this.

    Args:
        batch: rows of x.
        rows: rows of W, with padding.
        columns: of W.
        group: columns that share a scale.
        processors: of the device.
        chained: begin before the kernel before has ended, which the narrow one can.
    """
    tall = rows // CHUNK > MANY_CHUNKS * processors
    fine = group < 128
    large = rows * columns > MANY_WEIGHTS * processors
    if batch > MOST_NARROW or (batch > 32 and fine and large):
        return "wide"
    if chained:
        return "narrow"
    if batch <= (16 if tall or fine else 8):
        return "tiles"
    return "wide" if batch > 32 and tall else "narrow"


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
    if invariant:
        width = max(16, min(INVARIANT_BATCH, triton.next_power_of_2(batch)))
        tile = Tile(width, 64, stages=3)
        held, lost, added = INVARIANT
        steps = blocks * lanes // min(tile.step, lanes)
        return tile, best_split(rows // tile.rows, steps, processors * held, lost, added)[1]
    chunks = rows // CHUNK
    if batch <= UNSPLIT[-1][0] and 2 * chunks > 3 * processors:
        at_once, in_rounds = next(tiles for most, tiles in UNSPLIT if batch <= most)
        return (at_once if chunks <= AT_ONCE * processors else in_rounds), 1
    prices = next((prices for most, prices in TILES if batch <= most), TILES[-1][1])
    return _cheapest(
        prices, batch, rows, lambda tile: blocks * lanes // min(tile.step, lanes), processors
    )


@lru_cache(maxsize=4096)
def plan_narrow(
    batch: int, rows: int, blocks: int, group: int, processors: int, chained: bool
) -> tuple[Narrow, int]:
    """Choose the form of a program of the kernel of few rows, and the parts of columns.

    Args:
        batch: rows of x, at most 64.
        rows: rows of W, with padding.
        blocks: blocks of columns, a turn of the loop each.
        group: columns that share a scale.
        processors: of the device.
        chained: see `kernel_of`.
    """
    prices = next(prices for most, prices in (CHAINED if chained else NARROW) if batch <= most)
    if group < 128:  # the sums of more groups in a block find no registers beside large tiles
        prices = {
            form: price for form, price in prices.items() if form.batch * form.rows < 64 * 128
        }
    return _cheapest(prices, batch, rows, lambda _: blocks, processors)


def _cheapest(
    prices: dict[Form, Price], batch: int, rows: int, steps: Callable[[Form], int], processors: int
) -> tuple[Form, int]:
    """Return the form that takes the least time, and its split."""
    found = {}
    for form, (held, turn, lost, added) in prices.items():
        tiles = rows // form.rows * -(-batch // form.batch)
        turns, split = best_split(tiles, steps(form), processors * held, lost, added)
        found[turn * turns] = form, split
    return found[min(found)]


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

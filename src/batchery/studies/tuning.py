# SPDX-License-Identifier: Apache-2.0
"""The one rule by which studies tune a learning rate, for every arm alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

_MOST_RATES = 12


def walk(
    run: Callable[[float], Sequence[float]], start: float, *, basin: float = 0.0
) -> dict[str, Any]:
    """Walk by factors of two until every loss has its best rate between two worse ones.

    Args:
        run: learning rate → losses, one for each thing that may have a rate of its own; infinity
            for a run that diverged.
        start: where the walk begins.
        basin: go on, on either side, while a loss is within this of its best.

    Returns:
        By loss: `lr`, the best rate; `cells`, how many factors of two it lies from the start;
        `basin`, the lowest and the highest rate within `basin` of the best. And `tried`: rate →
        losses, by rate.

    Examples:
        >>> walk(lambda lr: [abs(lr - 4)], 1.0)["lr"]
        [4.0]
    """
    found = {0: list(run(start))}
    count = len(found[0])

    def inside(loss: int) -> list[int]:
        bar = min(losses[loss] for losses in found.values()) + basin
        return [place for place, losses in found.items() if losses[loss] <= bar]

    while len(found) < _MOST_RATES:
        close = {place for loss in range(count) for place in inside(loss)}
        sides = [end + way for way, end in ((1, max(found)), (-1, min(found))) if end in close]
        if not sides:
            break
        for place in sides:
            found[place] = list(run(start * 2.0**place))
    cells = [min(found, key=lambda place: found[place][loss]) for loss in range(count)]  # noqa: B023
    ends = [(min(inside(loss)), max(inside(loss))) for loss in range(count)]
    return {
        "lr": [start * 2.0**place for place in cells],
        "cells": cells,
        "basin": [[start * 2.0**low, start * 2.0**high] for low, high in ends],
        "tried": {f"{start * 2.0**place:g}": found[place] for place in sorted(found)},
    }


def basin_width(losses: Mapping[float, float], basin: float) -> tuple[float, bool]:
    """Return the factor over which learning rates keep the loss within `basin` of its best.

    From the best rate outwards, to where the loss first crosses the bar on either side; between
    two rates it is linear in the logarithm of the rate, and a run that diverged adds nothing.

    Args:
        losses: rate → loss, infinity for a run that diverged, as `walk` tried them.
        basin: in the loss's unit.

    Returns:
        The factor, NaN when every run diverged; and whether the loss crosses the bar on both sides:
        if not, the factor is a lower bound.

    Examples:
        >>> basin_width({0.25: 3.0, 1.0: 2.0, 4.0: 3.0}, 0.5)
        (4.0, True)
    """
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    if math.isinf(losses[best]):
        return math.nan, True
    bar = losses[best] + basin

    def end(path: list[float]) -> tuple[float, bool]:
        for inside, outside in pairwise(path):
            if losses[outside] > bar:
                share = (bar - losses[inside]) / (losses[outside] - losses[inside])
                return inside * (outside / inside) ** share, True
        return path[-1], False

    place = rates.index(best)
    (low, low_found), (high, high_found) = end(rates[place::-1]), end(rates[place:])
    return high / low, low_found and high_found

# SPDX-License-Identifier: Apache-2.0
"""The one rule by which studies tune a learning rate, for every arm alike."""

from collections.abc import Callable, Sequence
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

    Example:
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

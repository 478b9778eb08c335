# SPDX-License-Identifier: Apache-2.0
"""Which units a round holds and in which order: the selection, as pure functions.

The inside of `batchery.select.hard_batches`, which states the method; use it there. A unit (int64)
is a batch or an example; its score (float32, without NaN) comes from `hardness`, where `inf` says
that it goes first and `-inf` that it goes last. What happens to n units, `|` for either or:

    falling | highest | draw            k at the top, or k drawn by score (with `chances`)
    explore, force                      some give way: to chance, to those left out for long
    visits | regrouped                  the order of batches, or of examples
    deal, examples_of                   which examples fixed batches hold

Choosing among 10^7 examples takes about a tenth of a second.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class RoundStats(NamedTuple):
    """What a selection looked like.

    Attributes:
        mean_selected: mean score of the selected units that have one; NaN when none has.
        mean_all: the same over all units.
        age_max: rounds since the unit that was left out longest was trained; 0 at first.
    """

    mean_selected: float
    mean_all: float
    age_max: int


def falling(scores: Floats) -> Ints:
    """Return the units in order of falling score; equal scores keep their order.

    Score and position are packed into one integer and sorted together, which is ten times as
    fast as a stable argsort.

    Examples:
        >>> falling(np.array([1.0, 3.0, 3.0, 2.0], dtype=np.float32)).tolist()
        [1, 2, 3, 0]
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 makes -0 equal to 0
    # Bits of negative floats, read as unsigned, grow as the floats fall; those of positive ones
    # do so once inverted.
    falls = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF)).astype(np.uint64)
    packed = falls << np.uint64(32) | np.arange(len(scores), dtype=np.uint64)
    packed.sort()
    return (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def highest(scores: Floats, count: int) -> Ints:
    """Return the `count` units of highest score, ascending; ties go to the lower unit.

    Takes linear time.

    Examples:
        >>> highest(np.array([1.0, 3.0, 3.0, 2.0, 3.0], dtype=np.float32), 2).tolist()
        [1, 2]
    """
    if count == 0:
        return np.empty(0, np.int64)
    bar = np.partition(scores, len(scores) - count)[len(scores) - count]
    taken = scores > bar
    level = np.flatnonzero(scores == bar)
    taken[level[: count - np.count_nonzero(taken)]] = True
    return np.flatnonzero(taken)


def chances(scores: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """Return the probability of each unit in proportion to exp(score / temperature).

    A unit that comes before all others has that of the highest score; one that comes last has 0,
    unless all do.

    Examples:
        >>> chances(np.array([0.0, np.log(3), -np.inf], dtype=np.float32), 1.0).round(3).tolist()
        [0.25, 0.75, 0.0]
    """
    known = scores[np.isfinite(scores)]
    top = float(known.max()) if len(known) else 0.0
    weights = np.exp((np.minimum(scores, top).astype(np.float64) - top) / temperature)
    if not weights.any():
        weights[:] = 1
    found: npt.NDArray[np.float64] = weights / weights.sum()
    return found


def draw(
    scores: Floats, count: int, temperature: float, generator: torch.Generator
) -> tuple[Ints, Floats]:
    """Draw `count` units with replacement, and return 1 / (n p) for each unit there is.

    Examples:
        >>> drawn, weights = draw(np.zeros(4, np.float32), 6, 1.0, torch.Generator())
        >>> len(drawn), weights.tolist()
        (6, [1.0, 1.0, 1.0, 1.0])
    """
    p = chances(scores, temperature)
    drawn = torch.multinomial(torch.from_numpy(p), count, True, generator=generator).numpy()
    weights = 1 / (len(p) * np.maximum(p, np.finfo(np.float32).tiny))
    return drawn, weights.astype(np.float32)


def explore(chosen: Ints, total: int, share: float, generator: torch.Generator) -> Ints:
    """Replace each chosen unit, with probability `share`, by a random one that was not chosen."""
    others = np.flatnonzero(~_mask(chosen, total))
    moves = torch.rand(len(chosen), generator=generator).numpy() < share
    places = np.flatnonzero(moves)[: len(others)]
    drawn = torch.randperm(len(others), generator=generator).numpy()[: len(places)]
    explored = chosen.copy()
    explored[places] = others[drawn]
    return explored


def force(chosen: Ints, scores: Floats, age: Ints, max_age: int) -> Ints:
    """Put in every unit of age `max_age` or more, for the chosen ones of lowest score.

    When there are more of them than places, the oldest go first.
    """
    overdue = np.flatnonzero(age >= max_age)
    if len(overdue) > len(chosen):
        overdue = overdue[highest(age[overdue].astype(np.float32), len(chosen))]
    rest = chosen[~_mask(overdue, len(scores))[chosen]]
    kept = rest[highest(scores[rest], len(chosen) - len(overdue))]
    return np.concatenate([overdue, kept])


def deal(
    total: int, size: int, drop_last: bool, generator: torch.Generator | None
) -> tuple[Tensor, Ints]:
    """Return examples in the order that fixed batches are cut from, and the batch of each example.

    Without a generator they go by index. An example that `drop_last` leaves out is in batch -1.

    Examples:
        >>> deal(5, 2, True, None)
        (tensor([0, 1, 2, 3]), array([ 0,  0,  1,  1, -1]))
    """
    dealt = torch.arange(total) if generator is None else torch.randperm(total, generator=generator)
    partition = dealt[: total - total % size] if drop_last else dealt
    batch_of = np.full(total, -1)
    batch_of[partition.numpy()] = np.arange(len(partition)) // size
    return partition, batch_of


def visits(chosen: Ints, ranking: Ints, full: int, order: str, generator: torch.Generator) -> Ints:
    """Return the chosen batches in the order of their visit, a short one last.

    Args:
        chosen: batches, each as often as it is to be visited.
        ranking: all batches, the hardest first.
        full: how many batches are full; the one numbered `full`, if any, is short.
        order: `"index"`, `"hardest"` (first) or `"shuffle"`.
        generator: for `"shuffle"`.

    Examples:
        >>> chosen, ranking = np.array([3, 2, 0]), np.array([3, 1, 0, 2])
        >>> visits(chosen, ranking, 3, "hardest", torch.Generator()).tolist()
        [0, 2, 3]
    """
    if order == "hardest":
        place = np.empty_like(ranking)
        place[ranking] = np.arange(len(ranking))
        visit = chosen[np.argsort(place[chosen], kind="stable")]
    else:
        visit = np.sort(chosen)
        if order == "shuffle":
            visit = _shuffled(visit, generator)
    short = visit == full
    return np.concatenate([visit[~short], visit[short]])


def examples_of(batches: Ints, partition: Tensor, size: int) -> Tensor:
    """Return the examples of batches cut from a partition (int64), in order; a short one is last.

    Examples:
        >>> examples_of(np.array([1, 0, 2]), torch.arange(10, 15), 2)
        tensor([12, 13, 10, 11, 14])
    """
    full = len(partition) // size
    whole = partition[: full * size].view(full, size)
    examples = whole[torch.from_numpy(batches[batches < full])].flatten()
    return torch.cat([examples, partition[full * size :]]) if full in batches else examples


def regrouped(
    chosen: Ints, scores: Floats, size: int, regroup: str, order: str, generator: torch.Generator
) -> Ints:
    """Return the chosen examples in the order that batches of `size` are cut from.

    Args:
        chosen: examples, each as often as it is to be trained on.
        scores: of all examples.
        size: examples of a batch.
        regroup: `"random"` shuffles, `"sorted"` lets scores fall; equal ones are shuffled.
        order: of sorted batches; `"shuffle"` leaves one that is short at the end.
        generator: for all of these.

    Examples:
        >>> scores = np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32)
        >>> regrouped(np.array([0, 1, 3]), scores, 2, "sorted", "index", torch.Generator()).tolist()
        [1, 3, 0]
    """
    examples = _shuffled(chosen, generator)
    if regroup == "sorted":
        examples = examples[falling(scores[examples])]
        if order == "shuffle":
            whole = examples[: len(examples) // size * size].reshape(-1, size)
            mixed = _shuffled(whole, generator).flatten()
            examples = np.concatenate([mixed, examples[len(mixed) :]])
    return examples


def _shuffled(rows: Ints, generator: torch.Generator) -> Ints:
    shuffled: Ints = rows[torch.randperm(len(rows), generator=generator).numpy()]
    return shuffled


def _mask(units: Ints, total: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(total, bool)
    mask[units] = True
    return mask

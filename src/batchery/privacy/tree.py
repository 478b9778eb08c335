# SPDX-License-Identifier: Apache-2.0
"""The binary tree of a running sum: its variances, its noise in Fenwick form, Honaker's estimate.

The formulas and their sources are in `batchery.privacy.counters`.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from batchery.privacy.accounting import Budget
from batchery.privacy.law import NoiseKind
from batchery.privacy.mechanism import calibrate
from batchery.privacy.running_sum import NoisySum, Place, RunningSum, law_variance
from batchery.privacy.saved_state import fill_, same_step

Estimator = Literal["prefix", "honaker"]


def levels(horizon: int) -> int:
    """Return H = ⌊log2 T⌋ + 1, the most nodes that a row is in."""
    return horizon.bit_length()


def node_variance(level: int, estimator: Estimator = "prefix") -> float:
    """Return the variance of a node of 2^level rows, in variances of one noise."""
    return 1.0 if estimator == "prefix" else 1 / (2 - 0.5**level)


def tree_variance(t: int, estimator: Estimator = "prefix") -> float:
    """Return the variance of release `t`, in variances of one noise.

    Examples:
        >>> tree_variance(7), round(tree_variance(7, "honaker"), 4)
        (3.0, 2.2381)
    """
    return sum(node_variance(j, estimator) for j in range(t.bit_length()) if t >> j & 1)


def tree_worst(t: int, estimator: Estimator = "prefix") -> float:
    """Return the largest variance of a release up to `t`."""
    # The worst is t, or has the bits of t down to one that it lacks, and all ones below it.
    rivals = [(t >> j << j) - 1 for j in range(t.bit_length())]
    return max(tree_variance(s, estimator) for s in (t, *rivals))


def tree_mean(t: int, estimator: Estimator = "prefix") -> float:
    """Return the mean variance of the releases up to `t`."""
    total = 0.0
    for j in range(t.bit_length()):
        whole, rest = divmod(t + 1, 2 << j)
        ones = (whole << j) + max(0, rest - (1 << j))  # numbers up to t that have bit j
        total += ones * node_variance(j, estimator)
    return total / t


@dataclass(frozen=True)
class TreeDesign:
    """A tree and the law of the noise on its nodes.

    Attributes:
        horizon: T.
        kind: of the law.
        scale: of the law.
        estimator: how releases are made of nodes.
    """

    horizon: int
    kind: NoiseKind
    scale: Fraction
    estimator: Estimator = "prefix"

    @property
    def name(self) -> str:
        """What it is: `"tree"` or `"honaker"`."""
        return "tree" if self.estimator == "prefix" else "honaker"

    def largest_scale(self, t: int) -> Fraction:
        """Return the scale, which is one for all."""
        return self.scale

    def variance(self, t: int) -> float:
        """Return the variance of one entry of release `t`."""
        return tree_variance(t, self.estimator) * law_variance(self.kind, self.scale)

    def worst(self, t: int) -> float:
        """Return the largest variance of a release up to `t`."""
        return tree_worst(t, self.estimator) * law_variance(self.kind, self.scale)

    def mean(self, t: int) -> float:
        """Return the mean variance of the releases up to `t`."""
        return tree_mean(t, self.estimator) * law_variance(self.kind, self.scale)

    def fraction(self, t: int) -> float:
        """Return the part of its nodes that the first row has met by step `t`."""
        return levels(t) / levels(self.horizon)

    def begin(self, place: Place) -> RunningSum:
        """Return a running sum of no rows."""
        if self.estimator == "honaker":
            return HonakerSum(self, place)
        return NoisySum(TreeNoise(self, place), place)


def tree_design(
    horizon: int,
    budget: Budget,
    squared_l2: Fraction,
    l1: Fraction,
    estimator: Estimator = "prefix",
) -> TreeDesign:
    """Return a tree within a budget, for rows that one record changes by so much."""
    height = levels(horizon)
    return TreeDesign(horizon, *calibrate(budget, height * squared_l2, height * l1), estimator)


class TreeNoise:
    """Noise of the prefixes: one row for each step, and a stack of the prefixes still needed.

    Args:
        design: the tree.
        place: where the stack lives.
    """

    def __init__(self, design: TreeDesign, place: Place) -> None:
        """Make an empty stack; see the class."""
        self.rows = place.rows(design.kind, design.scale)
        self.stack = place.zeros(levels(design.horizon))
        self.t = 0

    def step(self) -> Tensor:
        """Return the noise of the next release; valid until the next call."""
        noise = self.rows.take(1)[0]
        self.t += 1
        level, parent = lowest(self.t), self.t & (self.t - 1)
        if parent:
            torch.add(noise, self.stack[lowest(parent)], out=self.stack[level])
        else:
            self.stack[level].copy_(noise)
        return self.stack[level]

    def steps(self, n: int) -> Tensor:
        """Return the noise of the next `n` releases, [n, …], one level of the tree at a time."""
        found = self.rows.take(n).to(self.stack.dtype, copy=True)
        first, end = self.t + 1, self.t + n
        for level in reversed(range(end.bit_length())):  # parents first
            low = 1 << level
            at = first + (low - first) % (2 * low)  # the first step with this lowest bit
            if at - low < first:  # its parent, and no other's, is nothing or from before
                if at - low and at <= end:
                    found[at - first] += self.stack[lowest(at - low)]
                at += 2 * low
            heirs = found[at - first :: 2 * low]
            heirs += found[at - low - first :: 2 * low][: len(heirs)]
        for level in range(end.bit_length()):
            prefix = end >> level << level
            if end >> level & 1 and prefix >= first:
                self.stack[level] = found[prefix - first]
        self.t = end
        return found

    def last(self) -> Tensor:
        """Return the noise of the last release again."""
        return self.stack[lowest(self.t)]

    def state(self) -> dict[str, Any]:
        """Return the stack, the position, and where the next row comes from."""
        return {"t": self.t, "stack": self.stack.clone(), "rows": self.rows.state()}

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        self.t = same_step(state, t)
        fill_(self.stack, state, "stack")
        self.rows.load(state["rows"])


class HonakerSum:
    """A running sum whose nodes are averaged with their children by inverse variances.

    Every node's sum gets its noise as exact integers, if rows and noise are; what is then averaged
    in floating point could be published as it is, so that rounding tells nothing.

    Args:
        design: the tree.
        place: where the nodes live.
    """

    def __init__(self, design: TreeDesign, place: Place) -> None:
        """Make an empty tree; see the class."""
        self.rows = place.rows(design.kind, design.scale)
        self.sums = place.zeros(levels(design.horizon))
        dtype = place.dtype if place.dtype.is_floating_point else torch.float64
        self.estimates = place.zeros(levels(design.horizon), dtype=dtype)
        self.t = 0

    @property
    def total(self) -> Tensor:
        """The exact sum."""
        return self.sums[self._open()].sum(0)

    def step(self, row: Tensor) -> Tensor:
        """Add a row and return the release."""
        self.t += 1
        level = lowest(self.t)
        noise = self.rows.take(level + 1)
        node = row
        estimate = (node + noise[0]).to(self.estimates.dtype)
        for j in range(level):
            node = node + self.sums[j]
            own = (node + noise[j + 1]).to(self.estimates.dtype)
            children = 2 * node_variance(j, "honaker")
            weight = children / (1 + children)
            estimate = weight * own + (1 - weight) * (estimate + self.estimates[j])
        self.sums[level] = node
        self.estimates[level] = estimate
        return self.last()

    def steps(self, rows: Tensor) -> Tensor:
        """Add rows and return the releases, as so many steps would."""
        return torch.stack([self.step(row) for row in rows])

    def last(self) -> Tensor:
        """Return the last release again."""
        return self.estimates[self._open()].sum(0)

    def _open(self) -> list[int]:
        return [j for j in range(self.t.bit_length()) if self.t >> j & 1]

    def state(self) -> dict[str, Any]:
        """Return the nodes, the position, and where the next row of noise comes from."""
        return {
            "t": self.t,
            "sums": self.sums.clone(),
            "estimates": self.estimates.clone(),
            "rows": self.rows.state(),
        }

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        self.t = same_step(state, t)
        fill_(self.sums, state, "sums")
        fill_(self.estimates, state, "estimates")
        self.rows.load(state["rows"])


def lowest(t: int) -> int:
    """Return the place of the lowest set bit of `t` > 0."""
    return (t & -t).bit_length() - 1

# SPDX-License-Identifier: Apache-2.0
r"""Lower limits of a privacy loss, from how well an attack tells two neighbouring streams apart.

Use it to find a mechanism that promises more than it keeps: too little noise, noise used twice, a
budget split wrongly, floats that leak. It proves nothing of a mechanism that passes. Scores come
from `ContinualGame.audit`, or from a simulation of its own.

Of n runs with each of two records, a threshold on a score gives false alarms and misses. With upper
limits a and b of their rates (Clopper and Pearson), with confidence,

    μ >= Φ⁻¹(1-a) - Φ⁻¹(b)
    ε >= ln((1-δ-b) / a), ln((1-δ-a) / b)
    ρ >= D_α(Bern(1-b) ‖ Bern(a)) / α, and the other way round, for every α > 1

A threshold is chosen on one half of the runs and judged on the other.

Reference: Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine Learning", NeurIPS
2020, arXiv 2006.07709; Nasr et al., "Tight Auditing of Differentially Private Machine Learning",
2023, arXiv 2302.07956, for μ; Mironov, CCS 2012, for `off_lattice`; Clopper, Pearson, 1934.

Where we differ: ρ is limited directly, since it is what the mechanisms here promise.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from batchery._core.validate import import_extra, number, require
from batchery.privacy.accounting import Budget

Floats = npt.NDArray[np.float64]
_ORDERS = 1 + np.logspace(-3, 3, 121)  # of Rényi divergences
_THRESHOLDS = 512


class Audit:
    """Lower limits of a privacy loss, from how well an attack told two sides apart.

    Each limit holds with the given confidence by itself.

    Args:
        first: scores of independent runs with the first record, [n].
        second: the same with the second record.
        confidence: in (0, 1).

    Raises:
        ValueError: fewer than 4 scores of a side, or one that is not a number.
        ImportError: scipy is not installed.

    Examples:
        >>> normal = np.random.default_rng(0).normal(size=(2, 100_000))
        >>> found = Audit(normal[0], normal[1] + 1)  # σ = 1 on a sensitivity of 1: μ = 1
        >>> 0.95 < found.mu <= 1, found.exceeds(Budget(0.5)), found.exceeds(Budget(0.1))
        (True, False, True)
    """

    def __init__(self, first: Any, second: Any, *, confidence: float = 0.95) -> None:
        """Keep the scores, in two halves; see the class."""
        number("Audit", "confidence", confidence, above=0, below=1)
        self.confidence = confidence
        sides = [np.asarray(side, np.float64).ravel() for side in (first, second)]
        for name, side in zip(("first", "second"), sides, strict=True):
            require(side.size >= 4, "Audit", name, "must hold at least 4 scores", side.size)
            require(not np.isnan(side).any(), "Audit", name, "must hold numbers", "nan")
        self._halves = [(np.sort(sides[0][k::2]), np.sort(sides[1][k::2])) for k in (0, 1)]

    @property
    def mu(self) -> float:
        """At least this μ, √(2ρ) of a Gaussian mechanism; sharp for one.

        Exact integer noise of small σ may exceed it by a share of about 1 / (24σ²), being no
        Gaussian noise; ρ it keeps.
        """
        special = import_extra("scipy.special", "laws", "Audit")
        return self._best(lambda a, b: -special.ndtri(a) - special.ndtri(b))

    @property
    def rho(self) -> float:
        """At least this ρ, whatever the mechanism; for Gaussian noise three fifths of it."""
        return self._best(_renyi)

    def epsilon(self, delta: float = 0.0) -> float:
        """Return what ε at δ is at least, whatever the mechanism."""
        number("Audit", "delta", delta, at_least=0, below=1)

        def measure(a: Floats, b: Floats) -> Floats:
            one, two = np.maximum(1 - delta - b, 1e-300), np.maximum(1 - delta - a, 1e-300)
            found: Floats = np.maximum(np.log(one / a), np.log(two / b))
            return found

        return self._best(measure)

    def exceeds(self, budget: Budget) -> bool:
        """Whether a mechanism with this budget has been shown to lose more."""
        if budget.pure_epsilon is not None:
            return self.epsilon() > budget.pure_epsilon
        if budget.target is not None:
            return self.epsilon(budget.target[1]) > budget.target[0]
        return self.mu > math.sqrt(2 * budget.rho) if budget.gaussian else self.rho > budget.rho

    @cached_property
    def _thresholds(self) -> Floats:
        found = np.unique(np.concatenate(self._halves[0]))
        if found.size > _THRESHOLDS:
            found = found[np.linspace(0, found.size - 1, _THRESHOLDS).round().astype(int)]
        return found

    def _limits(self, half: int, thresholds: Floats) -> tuple[Floats, Floats]:
        """Return upper limits of false alarms and misses of "above is second", then of "below"."""
        below = [np.searchsorted(side, thresholds) for side in self._halves[half]]
        sizes = [side.size for side in self._halves[half]]
        alarms = np.stack([sizes[0] - below[0], below[0]])
        misses = np.stack([below[1], sizes[1] - below[1]])
        miss = (1 - self.confidence) / 2  # both hold together
        if half == 0:  # wider limits keep the choice from the tails, where luck would decide
            miss /= 1000
        return _upper_rate(alarms, sizes[0], miss), _upper_rate(misses, sizes[1], miss)

    def _best(self, measure: Callable[[Floats, Floats], Floats]) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            chosen = np.nan_to_num(measure(*self._limits(0, self._thresholds)), nan=-np.inf)
            way, place = np.unravel_index(np.argmax(chosen), chosen.shape)
            limits = self._limits(1, self._thresholds[place : place + 1])
            found = measure(*limits)[way, 0]
        return max(0.0, float(found)) if np.isfinite(found) else 0.0

    def __repr__(self) -> str:
        """Show the limits."""
        return f"Audit(mu>={self.mu:.3f}, rho>={self.rho:.3f}, confidence={self.confidence})"


def _upper_rate(counts: npt.NDArray[np.int64], trials: int, miss: float) -> Floats:
    """Return what a rate is at most, but for a probability `miss`, by Clopper and Pearson."""
    special = import_extra("scipy.special", "laws", "Audit")
    rates = special.betaincinv(counts + 1.0, np.maximum(trials - counts, 0.5), 1 - miss)
    found: Floats = np.where(counts == trials, 1.0, rates)
    return found


def _renyi(a: Floats, b: Floats) -> Floats:
    """Return the largest D_α / α between a decision's two laws, in both directions."""
    best = np.zeros(a.shape)
    for p, q in ((1 - b, a), (a, 1 - b)):
        for order in _ORDERS:
            yes = order * np.log(p) + (1 - order) * np.log(q)
            no = order * np.log1p(-p) + (1 - order) * np.log1p(-q)
            best = np.fmax(best, np.logaddexp(yes, no) / (order - 1) / order)
    found: Floats = np.where(1 - b > a, best, 0.0)
    return found


def off_lattice(values: Any, spacing: float) -> Floats:
    """Return 1 where a number is no multiple of a power of two, else 0: a score of low bits.

    A float of size 1/2 to 1 is a multiple of 2^-53, a smaller one mostly not. Noise z in floating
    point on the count 1, if it comes out below 1/2, was larger and is such a multiple; on the
    count 0 it need not be.

    Examples:
        >>> off_lattice([0.5, 0.5 + 2**-53, 0.25 + 2**-54, 3.0], 2.0**-53).tolist()
        [0.0, 0.0, 1.0, 0.0]
    """
    number("off_lattice", "spacing", spacing, above=0)
    require(math.frexp(spacing)[0] == 0.5, "off_lattice", "spacing", "must be 2^k", spacing)
    scaled = np.asarray(values, np.float64) / spacing
    found: Floats = (scaled != np.round(scaled)).astype(np.float64)
    return found

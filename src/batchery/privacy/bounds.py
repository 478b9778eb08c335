# SPDX-License-Identifier: Apache-2.0
"""How far a continually released maximum, or its index, can be off; and the settings that do best.

Everything here is computed from public parameters, never from rows: horizon T, columns d, budget,
and the probability β that some release misses more. The mechanisms and the sources are in
`batchery.privacy.max_sum`. With k = ⌈T / r⌉ releases, each r steps apart:

    maximum, Gaussian     stale + √(2 ln(k/β) · k / (2ρ))      stale = r, or r/2 with midpoint hold
    maximum, Laplace      stale + (k/ε) ln(k/β)
    index                 r + ln(dk/β) / η      η = √(8ρ/k) / 2, or twice that if monotone
    counter per column    tail of d T sums of noise, twice for the index
    constant              T/2, T for the index
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from batchery.privacy.accounting import Budget, golden_section
from batchery.privacy.law import NoiseKind
from batchery.privacy.mechanism import calibrate, tail
from batchery.privacy.noise import round_up
from batchery.privacy.running_sum import Design, law_variance

ReleaseKind = Literal["gaussian", "laplace", "exponential"]


@dataclass(frozen=True)
class Recompute:
    """A statistic released anew every `interval` steps, and held between.

    Attributes:
        interval: r.
        releases: k.
        kind: of the noise; `"exponential"` is a choice.
        scale: σ² or b of the noise, or the factor of the scores in a choice.
        stale: most that a held release can be off by its age.
        columns: d, among which is chosen.
    """

    interval: int
    releases: int
    kind: ReleaseKind
    scale: Fraction
    stale: float
    columns: int = 1

    def miss(self, beta: float) -> float:
        """Return what the noise of no release exceeds, with probability 1 - beta."""
        log = math.log(self.columns * self.releases / beta)
        if self.kind == "gaussian":
            return math.sqrt(2 * log * self.scale)
        return log * float(self.scale) if self.kind == "laplace" else log / float(self.scale)

    def bound(self, beta: float) -> float:
        """Return what no release is off by, with probability 1 - beta."""
        return self.stale + self.miss(beta)

    def sigma(self) -> float | None:
        """Return the standard deviation of the noise; None for a choice."""
        return (
            None if self.kind == "exponential" else math.sqrt(law_variance(self.kind, self.scale))
        )


def recompute_max(
    horizon: int, budget: Budget, beta: float, *, midpoint: bool = True, interval: int | None = None
) -> Recompute:
    """Return the best interval for the maximum of column sums.

    Args:
        horizon: T.
        budget: of all releases; a pure one takes Laplace noise.
        beta: β.
        midpoint: held at what it will be in the middle, not at what it was.
        interval: r, instead of the best.

    Examples:
        >>> plan = recompute_max(10_000, Budget(rho=0.5), 0.05, midpoint=False)
        >>> plan.interval, round(plan.bound(0.05), 1)
        (36, 105.2)
    """
    share = 0.5 if midpoint else 1.0

    def bound(r: float, k: float) -> float:
        if budget.pure_epsilon is not None:
            return share * r + k / budget.pure_epsilon * math.log(k / beta)
        return share * r + math.sqrt(math.log(k / beta) * k / budget.rho)

    r = interval or _best_interval(horizon, bound)
    k = -(-horizon // r)
    kind, scale = calibrate(budget, Fraction(k), Fraction(k))
    return Recompute(r, k, kind, scale, share * r)


def recompute_index(
    horizon: int,
    columns: int,
    budget: Budget,
    beta: float,
    *,
    monotone: bool = False,
    interval: int | None = None,
) -> Recompute:
    """Return the best interval for the index of the largest column sum.

    Args:
        horizon: T.
        columns: d.
        budget: of all releases.
        beta: β.
        monotone: a neighbour's sums are all at least, or all at most, as large: so it is when a
            record is removed, not when it is replaced.
        interval: r, instead of the best.
    """

    def factor(k: float) -> float:
        if budget.pure_epsilon is not None:
            epsilon = budget.pure_epsilon / k
        else:
            epsilon = math.sqrt(8 * budget.rho / k)
        return epsilon if monotone else epsilon / 2

    def bound(r: float, k: float) -> float:
        return r + math.log(columns * k / beta) / factor(k)

    r = interval or _best_interval(horizon, bound)
    k = -(-horizon // r)
    # Rounded down, by more than the root and the division can have been rounded up.
    scale = 1 / round_up(1 / (Fraction(factor(k)) * (1 - Fraction(1, 1 << 50))), 20)
    return Recompute(r, k, "exponential", scale, float(r), columns)


def _best_interval(horizon: int, bound: Callable[[float, float], float]) -> int:
    """Return the best integer within a fifth of the best real number of steps."""

    def smooth(log: float) -> float:
        r = math.exp(log)
        return bound(r, max(1.0, horizon / r))

    real = math.exp(golden_section(smooth, 0.0, math.log(horizon)))
    low, high = max(1, math.floor(0.8 * real)), min(horizon, math.ceil(1.2 * real))
    return min(range(low, high + 1), key=lambda r: bound(r, -(-horizon // r)))


@dataclass(frozen=True)
class Sparse:
    """A maximum released when it has risen by a threshold, a bounded number of times.

    Attributes:
        threshold: θ; a release is due when the maximum is found that much above the last one.
        firings: m, the most releases.
        kind: of the noise on values.
        scale: of that noise.
        threshold_scale: of the Laplace noise on θ, drawn once a release.
        query_scale: of the Laplace noise on each comparison.
    """

    threshold: int
    firings: int
    kind: NoiseKind
    scale: Fraction
    threshold_scale: Fraction
    query_scale: Fraction

    def misses(self, horizon: int, beta: float) -> tuple[int, int]:
        """Return what noise in comparisons, and on values, stays below: β/2 for each."""
        log = math.log(2 * (horizon + self.firings) / beta)
        # Rounded up to integers, where the tail of a discrete law is below that of the real one.
        compare = sum(math.ceil(log * s) for s in (self.threshold_scale, self.query_scale))
        log = math.log(2 * self.firings / beta)
        value = math.sqrt(2 * log * self.scale) if self.kind == "gaussian" else log * self.scale
        return compare, math.ceil(value)

    def sigma(self) -> float:
        """Return the standard deviation of the noise on values."""
        return math.sqrt(law_variance(self.kind, self.scale))

    def bound(self, horizon: int, beta: float) -> float:
        """Return what no release is off by until they are used up, with probability 1 - beta."""
        return self.threshold + self.misses(horizon, beta)[0]


def counted_miss(design: Design, horizon: int, columns: int, beta: float) -> float:
    """Return what no entry of any release of a counter is off by, with probability 1 - beta."""
    kind, scale = design.kind, design.largest_scale(horizon)
    terms = design.worst(horizon) / law_variance(kind, scale)
    return tail(kind, float(scale), terms, horizon * columns, beta)


def sparse_max(
    horizon: int, final: int, budget: Budget, beta: float, *, monotone: bool = False
) -> Sparse:
    """Return the number of releases that is best for a maximum that ends at `final`.

    Half the budget is for comparisons, half for values. Under ρ each of the m runs of comparisons
    is pure with ε₁² = ρ / m, half of it on the threshold. A release is due only after a true rise
    of final / m, so that m of them last, with probability 1 - β.

    Args:
        horizon: T.
        final: the largest maximum that is planned for, a public guess.
        budget: of all releases.
        beta: β.
        monotone: as in `recompute_index`; then comparisons need half the noise.
    """

    def plan(m: int) -> Sparse:
        half = budget.share(0.5)
        kind, scale = calibrate(half, Fraction(m), Fraction(m))
        if budget.pure_epsilon is not None:
            one = Fraction(budget.pure_epsilon) / (2 * m)
        else:
            one = Fraction(math.sqrt(budget.rho / m)) * (1 - Fraction(1, 1 << 50))
        on_threshold, on_query = round_up(2 / one), round_up((2 if monotone else 4) / one)
        found = Sparse(0, m, kind, scale, on_threshold, on_query)
        rise = -(-final // m)
        return replace(found, threshold=sum(found.misses(horizon, beta)) + rise)

    def bound(log: float) -> float:
        return plan(round(math.exp(log))).bound(horizon, beta)

    return plan(round(math.exp(golden_section(bound, 0.0, math.log(final)))))

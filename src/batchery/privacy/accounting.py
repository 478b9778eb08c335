# SPDX-License-Identifier: Apache-2.0
r"""Privacy budgets: zero-concentrated (ρ), approximate (ε, δ), pure (ε), and the ways between them.

Use ρ to add up and to split; convert to (ε, δ) once, at the end. Adding up ε and δ loses more at
every step.

    Gaussian noise σ on L2 sensitivity Δ   ρ = Δ² / (2σ²), μ = Δ / σ
    pure ε, say Laplace noise              ρ <= ε² / 2
    exponential mechanism, bounded range ε ρ <= ε² / 8
    several, adaptively                    ρ adds up; so do μ² and pure ε
    a group of k records                   k² ρ, k μ, k ε
    ρ to (ε, δ)    ε = min over α > 1 of ρα + (ln(1/(αδ)) + (α-1) ln(1 - 1/α)) / (α-1)
    μ to (ε, δ)    δ = Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ), exactly

Reference: Bun, Steinke, "Concentrated Differential Privacy", TCC 2016, arXiv 1605.02065; Canonne,
Kamath, Steinke, arXiv 2004.00010; Balle, Wang, "Improving the Gaussian Mechanism for
Differential Privacy", ICML 2018, arXiv 1805.06530; Cesar, Rogers, "Bounding, Concentrating, and
Truncating", ALT 2021, arXiv 2004.07223, for ε²/8.

Where we differ: conversions are rounded to the private side, so that a budget that is converted
and spent is never exceeded. The μ line is that of continuous Gaussian noise. Discrete Gaussian
noise satisfies the same ρ, but not the same μ, and is converted from ρ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from batchery._core.validate import integer, number, require

_SLACK = 1 + 1e-9  # covers the rounding of the formulas below


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Return the least ε that ρ-zCDP is known to give at δ.

    Args:
        rho: ρ, at least 0.
        delta: δ, in (0, 1).

    Examples:
        >>> round(zcdp_epsilon(0.5, 1e-6), 4)
        5.2215
    """
    number("zcdp_epsilon", "rho", rho, at_least=0)
    number("zcdp_epsilon", "delta", delta, above=0, below=1)
    if rho == 0:
        return 0.0

    def epsilon(log_order: float) -> float:
        order_less_1 = math.exp(log_order)
        order = 1 + order_less_1
        gain = -math.log(order) - math.log(delta)
        return rho * order + gain / order_less_1 - math.log1p(1 / order_less_1)

    # Every order gives a valid ε: a search that misses the best one is still right.
    grid = [k / 4 for k in range(-120, 121)]
    best = min(grid, key=epsilon)
    least = epsilon(golden_section(epsilon, best - 0.25, best + 0.25))
    return max(0.0, least) * _SLACK


def zcdp_rho(epsilon: float, delta: float) -> float:
    """Return the greatest ρ whose (ε, δ) is within the one given.

    Args:
        epsilon: ε, above 0.
        delta: δ, in (0, 1).

    Raises:
        ValueError: ε or δ is not in its range; or both are so small that no ρ is found.

    Examples:
        >>> zcdp_epsilon(zcdp_rho(1.0, 1e-6), 1e-6) <= 1.0
        True
    """
    number("zcdp_rho", "epsilon", epsilon, above=0)
    number("zcdp_rho", "delta", delta, above=0, below=1)
    rho = _largest(lambda rho: zcdp_epsilon(rho, delta) <= epsilon)
    rule = f"must be within reach of a ρ with delta={delta}"
    require(zcdp_epsilon(rho, delta) <= epsilon, "zcdp_rho", "epsilon", rule, epsilon)
    return rho


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the least δ at ε of Gaussian noise with σ = Δ / μ.

    Args:
        mu: μ = Δ / σ, above 0.
        epsilon: ε, at least 0.

    Examples:
        >>> round(gaussian_delta(1 / 3.73063, 1.0), 9)
        1e-05
    """
    number("gaussian_delta", "mu", mu, above=0)
    number("gaussian_delta", "epsilon", epsilon, at_least=0)
    log_a = _log_normal_cdf(mu / 2 - epsilon / mu)
    log_b = _log_normal_cdf(-mu / 2 - epsilon / mu) + epsilon
    # Where μ is tiny both are nearly equal: what their rounding can hide is added to the gap.
    rounding = 1e-15 * (1 + 2 * epsilon - log_a - log_b)
    return math.exp(log_a) * -math.expm1(min(0.0, log_b - log_a) - rounding)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the least ε at δ of Gaussian noise with σ = Δ / μ; 0 when δ alone covers it.

    Args:
        mu: μ = Δ / σ, above 0.
        delta: δ, in (0, 1).

    Examples:
        >>> round(gaussian_epsilon(1 / 3.73063, 1e-5), 4)
        1.0
    """
    number("gaussian_epsilon", "mu", mu, above=0)
    number("gaussian_epsilon", "delta", delta, above=0, below=1)
    if gaussian_delta(mu, 0.0) * _SLACK <= delta:
        return 0.0
    return 1 / _largest(lambda inverse: gaussian_delta(mu, 1 / inverse) * _SLACK <= delta)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the greatest μ with which Gaussian noise is (ε, δ)-private.

    Args:
        epsilon: ε, above 0.
        delta: δ, in (0, 1).

    Examples:
        >>> round(1 / gaussian_mu(1.0, 1e-5), 5)
        3.73063
    """
    number("gaussian_mu", "epsilon", epsilon, above=0)
    number("gaussian_mu", "delta", delta, above=0, below=1)
    return _largest(lambda mu: gaussian_delta(mu, epsilon) * _SLACK <= delta)


def gaussian_scale(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """Return the least σ with which Gaussian noise is (ε, δ)-private.

    Args:
        epsilon: ε, above 0.
        delta: δ, in (0, 1).
        sensitivity: L2 sensitivity Δ of what the noise is added to.

    Examples:
        >>> round(gaussian_scale(1.0, 1e-5), 5)
        3.73063
    """
    number("gaussian_scale", "sensitivity", sensitivity, above=0)
    finite = math.isfinite(sensitivity)
    require(finite, "gaussian_scale", "sensitivity", "must be finite", sensitivity)
    return sensitivity / gaussian_mu(epsilon, delta)


@dataclass(frozen=True)
class Budget:
    """What a mechanism may spend, or has spent, on every record.

    `Budget(rho=0.5)`, `Budget.approx(epsilon=1.0, delta=1e-6)` or `Budget.pure(epsilon=1.0)`. A
    pure budget makes mechanisms draw Laplace noise, the others Gaussian noise.

    Attributes:
        rho: ρ of zero-concentrated differential privacy; 0 when nothing has been spent.
        pure_epsilon: ε of pure differential privacy, if that is what it is.
        target: (ε, δ) asked for, if that is what was asked for.
        gaussian: the loss is that of one continuous Gaussian mechanism with μ = √(2ρ).

    Raises:
        ValueError: ρ or ε is negative, δ is not in (0, 1), or these do not fit each other.

    Examples:
        >>> Budget(rho=0.5).epsilon(1e-6) < 5.23
        True
        >>> Budget.pure(0.5).group(2)
        Budget.pure(epsilon=1.0)
    """

    rho: float
    pure_epsilon: float | None = None
    target: tuple[float, float] | None = None
    gaussian: bool = False

    def __post_init__(self) -> None:
        """Check that all fields promise the same."""
        number("Budget", "rho", self.rho, at_least=0)
        require(math.isfinite(self.rho), "Budget", "rho", "must be finite", self.rho)
        pure, target = self.pure_epsilon, self.target
        plain = not self.gaussian or (pure is None and target is None)
        rule = "must be False with pure_epsilon or target"
        require(plain, "Budget", "gaussian", rule, self.gaussian)
        if pure is not None:
            number("Budget", "pure_epsilon", pure, at_least=0)  # 0: nothing was spent
            half = pure * pure / 2
            require(self.rho == half, "Budget", "rho", f"must be ε²/2 = {half}", self.rho)
            rule = "must not be given with pure_epsilon"
            require(target is None, "Budget", "target", rule, target)
        if target is not None:
            number("Budget", "target", target[0], above=0)
            number("Budget", "target", target[1], above=0, below=1)
            # Another mathematical library may find the last digits of ε to be others: _SLACK has
            # room for that.
            fits = zcdp_epsilon(self.rho, target[1]) <= target[0] * (1 + 1e-12)
            require(fits, "Budget", "rho", f"must be within {target}, its (ε, δ)", self.rho)

    @classmethod
    def approx(cls, epsilon: float, delta: float) -> "Budget":
        """Return the budget of (ε, δ)-differential privacy."""
        number("Budget.approx", "epsilon", epsilon, above=0)
        number("Budget.approx", "delta", delta, above=0, below=1)
        target = float(epsilon), float(delta)
        return cls(zcdp_rho(*target), target=target)

    @classmethod
    def pure(cls, epsilon: float) -> "Budget":
        """Return the budget of ε-differential privacy, δ = 0."""
        number("Budget.pure", "epsilon", epsilon, above=0)
        return cls._pure(epsilon)

    @classmethod
    def _pure(cls, epsilon: float) -> "Budget":
        epsilon = float(epsilon)
        return cls(epsilon * epsilon / 2, pure_epsilon=epsilon)

    def epsilon(self, delta: float = 0.0) -> float:
        """Return ε at δ; infinity where nothing is promised.

        That is at δ = 0, unless the budget is pure; and below the δ of an (ε, δ) budget, where
        `spent` of the mechanism that uses it has the number.
        """
        number("Budget", "delta", delta, at_least=0, below=1)
        if self.rho == 0:
            return 0.0
        if self.target is not None:
            return self.target[0] if delta >= self.target[1] else math.inf
        pure = math.inf if self.pure_epsilon is None else self.pure_epsilon
        if delta == 0:
            return pure
        if self.gaussian:
            return gaussian_epsilon(math.sqrt(2 * self.rho), delta)
        return min(pure, zcdp_epsilon(self.rho, delta))

    def for_gaussian(self) -> "Budget":
        """Return what one continuous Gaussian mechanism may spend under this budget.

        Under an (ε, δ) budget that is more than ρ, by the exact line of μ.

        Raises:
            ValueError: the budget is pure, under which there is no Gaussian noise.
        """
        if self.target is None:
            return replace(self, gaussian=True)
        mu = gaussian_mu(*self.target)
        return Budget(mu * mu / 2, gaussian=True)

    def share(self, fraction: float) -> "Budget":
        """Return the part of this budget that takes `fraction` of ρ, or of pure ε.

        Shares that add up to 1 compose to no more than the whole.
        """
        number("Budget", "fraction", fraction, at_least=0)
        if self.pure_epsilon is not None:
            return Budget._pure(self.pure_epsilon * fraction)
        return replace(self, rho=self.rho * fraction, target=None)

    def group(self, size: int) -> "Budget":
        """Return what `size` records together have lost, or a user who contributed so many."""
        integer("Budget", "size", size, at_least=1)
        if self.pure_epsilon is not None:
            return Budget._pure(self.pure_epsilon * size)
        if self.target is not None:
            epsilon, delta = self.target
            more = delta * sum(math.exp(k * epsilon) for k in range(size))
            require(more < 1, "Budget", "size", "leaves no δ below 1", size)
            return Budget.approx(size * epsilon, more)
        return replace(self, rho=self.rho * size * size)

    def per_record(self, size: int) -> "Budget":
        """Return the budget of one record when `size` of them together are to have this one."""
        integer("Budget", "size", size, at_least=1)
        if self.pure_epsilon is not None:
            return Budget._pure(self.pure_epsilon / size)
        return replace(self, rho=self.rho / (size * size), target=None)

    def __repr__(self) -> str:
        """Show the constructor's call."""
        if self.pure_epsilon is not None:
            return f"Budget.pure(epsilon={self.pure_epsilon})"
        if self.target is not None:
            return f"Budget.approx(epsilon={self.target[0]}, delta={self.target[1]})"
        return f"Budget(rho={self.rho}{', gaussian=True' if self.gaussian else ''})"


def _log_normal_cdf(x: float) -> float:
    if x > -36:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    # Where erfc is about to underflow: the asymptotic series, its first omitted term below 1e-12.
    square = 1 / (x * x)
    series = 1 - square * (1 - 3 * square * (1 - 5 * square * (1 - 7 * square)))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log(series)


def golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one valley in [low, high] is least."""
    ratio = (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [function(x) for x in inner]
    for _ in range(60):
        if values[0] <= values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - ratio * (high - low)
            values[0] = function(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + ratio * (high - low)
            values[1] = function(inner[1])
    return (low + high) / 2


def _largest(holds: Callable[[float], bool]) -> float:
    """Return the greatest positive number for which a condition of small numbers holds."""
    low, high = -100.0, 100.0  # of its logarithm
    for _ in range(80):
        middle = (low + high) / 2
        if holds(math.exp(middle)):
            low = middle
        else:
            high = middle
    return math.exp(low)

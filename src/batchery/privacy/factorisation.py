# SPDX-License-Identifier: Apache-2.0
r"""Private running sums with correlated Gaussian noise: a fifth of the squared error of the tree.

Use it for simulation, for training with private gradients, and wherever real noise is acceptable.
Its coefficients are real, so that exact integer noise is impossible: what must keep its guarantee
to the last bit takes `TreeCounter`. Laplace noise is refused: that rows chosen adaptively are safe
rests on the rotation of Gaussian noise.

Prefix sums are A x with A all ones on and below the diagonal. With A = B C,

    release B (C x + z) = A x + B z        z ~ N(0, σ²),  σ² = s² Δ² / (2ρ)
    variance of release t                  σ² · ‖row t of B‖²
    s² = largest squared column of C; for a record in k steps, b apart, ‖Σ_{i<k} column i·b‖²

    "sqrt"    B = C = A^{1/2}: f_0 = 1, f_k = f_{k-1} (2k-1) / (2k); keeps all noise, 2 T d numbers
    "banded"  the first w diagonals of it in C: w d numbers; for records in several steps
    "blt"     C = 1, Σ_j w_j λ_j^{k-1}: a few decaying buffers, d numbers each; fitted to T

In units of Δ² / (2ρ) the worst variance of "sqrt" is ((ln T + 4 ln 2 + γ) / π)², of the tree about
(log2 T)²; "blt" with four buffers comes within 1 % of "sqrt" up to T = 65 536.

Reference: Fichtenberger, Henzinger, Upadhyay, "Constant matters", ICML 2023, arXiv 2202.11205;
Denisov et al., NeurIPS 2022, arXiv 2202.08312 (adaptivity); Choquette-Choo et al., "(Amplified)
Banded Matrix Factorization", NeurIPS 2023, arXiv 2306.08153; Dvijotham et al., "Efficient and
Near-Optimal Noise Generation for Streaming Differential Privacy", FOCS 2024, arXiv 2404.16706;
Kalinin, Lampert, "Banded Square Root Matrix Factorization", NeurIPS 2024, arXiv 2405.13763.

Where we differ: the buffers are fitted to C, not to its inverse, and from closed forms, in a tenth
of a second for any horizon.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from batchery._core.validate import integer, one_of, require, require_type
from batchery.privacy.accounting import Budget
from batchery.privacy.counters import Adjacency, Clip, Counter
from batchery.privacy.law import NoiseKind
from batchery.privacy.mechanism import State, calibrate, exact
from batchery.privacy.noise_rows import Noise, Sampler
from batchery.privacy.running_sum import Design, NoisySum, Place, RunningSum
from batchery.privacy.toeplitz import (
    Banded,
    Column,
    SquareRoot,
    Strategy,
    fit_buffers,
    squared_sensitivity,
)

StrategyName = Literal["auto", "sqrt", "banded", "blt"]


def root_or_buffers(
    horizon: int, row_bytes: int, memory_budget: int = 1 << 30, buffers: int = 4
) -> Strategy:
    """Return the square root if its noise fits into the memory budget, else fitted buffers."""
    fits = 2 * horizon * row_bytes <= memory_budget
    return SquareRoot() if fits else fit_buffers(horizon, buffers)


@lru_cache(maxsize=8)
def _squares(strategy: Strategy, n: int) -> Column:
    """Return the squared norms of the first n rows of B."""
    found: Column = np.square(strategy.recovery(n)).cumsum()
    return found


@dataclass(frozen=True)
class FactorDesign:
    """A strategy, the variance of its noise, and who may be in how many steps.

    Attributes:
        horizon: T.
        strategy: C.
        scale: σ².
        participations: number of steps that one record is in.
        separation: least distance of two of them.
        kind: of the noise.
    """

    horizon: int
    strategy: Strategy
    scale: Fraction
    participations: int = 1
    separation: int = 1
    kind: NoiseKind = "gaussian"

    @property
    def name(self) -> str:
        """What it is: `"sqrt"`, `"banded"` or `"blt"`."""
        return self.strategy.name

    def largest_scale(self, t: int) -> Fraction:
        """Return the scale, which is one for all."""
        return self.scale

    def variance(self, t: int) -> float:
        """Return the variance of one entry of release `t`."""
        return float(self.scale) * float(_squares(self.strategy, self.horizon)[t - 1])

    def worst(self, t: int) -> float:
        """Return the largest variance of a release up to `t`: the last."""
        return self.variance(t)

    def mean(self, t: int) -> float:
        """Return the mean variance of the releases up to `t`."""
        return float(self.scale) * float(_squares(self.strategy, self.horizon)[:t].mean())

    def fraction(self, t: int) -> float:
        """Return the part of ρ that the releases up to `t` spend."""
        column = self.strategy.column(self.horizon)
        whole = squared_sensitivity(column, self.participations, self.separation)
        return squared_sensitivity(column[:t], self.participations, self.separation) / whole

    def begin(self, place: Place) -> RunningSum:
        """Return a running sum of no rows."""
        return NoisySum(self.strategy.noise(self.horizon, self.scale, place), place)


def factor_design(
    horizon: int,
    strategy: Strategy,
    budget: Budget,
    squared_l2: Fraction,
    participations: int = 1,
    separation: int = 1,
) -> FactorDesign:
    """Return a strategy within a budget that is not pure, for rows that change by so much."""
    column = strategy.column(horizon)
    squared = squared_l2 * exact(squared_sensitivity(column, participations, separation))
    _, scale = calibrate(budget, squared, squared)
    return FactorDesign(horizon, strategy, scale, participations, separation)


class FactorizationCounter(Counter):
    """A private running sum by matrix factorisation.

    Args:
        horizon: number of rows, T; None for a stream without end, in epochs of doubling length.
        shape: of one row.
        budget: of all releases together; not a pure one.
        strategy: `"sqrt"`, `"banded"`, `"blt"`; `"auto"` takes the square root if its noise fits
            into `memory_budget`, else buffers.
        bands: of `"banded"`; by default `min_separation`, or 64.
        buffers: of `"blt"`.
        min_separation: least number of steps between two rows that one record is in.
        max_participations: number of rows that one record is in, at most.
        memory_budget: bytes that noise may take.
        row_sensitivity: the most by which one record changes one row, in L2 norm.
        clip: keep that promise: `"l2"` shortens rows, `"linf"` clamps entries.
        adjacency: what clipping has to hide: a record replaced by another, or by a row of zeros.
        sampler: only `"float"`.
        noise: draws the noise in place of the sampler's own; for tests.
        device: of sums and noise.
        dtype: of sums and noise.

    Raises:
        ValueError: a pure budget, discrete noise, a square root too large for the memory budget,
            or an argument outside its range.

    Examples:
        >>> counter = FactorizationCounter(1000, budget=Budget(rho=0.5))
        >>> releases = counter.update_many(torch.ones(1000))
        >>> bool(abs(releases[-1] - 1000) < counter.error_bound(1e-9))
        True
    """

    def __init__(
        self,
        horizon: int | None,
        shape: tuple[int, ...] | int = (),
        *,
        budget: Budget,
        strategy: StrategyName = "auto",
        bands: int | None = None,
        buffers: int = 4,
        min_separation: int | None = None,
        max_participations: int = 1,
        memory_budget: int = 1 << 30,
        row_sensitivity: float = 1.0,
        clip: Clip | None = None,
        adjacency: Adjacency = "replace",
        sampler: Sampler = "float",
        noise: Noise | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Check the arguments and begin; see the class."""
        super().__init__(
            horizon,
            shape,
            budget=budget,
            row_sensitivity=row_sensitivity,
            clip=clip,
            adjacency=adjacency,
            sampler=sampler,
            noise=noise,
            device=device,
            dtype=dtype,
        )
        owner = self._owner
        one_of(owner, "strategy", strategy, get_args(StrategyName))
        rule = "must be 'float': real coefficients leave the lattice of exact noise"
        require(sampler == "float", owner, "sampler", rule, sampler)
        rule = "must not be pure: Laplace noise is not safe with a general factorisation"
        require(budget.pure_epsilon is None, owner, "budget", rule, budget)
        for name, value in (("bands", bands), ("min_separation", min_separation)):
            if value is not None:
                integer(owner, name, value, at_least=1)
        integer(owner, "buffers", buffers, at_least=1)
        integer(owner, "memory_budget", memory_budget, at_least=0)
        integer(owner, "max_participations", max_participations, at_least=1)
        if max_participations > 1:
            rule = "must be given with max_participations > 1"
            require(min_separation is not None, owner, "min_separation", rule, min_separation)
            rule = "must be given with max_participations > 1: a record would be in many epochs"
            require(horizon is not None, owner, "horizon", rule, horizon)
        self.strategy: StrategyName = strategy
        self.bands = bands if bands is not None else min_separation or 64
        self.buffers = buffers
        self.min_separation = min_separation
        self.max_participations = max_participations
        self.memory_budget = memory_budget
        self._begin()

    def _strategy(self, horizon: int) -> Strategy:
        numbers = math.prod(self.shape) * self.dtype.itemsize
        if self.strategy == "banded":
            return Banded(self.bands)
        if self.strategy == "blt":
            return fit_buffers(horizon, self.buffers)
        found = root_or_buffers(horizon, numbers, self.memory_budget, self.buffers)
        if self.strategy == "sqrt":
            size = f"{2 * horizon * numbers / 1e9:.1f} GB"
            rule = f"must be 'blt' within memory_budget: noise of {size} does not fit"
            require(found == SquareRoot(), self._owner, "strategy", rule, self.strategy)
        return found

    def _design(self, horizon: int, budget: Budget) -> Design:
        step = exact(self.row_sensitivity)
        use = (self.max_participations, self.min_separation or 1)
        return factor_design(horizon, self._strategy(horizon), budget, step * step, *use)

    def _settings(self) -> State:
        return super()._settings() | {
            "strategy": self.strategy,
            "bands": self.bands,
            "buffers": self.buffers,
            "min_separation": self.min_separation,
            "max_participations": self.max_participations,
            "memory_budget": self.memory_budget,
        }


def noise_stream(counter: Counter) -> Iterator[Tensor]:
    """Yield the correlated noise of a counter, one row for each of its steps.

    Added to the gradients of a training run, it makes their sums, and so the weights of plain SGD,
    what the counter would release. The counter must be new, and `row_sensitivity` the norm to which
    gradients are clipped (twice that when records are replaced, not removed).

    Args:
        counter: with a horizon; its steps are used up.

    Raises:
        TypeError: it is no counter.
        ValueError: the counter has no horizon, or has been used.

    Examples:
        >>> counter = FactorizationCounter(3, 2, budget=Budget(rho=0.5), row_sensitivity=0.1)
        >>> [tuple(noise.shape) for noise in noise_stream(counter)]
        [(2,), (2,), (2,)]
    """
    is_counter = isinstance(counter, Counter)
    require_type(is_counter, "noise_stream", "counter", "must be a counter", counter)
    require(counter.horizon is not None, "noise_stream", "counter", "must have a horizon", counter)
    require(counter.t == 0, "noise_stream", "counter", "must be new", counter)
    return _increments(counter, counter.horizon or 0)


def _increments(counter: Counter, horizon: int) -> Iterator[Tensor]:
    zero = torch.zeros(counter.shape, dtype=counter.dtype, device=counter.device)
    before: Any = zero
    for _ in range(horizon):
        now = counter.update(zero)
        yield now - before
        before = now

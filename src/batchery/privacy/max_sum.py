# SPDX-License-Identifier: Apache-2.0
r"""The largest column sum of a stream of bits, or its index, released after every row.

Use it for "how often was the most frequent item seen so far" and "which is it": dashboards, lists
of what is trending, leaders of an experiment. For the counts of all items use a counter. Releasing
once, at the end, costs far less: continual release has a price of about T^(1/3), which no mechanism
avoids.

Rows x_t ∈ {0,1}^d, S_t their sums; M_t = max_j S_t[j] moves by at most 1 with one record:

    "recompute"  at t = 1, 1+r, 1+2r, …: M_t + noise, or a choice P(j) ∝ exp(η S_t[j]); then held.
                 σ² = k/(2ρ) for k = ⌈T/r⌉ releases: every one sees all old records. r* ~ T^(1/3).
                 M_t rises by at most 1 a step: held at + (r-1)/2, it is off by half as much.
    "tree"       a counter of all columns, and its maximum or argmax; Δ = √d, or with at most k ones
                 in a row √(2k), and √k where a record is replaced by zeros
    "sqrt"       the same by matrix factorisation, in real noise
    "sparse"     released when a noisy comparison finds M_t a threshold above the last release
    "constant"   t/2, or index 0

`"auto"` takes the one whose bound is least for T, d, budget and β, never looking at rows; not
"sparse" where 0 would do as well by the guess that its bound rests on. Releases of the maximum are
then made to rise by 0 or 1 a step, which costs nothing and keeps the bound.
Without a horizon the e-th epoch, of 2^e steps, gets 6 / (π² (e+1)²) of the budget.

Reference: Jain, Raskhodnikova, Sivakumar, Smith, "The Price of Differential Privacy under Continual
Observation", ICML 2023, arXiv 2112.00828; Henzinger, Sricharan, Steiner, "Differentially Private
Histogram, Predecessor, and Set Cardinality under Continual Observation", arXiv 2306.10428, for
"sparse"; Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014, for its
comparisons.

Where we differ: the middle of what a held maximum can be is held, a fifth off the bound; "sqrt"
moves the number of columns up to which a counter is the better choice from some 16 to some 220
(T = 2^20, ρ = 1/2); the choice between mechanisms is by bounds with their constants.
"""

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from batchery._core.validate import integer, number, one_of, require
from batchery.privacy.accounting import Budget
from batchery.privacy.bounds import Recompute, Sparse, recompute_index, recompute_max, sparse_max
from batchery.privacy.column_mechanism import ColumnMechanism, MechanismName
from batchery.privacy.counters import Adjacency
from batchery.privacy.mechanism import State
from batchery.privacy.noise import DiscreteNoise
from batchery.privacy.noise_rows import Noise, Sampler
from batchery.privacy.raw_release import Constant, Counted, Fired, RawRelease

Hold = Literal["midpoint", "last"]


class MaxSum(ColumnMechanism):
    """The largest column sum so far.

    Args:
        horizon: number of rows, T; None for a stream without end.
        num_columns: d.
        budget: of all releases together. A pure one takes Laplace noise.
        mechanism: see the module; `"auto"` takes the least bound.
        beta: β, the probability that bounds may fail with, for the choice.
        adjacency: a record is replaced by another, or by a row of zeros.
        max_ones: most ones in a row, checked; 1 where a record names one category. Less noise for
            the counters.
        consistent: make releases rise by 0 or 1 a step.
        hold: what `"recompute"` shows between releases.
        interval: r of `"recompute"`, instead of the best; from no data.
        expected_max: what the maximum will end at, for `"sparse"`: a public guess, from no data. By
            it 0 is never off by more, so that `"auto"` takes `"sparse"` only below it.
        sampler: `"discrete"`: exact integer noise. `"float"`: no formal guarantee.
        noise: draws the noise in place of the sampler's own; for tests.
        device: of the sums.

    Raises:
        ValueError: an argument is outside its range; it is named.

    Examples:
        >>> leader = MaxSum(1000, 5, budget=Budget(rho=0.5))
        >>> rows = torch.tensor([1, 0, 0, 0, 1]).expand(1000, 5)
        >>> releases = leader.update_many(rows)
        >>> bool(abs(releases[-1] - 1000) <= leader.error_bound(1e-9))
        True
    """

    mechanisms = ("auto", "recompute", "tree", "sqrt", "sparse", "constant")

    def __init__(
        self,
        horizon: int | None,
        num_columns: int,
        *,
        budget: Budget,
        mechanism: MechanismName = "auto",
        beta: float = 0.05,
        adjacency: Adjacency = "replace",
        max_ones: int | None = None,
        consistent: bool = True,
        hold: Hold = "midpoint",
        interval: int | None = None,
        expected_max: int | None = None,
        sampler: Sampler = "discrete",
        noise: Noise | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Check the arguments, choose, and begin; see the class."""
        super().__init__(
            horizon,
            num_columns,
            budget=budget,
            mechanism=mechanism,
            beta=beta,
            adjacency=adjacency,
            max_ones=max_ones,
            sampler=sampler,
            noise=noise,
            device=device,
        )
        one_of(self._owner, "hold", hold, get_args(Hold))
        for name, value in (("interval", interval), ("expected_max", expected_max)):
            if value is not None:
                integer(self._owner, name, value, at_least=1)
        self.consistent = consistent
        self.hold: Hold = hold
        self.interval = interval
        self.expected_max = expected_max
        self._choose(mechanism)

    def _cost_of(self, name: str) -> Budget:
        return self._spendable(gaussian=name != "sparse")

    def _recompute(self, epoch: int) -> Recompute:
        return recompute_max(
            self.horizon or 1 << epoch,
            self._cost_of("recompute").share(self._share(epoch)),
            self.beta * self._share(epoch),
            midpoint=self.hold == "midpoint",
            interval=self.interval,
        )

    def _sparse(self, horizon: int) -> Sparse:
        return sparse_max(
            horizon,
            min(self.expected_max or horizon, horizon),
            self._cost_of("sparse"),
            self.beta,
            monotone=self.adjacency == "add_remove",
        )

    def _is_rival(self, name: str) -> bool:
        return name != "sparse" or self.bounds[name] < (self.expected_max or math.inf)

    def _bound(self, name: str, horizon: int) -> float:
        if name == "recompute":
            return self._recompute(0).bound(self.beta)
        if name == "sparse":
            return self._sparse(horizon).bound(horizon, self.beta)
        return horizon / 2 if name == "constant" else self._counted_miss(name, horizon)

    def _begin(self, name: str) -> RawRelease:
        if name == "recompute":
            return self._held()
        if name == "sparse":
            plan = self._sparse(self.horizon or 1)
            scales = (plan.scale, plan.threshold_scale, plan.query_scale)
            self._require_drawable(max(scale.numerator for scale in scales))
            return Fired(plan, self.noise, self._zeros())
        return Constant(0.5) if name == "constant" else Counted(self._counter(name), None)

    def _answer(self, sums: Tensor, plan: Recompute) -> int:
        drawn: float = self.noise.sample(plan.kind, plan.scale, (1,))[0].item()
        ahead = (plan.interval - 1) // 2 if self.hold == "midpoint" else 0
        return int(sums.max()) + round(drawn) + ahead

    def _finish(self, raw: list[int]) -> list[int]:
        if not self.consistent:
            self._previous = raw[-1]
            return raw
        found = []
        for value in raw:
            self._previous = min(max(value, self._previous), self._previous + 1)
            found.append(self._previous)
        return found

    def error_bound(self, beta: float) -> float:
        """Return what no release misses the maximum by, with probability 1 - beta.

        Of `"sparse"`, while its releases last. Without a horizon, up to the end of this epoch.
        """
        number(self._owner, "beta", beta, above=0, below=1)
        raw = self._raw
        if isinstance(raw, Counted):
            return math.ceil(raw.counter.error_bound(beta))
        if isinstance(raw, Fired):
            return raw.plan.bound(self.horizon or 1, beta)
        if isinstance(raw, Constant):
            return math.ceil((self.horizon or 1) / 2)
        # Rounded up to an integer, where the tail of the discrete law is below that of the real.
        return max(plan.stale + math.ceil(plan.miss(part)) for plan, part in self._plans(beta))

    def _settings(self) -> State:
        return super()._settings() | {
            "consistent": self.consistent,
            "hold": self.hold,
            "interval": self.interval,
            "expected_max": self.expected_max,
        }


class SumSelect(ColumnMechanism):
    """The index of a column whose sum so far is near the largest.

    The error of a release j is max S_t - S_t[j]. Draws are exact: no index has another probability
    than it should have. Of equal noisy counts the lowest index is released.

    Args:
        horizon: number of rows, T; None for a stream without end.
        num_columns: d.
        budget: of all releases together.
        mechanism: see the module; `"sparse"` is for `MaxSum` alone.
        beta: β, the probability that bounds may fail with, for the choice.
        adjacency: a record is replaced by another, or by a row of zeros, which halves the noise of
            `"recompute"`.
        max_ones: most ones in a row, checked; 1 where a record names one category. Less noise for
            the counters.
        interval: r of `"recompute"`, instead of the best; from no data.
        margin: with a counter: keep the last index until another is ahead by more than this.
        sampler: `"discrete"`: exact. `"float"`: no formal guarantee.
        noise: draws the noise in place of the sampler's own; for tests.
        device: of the sums.

    Raises:
        ValueError: an argument is outside its range; it is named.

    Examples:
        >>> leader = SumSelect(1000, 5, budget=Budget(rho=5.0))
        >>> rows = torch.tensor([0, 0, 1, 0, 0]).expand(1000, 5)
        >>> int(leader.update_many(rows)[-1])
        2
    """

    mechanisms = ("auto", "recompute", "tree", "sqrt", "constant")

    def __init__(
        self,
        horizon: int | None,
        num_columns: int,
        *,
        budget: Budget,
        mechanism: MechanismName = "auto",
        beta: float = 0.05,
        adjacency: Adjacency = "replace",
        max_ones: int | None = None,
        interval: int | None = None,
        margin: float = 0,
        sampler: Sampler = "discrete",
        noise: Noise | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Check the arguments, choose, and begin; see the class."""
        super().__init__(
            horizon,
            num_columns,
            budget=budget,
            mechanism=mechanism,
            beta=beta,
            adjacency=adjacency,
            max_ones=max_ones,
            sampler=sampler,
            noise=noise,
            device=device,
        )
        number(self._owner, "margin", margin, at_least=0)
        if interval is not None:
            integer(self._owner, "interval", interval, at_least=1)
        self.interval = interval
        self.margin = margin
        self._choose(mechanism)
        counted = margin == 0 or isinstance(self._raw, Counted)
        rule = f"must be 0 with mechanism {self.mechanism!r}"
        require(counted, self._owner, "margin", rule, margin)

    def _cost_of(self, name: str) -> Budget:
        return self._spendable(gaussian=name in ("tree", "sqrt"))

    def _recompute(self, epoch: int) -> Recompute:
        return recompute_index(
            self.horizon or 1 << epoch,
            self.num_columns,
            self._cost_of("recompute").share(self._share(epoch)),
            self.beta * self._share(epoch),
            monotone=self.adjacency == "add_remove",
            interval=self.interval,
        )

    def _bound(self, name: str, horizon: int) -> float:
        if name == "recompute":
            return self._recompute(0).bound(self.beta)
        if name == "constant":
            return float(horizon)
        return 2 * self._counted_miss(name, horizon) + self.margin

    def _begin(self, name: str) -> RawRelease:
        if name == "recompute":
            return self._held()
        return Constant(0.0) if name == "constant" else Counted(self._counter(name), self.margin)

    def _answer(self, sums: Tensor, plan: Recompute) -> int:
        if isinstance(self.noise, DiscreteNoise):
            return self.noise.select(sums.cpu().numpy(), plan.scale)
        # The index of the largest S_j + Gumbel noise has the same law, in real numbers.
        gumbel = self.noise.sample("gumbel", 1 / plan.scale, (self.num_columns,))
        return int(np.argmax(sums.cpu().numpy() + np.asarray(torch.as_tensor(gumbel).cpu())))

    def _finish(self, raw: list[int]) -> list[int]:
        self._previous = raw[-1]
        return raw

    def error_bound(self, beta: float) -> float:
        """Return what no released column is behind by, with probability 1 - beta.

        Without a horizon, up to the end of this epoch.
        """
        number(self._owner, "beta", beta, above=0, below=1)
        if isinstance(self._raw, Counted):
            return 2 * self._raw.counter.error_bound(beta) + self.margin
        if isinstance(self._raw, Constant):
            return float(self.horizon or 1)
        return max(plan.bound(part) for plan, part in self._plans(beta))

    def _settings(self) -> State:
        return super()._settings() | {"interval": self.interval, "margin": self.margin}

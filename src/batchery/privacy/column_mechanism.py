# SPDX-License-Identifier: Apache-2.0
"""What `MaxSum` and `SumSelect` share: rows of bits, a choice of mechanism by bounds, its plan.

The mechanisms and their sources are in `batchery.privacy.max_sum`.
"""

import math
from abc import abstractmethod
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from batchery._core.validate import integer, number, one_of, require
from batchery.privacy.accounting import Budget
from batchery.privacy.bounds import Recompute, counted_miss
from batchery.privacy.counters import Adjacency, Counter, TreeCounter
from batchery.privacy.factorisation import FactorizationCounter, factor_design, root_or_buffers
from batchery.privacy.mechanism import Mechanism, State
from batchery.privacy.noise_rows import Noise, Sampler
from batchery.privacy.raw_release import Counted, Fired, Held, RawRelease
from batchery.privacy.running_sum import Design, epoch_of
from batchery.privacy.tree import tree_design

MechanismName = Literal["auto", "recompute", "tree", "sqrt", "sparse", "constant"]


class ColumnMechanism(Mechanism):
    """What `MaxSum` and `SumSelect` share: rows of bits, a choice of mechanism, its plan."""

    mechanisms: tuple[str, ...]

    def __init__(
        self,
        horizon: int | None,
        num_columns: int,
        *,
        budget: Budget,
        mechanism: MechanismName,
        beta: float,
        adjacency: Adjacency,
        max_ones: int | None,
        sampler: Sampler,
        noise: Noise | None,
        device: torch.device | str | None,
    ) -> None:
        """Check what both are given; see `MaxSum`."""
        super().__init__(horizon, budget=budget, sampler=sampler, noise=noise, device=device)
        owner = self._owner
        self.num_columns = int(integer(owner, "num_columns", num_columns, at_least=1))
        one_of(owner, "mechanism", mechanism, self.mechanisms)
        one_of(owner, "adjacency", adjacency, get_args(Adjacency))
        self.beta = number(owner, "beta", beta, above=0, below=1)
        self.adjacency: Adjacency = adjacency
        if max_ones is not None:
            integer(owner, "max_ones", max_ones, at_least=1)
        self.max_ones = min(max_ones or num_columns, num_columns)
        # A record's ones go, and if it is replaced, as many others come: all entries change by 1.
        changes = self.max_ones * (2 if adjacency == "replace" else 1)
        self._changes = min(changes, num_columns)
        real = sampler == "float" and budget.pure_epsilon is None
        rule = "must not be 'sqrt' without sampler='float', or with a pure budget"
        require(real or mechanism != "sqrt", owner, "mechanism", rule, mechanism)
        rule = f"must be given for {mechanism!r}"
        bounded = mechanism in ("sparse", "constant")
        require(horizon is not None or not bounded, owner, "horizon", rule, horizon)
        self._allowed = [
            name for name in self.mechanisms if name != "auto" and (real or name != "sqrt")
        ]

    def _choose(self, mechanism: MechanismName) -> None:
        """Compute all bounds, settle on a mechanism, and begin."""
        self.bounds: dict[str, float] = {}
        if self.horizon is not None:
            self.bounds = {name: self._bound(name, self.horizon) for name in self._allowed}
        rivals = [name for name in self.bounds if self._is_rival(name)]
        chosen: str = mechanism
        if mechanism == "auto":
            chosen = min(rivals, key=self.bounds.__getitem__, default="recompute")
        self.mechanism = chosen
        self._cost = self._cost_of(chosen)
        self._previous = 0
        self._raw = self._begin(chosen)

    def _is_rival(self, name: str) -> bool:
        """Whether "auto" may take a mechanism."""
        return True

    @abstractmethod
    def _bound(self, name: str, horizon: int) -> float:
        """Return the error bound of a mechanism."""

    @abstractmethod
    def _cost_of(self, name: str) -> Budget:
        """Return the budget as a mechanism spends it."""

    @abstractmethod
    def _recompute(self, epoch: int) -> Recompute:
        """Return the plan of recomputing in an epoch."""

    @abstractmethod
    def _answer(self, sums: Tensor, plan: Recompute) -> int:
        """Return a release by recomputing."""

    @abstractmethod
    def _begin(self, name: str) -> RawRelease:
        """Return a mechanism that has seen no rows."""

    @abstractmethod
    def _finish(self, raw: list[int]) -> list[int]:
        """Return releases for raw ones."""

    def _zeros(self) -> Tensor:
        return torch.zeros(self.num_columns, dtype=torch.int64, device=self.device)

    def _share(self, epoch: int) -> float:
        return 1.0 if self.horizon is not None else 6 / (math.pi * (epoch + 1)) ** 2

    def _held(self) -> Held:
        endless = self.horizon is None
        held = Held(self._drawable, self._answer, self._zeros(), epochs=endless, shares=self._share)
        held.plan(0)
        return held

    def _drawable(self, epoch: int) -> Recompute:
        plan = self._recompute(epoch)
        largest = plan.scale.numerator
        if plan.kind == "exponential":  # a gap of T times it has 63 bits, and what divides it 62
            gap = largest * (self.horizon or 2 << epoch)
            largest = max(gap >> 2, plan.scale.denominator >> 1)
        self._require_drawable(largest)
        return plan

    def _require_room(self, n: int) -> None:
        super()._require_room(n)
        if self.horizon is None and isinstance(self._raw, Held):
            self._raw.plan(epoch_of(self.t + n))  # refuses one whose noise could not be drawn

    def _plans(self, beta: float) -> list[tuple[Recompute, float]]:
        """Return the plans of recomputing up to now, each with its part of a probability."""
        last = self._raw.epoch() if isinstance(self._raw, Held) else -1
        return [(self._recompute(e), beta * self._share(e)) for e in range(last + 1)]

    def _counted_miss(self, name: str, horizon: int) -> float:
        """Return what no entry of a counter of all columns is off by, before there is one."""
        d, budget = self.num_columns, self._spendable(gaussian=True)
        changes = Fraction(self._changes)
        design: Design
        if name == "tree":
            design = tree_design(horizon, budget, changes, changes)
        else:
            design = factor_design(horizon, root_or_buffers(horizon, d * 8), budget, changes)
        return counted_miss(design, horizon, d, self.beta)

    def _counter(self, name: str) -> Counter:
        pure = self.budget.pure_epsilon is not None
        build = TreeCounter if name == "tree" else FactorizationCounter
        return build(
            self.horizon,
            self.num_columns,
            budget=self.budget,
            row_sensitivity=self._changes if pure else math.sqrt(self._changes),
            sampler=self.sampler,
            noise=self.noise,
            device=self.device,
        )

    def _checked(self, rows: Any, *, many: bool) -> Tensor:
        tensor = self._as_rows(rows, (self.num_columns,), many=many)
        tensor = tensor if many else tensor[None]
        if tensor.dtype != torch.bool:
            forbidden = ((tensor != 0) & (tensor != 1)).sum(1)
            if forbidden.any():
                first = int(forbidden.nonzero()[0])
                raise ValueError(
                    f"{self._owner}: row {self.t + first + 1} must hold only 0 and 1; "
                    f"{int(forbidden[first])} of its {self.num_columns} entries do not"
                )
            tensor = tensor.to(torch.int64)
        if self.max_ones < self.num_columns:
            crowded = (tensor.sum(1) > self.max_ones).nonzero()
            if len(crowded):
                raise ValueError(
                    f"{self._owner}: row {self.t + int(crowded[0]) + 1} must hold at most "
                    f"{self.max_ones} ones, by max_ones"
                )
        return tensor

    def _step(self, row: Tensor) -> int:
        return self._finish(self._raw.answers(row))[0]

    def _steps(self, rows: Tensor) -> Tensor:
        return torch.tensor(self._finish(self._raw.answers(rows)), dtype=torch.int64)

    def _last(self) -> int:
        return self._previous

    def fraction(self) -> float:
        """Return the part of the budget that the releases so far have spent."""
        return self._raw.fraction()

    def expected_squared_error(self) -> float | None:
        """Return the mean over the releases of the variance of the noise in one.

        Of a counter that of one column's count. It is the part of the error that rows have no part
        in: what a held release is behind by comes on top, and `consistent` may take some away. None
        for a choice, for `"sparse"` and for `"constant"`, whose errors are made by the rows.
        Without a horizon, over the releases up to the end of the current epoch.
        """
        raw = self._raw
        if isinstance(raw, Counted):
            return raw.counter.expected_squared_error()
        if not isinstance(raw, Held) or raw.plan(0).kind == "exponential":
            return None
        epochs = range(raw.epoch() + 1)  # the e-th has 2^e steps
        noise = [(1 << e) * float(raw.plan(e).sigma() or 0.0) ** 2 for e in epochs]
        return sum(noise) / ((1 << len(epochs)) - 1)

    @property
    def stats(self) -> dict[str, Any]:
        """Number of releases that cost something; of `"sparse"` also whether they are used up."""
        return self._raw.stats()

    @property
    def plan(self) -> dict[str, Any]:
        """What was chosen, and why.

        `mechanism`; `r` and `k`, interval and number of releases (None where there are none);
        `sigma`, the standard deviation of the noise in a release, None for a choice; `bounds`, what
        every mechanism would be off by with probability β.
        """
        found: dict[str, Any] = {"mechanism": self.mechanism, "r": None, "k": None, "sigma": None}
        raw = self._raw
        if isinstance(raw, Held):
            now = raw.plan(raw.epoch())
            found |= {"r": now.interval, "k": now.releases, "sigma": now.sigma()}
        elif isinstance(raw, Fired):
            found |= {"k": raw.plan.firings, "sigma": raw.plan.sigma()}
        elif isinstance(raw, Counted):
            found["sigma"] = raw.counter.plan["sigma"]
        return found | {"bounds": dict(self.bounds)}

    def _inner_state(self) -> State:
        return {"raw": self._raw.state(), "previous": self._previous}

    def _load_inner(self, state: State, t: int) -> None:
        self._raw.load(state["raw"], t)
        self._previous = int(state["previous"])

    def _settings(self) -> State:
        return {
            "num_columns": self.num_columns,
            "mechanism": self.mechanism,
            "beta": self.beta,
            "adjacency": self.adjacency,
            "max_ones": self.max_ones,
        }

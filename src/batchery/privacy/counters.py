# SPDX-License-Identifier: Apache-2.0
r"""Private running sums by the binary tree, with exact integer noise and O(log T) state.

Use it for counts and vectors of counts that are published after every record or batch. With real
noise `FactorizationCounter` has a fifth of the squared error at T = 1024; the tree is what integer
noise allows, and its state is small.

With low(t) the lowest set bit of t, node t covers the rows (t - low(t), t] and has one noise z_t:

    S_t = S_{t-1} + x_t
    P_t = z_t + P_{t-low(t)}          the parent is in the stack, at key low(t - low(t)); P_0 = 0
    release S_t + P_t

A row is in at most H = ⌊log2 T⌋ + 1 nodes: σ² = H Δ² / (2ρ), or b = H Δ₁ / ε. The variance of a
release is popcount(t) σ². `estimator="honaker"` also keeps noisy right children and averages every
node with its children by inverse variances: c_j = 1 / (2 - 2^-j) for a node of 2^j rows.

Without a horizon, epoch e is a tree of 2^e rows with half the budget; the other half pays for one
noisy total of each epoch past.

Reference: Dwork, Naor, Pitassi, Rothblum, "Differential Privacy under Continual Observation", STOC
2010; Chan, Shi, Song, "Private and Continual Release of Statistics", TISSEC 2011; Honaker,
"Efficient Use of Differentially Private Binary Trees", TPDP 2015. That Gaussian noise on the nodes
stands adaptively chosen rows: Denisov et al., NeurIPS 2022, arXiv 2202.08312.

Where we differ: the usual code keeps a partial sum for each level. Here the sum is one exact number
and the stack holds noise, so that a step is one addition to each.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from batchery._core.validate import integer, number, one_of, require
from batchery.privacy.accounting import Budget
from batchery.privacy.bounds import counted_miss
from batchery.privacy.mechanism import Mechanism, State, calibrate, exact
from batchery.privacy.noise_rows import Noise, Sampler
from batchery.privacy.running_sum import Design, DoublingDesign, Place, epoch_of
from batchery.privacy.tree import Estimator, tree_design

Clip = Literal["l2", "linf"]
Adjacency = Literal["replace", "add_remove"]


class Counter(Mechanism):
    """What counters share: rows of one shape, a promise of how much one can change, a sum.

    See `TreeCounter` for the arguments.
    """

    def __init__(
        self,
        horizon: int | None,
        shape: tuple[int, ...] | int,
        *,
        budget: Budget,
        row_sensitivity: float,
        clip: Clip | None,
        adjacency: Adjacency,
        sampler: Sampler,
        noise: Noise | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        """Check the shape and the promise; see `TreeCounter`."""
        super().__init__(
            horizon, budget=budget, sampler=sampler, noise=noise, device=device, dtype=dtype
        )
        lengths = tuple(shape) if isinstance(shape, Iterable) else (shape,)
        for length in lengths:
            integer(self._owner, "shape", length, at_least=1)
        number(self._owner, "row_sensitivity", row_sensitivity, above=0)
        finite = math.isfinite(row_sensitivity)
        require(finite, self._owner, "row_sensitivity", "must be finite", row_sensitivity)
        one_of(self._owner, "clip", clip, (None, *get_args(Clip)))
        one_of(self._owner, "adjacency", adjacency, get_args(Adjacency))
        euclidean = sampler == "float" and budget.pure_epsilon is None
        rule = "must not be 'l2' with sampler='discrete' or a pure budget"
        require(clip != "l2" or euclidean, self._owner, "clip", rule, clip)
        self.shape = tuple(int(length) for length in lengths)
        self.row_sensitivity = row_sensitivity
        self.clip = clip
        self.adjacency = adjacency
        # Two rows of a ball differ by its diameter; a row and none, by its radius.
        self._radius = row_sensitivity / (2 if adjacency == "replace" else 1)
        entries = math.prod(self.shape)
        limit = self._radius / (math.sqrt(entries) if budget.pure_epsilon is None else entries)
        if clip == "linf" and sampler == "discrete":
            rule = f"must let integers of {self.shape} be more than 0 when clipped"
            require(limit >= 1, self._owner, "row_sensitivity", rule, row_sensitivity)
            limit = math.floor(limit)
        self._limit = limit
        self._epochs: dict[int, Design] = {}  # not lru_cache, which cannot be pickled
        self.design: Design

    def _begin(self) -> None:
        """Make the running sum; subclasses call it last."""
        if self.horizon is not None:
            self.design = self._drawable(self.horizon, self._cost)
        else:
            half, step = self._cost.share(0.5), exact(self.row_sensitivity)
            kind, scale = calibrate(half, step * step, step)
            self._require_drawable(scale.numerator)
            self.design = DoublingDesign(self._epoch, kind, scale)
        place = Place(self.noise, self.shape, self.device, self.dtype)
        self._sum = self.design.begin(place)

    def _epoch(self, rows: int) -> Design:
        if rows not in self._epochs:
            self._epochs[rows] = self._drawable(rows, self._cost.share(0.5))
        return self._epochs[rows]

    def _drawable(self, horizon: int, budget: Budget) -> Design:
        design = self._design(horizon, budget)
        self._require_drawable(design.largest_scale(horizon).numerator)
        return design

    @abstractmethod
    def _design(self, horizon: int, budget: Budget) -> Design:
        """Return the design of a running sum of so many rows."""

    def _require_room(self, n: int) -> None:
        super()._require_room(n)
        if self.horizon is None:
            self._epoch(1 << epoch_of(self.t + n))  # refuses one that does not fit, or is not drawn

    def _checked(self, rows: Any, *, many: bool) -> Tensor:
        # As what they are added to: nothing that a sum may stumble over is left for the step.
        tensor = self._as_rows(rows, self.shape, many=many).to(self.dtype)
        # One pass over the rows, since the sum is finite only if they are, or nearly always then.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum()):
            unfit = int((~tensor.isfinite()).sum())
            if unfit:  # no clipping bounds it, and no sum recovers from it
                rule = f"must hold finite numbers; {unfit} of its entries are not"
                raise ValueError(f"{self._owner}: {'rows' if many else 'row'} {rule}")
        if self.clip is None:
            return tensor
        if self.clip == "linf":
            return tensor.clamp(-self._limit, self._limit)
        norm = tensor.flatten(int(many)).norm(dim=-1) if self.shape else tensor.abs()
        factor = self._radius / norm.clamp(min=self._radius)
        return tensor * factor.reshape(factor.shape + (1,) * len(self.shape))

    def _step(self, row: Tensor) -> Tensor:
        return self._sum.step(row)

    def _steps(self, rows: Tensor) -> Tensor:
        return self._sum.steps(rows)

    def _last(self) -> Tensor:
        return self._sum.last()

    def fraction(self) -> float:
        """Return the part of the budget that the releases so far have spent."""
        return self.design.fraction(self.t) if self.t else 0.0

    def through(self) -> int:
        """Return the step that bounds reach to: the horizon, or the end of this epoch."""
        return self.horizon or (1 << max(self.t, 1).bit_length()) - 1

    def error_bound(self, beta: float) -> float:
        """Return what no entry of any release misses its sum by, with probability 1 - beta.

        Without a horizon, up to the end of the current epoch, whose share of beta is then
        6 / (π² i²) for the i-th.
        """
        number(self._owner, "beta", beta, above=0, below=1)
        through = self.through()
        if self.horizon is None:
            beta *= 6 / (math.pi * through.bit_length()) ** 2
        return counted_miss(self.design, through, math.prod(self.shape), beta)

    @property
    def plan(self) -> dict[str, Any]:
        """What was chosen: `mechanism`, and `sigma`, the largest standard deviation of a release.

        Without a horizon, up to the end of this epoch; "auto" may choose anew for the next.
        """
        design = self.design
        if isinstance(design, DoublingDesign):
            design = design.make((self.through() + 1) // 2)
        worst = self.design.worst(self.through())
        return {"mechanism": design.name, "sigma": math.sqrt(worst)}

    def expected_squared_error(self) -> float:
        """Return the mean over the releases of the variance of one entry.

        Without a horizon, over those up to the end of the current epoch.
        """
        return self.design.mean(self.through())

    def variance(self, t: int) -> float:
        """Return the variance of one entry of release `t`, of exact noise an upper bound."""
        return self.design.variance(int(integer(self._owner, "t", t, at_least=1)))

    def _inner_state(self) -> State:
        return self._sum.state()

    def _load_inner(self, state: State, t: int) -> None:
        self._sum.load(state, t)

    def _settings(self) -> State:
        return {
            "shape": list(self.shape),
            "row_sensitivity": self.row_sensitivity,
            "clip": self.clip,
            "adjacency": self.adjacency,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class TreeCounter(Counter):
    """A private running sum by the binary tree.

    Args:
        horizon: number of rows, T; None for a stream without end.
        shape: of one row.
        budget: of all releases together. A pure one takes Laplace noise.
        row_sensitivity: the most by which one record changes its row: L2 norm, with a pure budget
            L1. It is a promise, unless `clip` keeps it: no row shows what another record would
                have made of it. √d for rows of d bits, d with a pure one.
        estimator: `"prefix"`, or `"honaker"`, which has half the variance and real releases.
        sampler: `"discrete"`: integer rows, exact integer noise; sums are int64 and wrap beyond
            2^63 with their noise, modulo 2^64, which is wrong and tells nothing. `"float"`: no
            formal guarantee.
        clip: keep the promise: `"l2"` shortens rows, `"linf"` clamps entries.
        adjacency: what clipping has to hide: a record replaced by another, or by a row of zeros.
        noise: draws the noise in place of the sampler's own; for tests.
        device: of the sums; on a CUDA device exact noise is drawn there.
        dtype: of float sums and noise.

    Raises:
        ValueError: an argument is outside its range; it is named.

    Examples:
        >>> counter = TreeCounter(1000, budget=Budget(rho=0.5))
        >>> releases = counter.update_many(torch.ones(1000, dtype=torch.int64))
        >>> bool(abs(releases[-1] - 1000) < counter.error_bound(1e-9))
        True
        >>> counter.spent
        Budget(rho=0.5)
    """

    def __init__(
        self,
        horizon: int | None,
        shape: tuple[int, ...] | int = (),
        *,
        budget: Budget,
        row_sensitivity: float = 1.0,
        estimator: Estimator = "prefix",
        sampler: Sampler = "discrete",
        clip: Clip | None = None,
        adjacency: Adjacency = "replace",
        noise: Noise | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Check the arguments and make an empty tree; see the class."""
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
        one_of(self._owner, "estimator", estimator, get_args(Estimator))
        self.estimator: Estimator = estimator
        self._begin()

    def _design(self, horizon: int, budget: Budget) -> Design:
        step = exact(self.row_sensitivity)
        return tree_design(horizon, budget, step * step, step, self.estimator)

    def _settings(self) -> State:
        return super()._settings() | {"estimator": self.estimator}

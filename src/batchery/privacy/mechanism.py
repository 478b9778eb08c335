# SPDX-License-Identifier: Apache-2.0
r"""What every private mechanism shares: a horizon, a budget, a state, and the order of a crash.

A release leaves in three steps, so that no noise is ever drawn twice for it:

    release   the row is added, noise is drawn, the state moves on
    persist   `commit(state)` writes the state, the release and its noise in it
    publish   `update` returns

After a crash the last state written is loaded. What it had released and nobody has seen is in
`last()`; what had been published is never drawn again, because it was written before. A state that
is older than what was published would draw again, and is refused (`resume`).

What can be refused is refused before the first step. If anything raises after that, `commit` above
all, the mechanism goes back to the state before; without `commit` there is no such copy, and it
shows and releases nothing more until a state is loaded: a sum that has moved on without its noise
would give a row away.

A mechanism is for one thread: an update while another one runs is refused, and so is one that a
CUDA graph captures, whose replays would repeat the noise. Do not load a state meanwhile either.

The state holds the exact sums: it is as sensitive as the data. Messages never show values of rows.

A gaussian law has σ² = Δ₂² / (2ρ), a Laplace law b = Δ₁ / ε, both rounded up to few digits.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, get_args

import torch
from torch import Tensor

from batchery._core.state import check_fits
from batchery._core.validate import integer, one_of, require, require_type
from batchery.kernels.chacha import refuse_capture
from batchery.privacy.accounting import Budget
from batchery.privacy.law import NoiseKind
from batchery.privacy.noise import LARGEST, DiscreteNoise, round_up
from batchery.privacy.noise_rows import FloatNoise, Noise, Sampler
from batchery.privacy.saved_state import Misfit

State = dict[str, Any]
Commit = Callable[[State], object]


class HorizonExceeded(ValueError):
    """A mechanism was asked for more releases than it was made, and paid, for.

    Examples:
        >>> from batchery.privacy import TreeCounter
        >>> try:
        ...     TreeCounter(2, budget=Budget(rho=0.5)).update_many([1, 1, 1])
        ... except HorizonExceeded as error:
        ...     str(error)
        'TreeCounter: 3 more after 0 is beyond the horizon of 2'
    """


class Undrawable(ValueError):
    """A budget, for what one record can change, asks for more noise than is drawn exactly."""


def exact(value: float) -> Fraction:
    """Return a number as a fraction; a float that is no integer is made one rounding larger.

    So √3, given as a float a little below it, is taken for a number that is not below it.
    """
    fraction = Fraction(value)
    if isinstance(value, float) and fraction.denominator > 1:
        fraction *= 1 + Fraction(1, 1 << 50)
    return fraction


def calibrate(budget: Budget, squared_l2: Fraction, l1: Fraction) -> tuple[NoiseKind, Fraction]:
    """Return the law of the least noise that hides a change of this size within a budget.

    Args:
        budget: a pure one takes Laplace noise, others Gaussian noise.
        squared_l2: square of the L2 sensitivity.
        l1: the L1 sensitivity.

    Returns:
        (`"gaussian"`, σ²) or (`"laplace"`, b).
    """
    if budget.pure_epsilon is not None:
        return "laplace", round_up(l1 / Fraction(budget.pure_epsilon))
    return "gaussian", round_up(squared_l2 / (2 * Fraction(budget.rho)))


def tail(kind: NoiseKind, scale: float, terms: float, count: float, beta: float) -> float:
    """Return what sums of noise stay below, all `count` of them, with probability 1 - beta.

    By Chernoff's bound, which both the discrete and the continuous law obey.

    Args:
        kind: of the law.
        scale: σ², or the largest b.
        terms: variance of a sum, in variances σ² or 2b² of one term.
        count: number of sums.
        beta: β, in (0, 1).
    """
    log = math.log(2 * count / beta)
    if kind == "gaussian":
        return math.sqrt(2 * terms * scale * log)

    # E exp(s x) <= 1 / (1 - b² s²) for each term; the best s, where the bound stops to fall.
    def bound(s: float) -> float:
        return (log - terms * math.log1p(-s * s)) / s

    def falls(s: float) -> bool:
        return 2 * terms * s * s / (1 - s * s) + terms * math.log1p(-s * s) < log

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) else (low, middle)
    return scale * bound(max(low, 1e-12))


class Mechanism(ABC):
    """A private statistic of a stream, released after every row.

    Args:
        horizon: number of releases; None for a stream without end.
        budget: what all releases together may spend.
        sampler: `"discrete"` for exact integer noise, `"float"` for research.
        noise: draws the noise in place of the sampler's own; for tests.
        device: of the sums; noise is drawn there, exact noise if `DiscreteNoise` can.
        dtype: of float sums and noise: float16, bfloat16, float32 or float64.

    Attributes:
        t: number of releases so far.

    Raises:
        TypeError: the horizon is not an integer, the budget no `Budget`, or the dtype none.
        ValueError: the horizon is below 1, the budget 0, or the dtype not one of those.
    """

    def __init__(
        self,
        horizon: int | None,
        *,
        budget: Budget,
        sampler: Sampler,
        noise: Noise | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Check what all mechanisms are given; see the class."""
        if horizon is not None:
            horizon = int(integer(self._owner, "horizon", horizon, at_least=1))
        require_type(isinstance(budget, Budget), self._owner, "budget", "must be a Budget", budget)
        require(budget.rho > 0, self._owner, "budget", "must be > 0", budget)
        one_of(self._owner, "sampler", sampler, get_args(Sampler))
        is_dtype = isinstance(dtype, torch.dtype)
        require_type(is_dtype, self._owner, "dtype", "must be a torch.dtype", dtype)
        fits = sampler == "discrete" or dtype in _REAL
        rule = "must be float16, bfloat16, float32 or float64"
        require(fits, self._owner, "dtype", rule, dtype)
        self.horizon = horizon
        self.budget = budget
        self.sampler = sampler
        self.device = torch.device(device or "cpu")
        self.injected = noise is not None
        self.noise: Noise
        if noise is not None:
            self.noise = noise
        elif sampler == "discrete":
            self.noise = DiscreteNoise(device=self.device)
        else:
            self.noise = FloatNoise(device=self.device, dtype=dtype)
        self.dtype = torch.int64 if sampler == "discrete" else dtype
        self._cost = self._spendable(gaussian=True)
        self.t = 0
        self.redraws = 0
        self._torn = False  # a step was begun and not ended
        self._updating = threading.Lock()

    def __getstate__(self) -> State:
        """Leave the lock out of copies."""
        return {name: value for name, value in self.__dict__.items() if name != "_updating"}

    def __setstate__(self, kept: State) -> None:
        """Make one in its place."""
        self.__dict__.update(kept)
        self._updating = threading.Lock()

    def _spendable(self, *, gaussian: bool) -> Budget:
        """Return what releases may spend, when all of them are (or are not) Gaussian noise."""
        if gaussian and self.sampler == "float" and self.budget.pure_epsilon is None:
            return self.budget.for_gaussian()  # the exact line of μ is that of continuous noise
        # Whatever it was said to be: other noise of this ρ loses more than the line of μ.
        return self.budget if self.budget.pure_epsilon is not None else Budget(self.budget.rho)

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _require_drawable(self, largest: int) -> None:
        """Refuse a budget for which the exact sampler lacks digits, before anything moves.

        Args:
            largest: the numerator of a law's scale, or another number that has to fit.
        """
        if self.sampler == "discrete" and largest >= LARGEST:
            rule = "must ask for exact noise of less than 61 bits"
            raise Undrawable(f"{self._owner}: budget {rule}, got {self.budget!r}")

    def update(self, row: Any, *, commit: Commit | None = None) -> Any:
        """Add one row and return the release after it.

        Args:
            row: of the shape the mechanism was made for.
            commit: is given the new state, and must write it, before the release is returned. If it
                raises, the row is not added.

        Raises:
            HorizonExceeded: there is no release left; nothing has changed.
            TypeError, ValueError: the row has another shape, or entries of a kind or value that is
                forbidden; nothing has changed, and no message shows a value.
            RuntimeError: an update before was broken off in its middle, and no state loaded since;
                another one is running, in another thread or as the one that commits; or a CUDA
                graph is being captured. Nothing has changed.
        """
        checked = self._checked(row, many=False)
        self._require_room(1)
        return self._advance(1, lambda: self._step(checked), commit)

    def update_many(self, rows: Any, *, commit: Commit | None = None) -> Tensor:
        """Add rows one by one and return all releases, [n, …], as n calls of `update` would.

        Bit for bit, but that `"sqrt"` of rows of shape () multiplies in another order: some 10⁻¹⁵.

        Args:
            rows: [n, …].
            commit: is given the state after the last row, before the releases are returned.

        Raises:
            HorizonExceeded, RuntimeError, TypeError, ValueError: as `update`; no row is added.
        """
        checked = self._checked(rows, many=True)
        self._require_room(len(checked))
        releases: Tensor = self._advance(len(checked), lambda: self._steps(checked), commit)
        return releases

    def _advance(self, n: int, step: Callable[[], Any], commit: Commit | None) -> Any:
        """Take `n` steps and write the state; or go back, or stop for good."""
        refuse_capture(self._owner, self.device)
        if not self._updating.acquire(blocking=False):
            by = "by another thread or in its own commit"
            raise RuntimeError(f"{self._owner}: is being updated already, {by}")
        try:
            return self._advance_alone(n, step, commit)
        finally:
            self._updating.release()

    def _advance_alone(self, n: int, step: Callable[[], Any], commit: Commit | None) -> Any:
        self._require_whole()
        before = None if commit is None else self.state_dict()
        self._torn = True
        try:
            released = step()
            self.t += n
            self._torn = False
            if commit is not None:
                commit(self.state_dict())
        except BaseException:
            if before is not None:
                self.load_state_dict(before)
            raise
        return released

    def _require_whole(self) -> None:
        if self._torn:
            raise RuntimeError(
                f"{self._owner}: was broken off in the middle of a step; load a state"
            )

    def _require_room(self, n: int) -> None:
        if self.horizon is not None and self.t + n > self.horizon:
            raise HorizonExceeded(
                f"{self._owner}: {n} more after {self.t} is beyond the horizon of {self.horizon}"
            )

    def _as_rows(self, rows: Any, shape: tuple[int, ...], *, many: bool) -> Tensor:
        """Return rows as a tensor of the shape and kind that is promised, or raise."""
        name, lengths = ("rows", ["n >= 1", *shape]) if many else ("row", [*shape])
        try:
            tensor = torch.as_tensor(rows)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            # Without its cause, whose message is another's and might show what is in the row.
            message = f"{self._owner}: {name} must hold numbers of shape {lengths}"
            raise TypeError(f"{message}, got {type(rows).__name__}") from None
        found = tuple(tensor.shape)
        fits = found[1:] == shape and found[:1] > (0,) if many else found == shape
        require(fits, self._owner, name, f"must have shape {lengths}", [*found])
        discrete = self.sampler == "discrete"
        if tensor.is_complex() or (discrete and tensor.is_floating_point()):
            wanted = "integers with sampler='discrete'" if discrete else "real numbers"
            found_kind = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{self._owner}: {name} must hold {wanted}, got {found_kind}")
        return tensor.detach().to(self.device)

    @property
    def cost(self) -> Budget:
        """What all releases together may cost: the budget, as this noise spends it."""
        return self._cost

    @property
    def spent(self) -> Budget:
        """What the releases so far have cost, and a whole budget for every time of redrawing."""
        return self._cost.share(self.fraction() + self.redraws)

    def last(self) -> Any:
        """Return the last release again, at no cost; None before the first."""
        self._require_whole()
        return self._last() if self.t else None

    @abstractmethod
    def error_bound(self, beta: float) -> float:
        """Return what no release misses the truth by, with probability 1 - beta."""

    @abstractmethod
    def expected_squared_error(self) -> float | None:
        """Return the mean over the releases of the variance of noise; None where it has none."""

    @abstractmethod
    def _checked(self, rows: Any, *, many: bool) -> Tensor: ...

    @abstractmethod
    def _step(self, row: Tensor) -> Any: ...

    @abstractmethod
    def _steps(self, rows: Tensor) -> Tensor: ...

    @abstractmethod
    def _last(self) -> Any: ...

    @abstractmethod
    def fraction(self) -> float:
        """Return the part of the budget that the releases so far have spent."""

    @abstractmethod
    def _settings(self) -> State:
        """Return plain values that must agree between a saved state and its loader."""

    @abstractmethod
    def _inner_state(self) -> State: ...

    @abstractmethod
    def _load_inner(self, state: State, t: int) -> None: ...

    def _all_settings(self) -> State:
        return {
            "class": self._owner,
            "horizon": self.horizon,
            "budget": repr(self.budget),
            "sampler": self.sampler,
        } | self._settings()

    def state_dict(self) -> State:
        """Return the whole state: tensors and plain values. It is as sensitive as the data."""
        self._require_whole()
        position = self.noise.state() if isinstance(self.noise, _OWN) else None
        return {
            "settings": self._all_settings(),
            "t": self.t,
            "redraws": self.redraws,
            "inner": self._inner_state(),
            "noise": position,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, with the noise already in it.

        Raises:
            TypeError: it is no mapping.
            ValueError: it is no such state, or one of other settings; both values are named. The
                mechanism is where it was.
        """
        self._require_state(state_dict)
        before = None if self._torn else self.state_dict()
        self._torn = True
        try:
            self._load(state_dict)
        except BaseException as error:
            if before is not None:
                self._load(before)
            if isinstance(error, Misfit):
                raise ValueError(f"{self._owner}: state_dict must hold {error}") from None
            if isinstance(error, KeyError | TypeError | RuntimeError | AttributeError):
                lack = f"no {error}" if isinstance(error, KeyError) else type(error).__name__
                message = f"{self._owner}: state_dict must hold a whole 'inner' and 'noise'"
                raise ValueError(f"{message}, got {lack}") from error
            raise

    def _require_state(self, state: Mapping[str, Any]) -> None:
        """Refuse what is no state of such a mechanism."""
        is_mapping = isinstance(state, Mapping)
        require_type(is_mapping, self._owner, "state_dict", "must be a mapping", state)
        for name in ("settings", "t", "redraws", "inner", "noise"):
            require(name in state, self._owner, "state_dict", f"must hold {name!r}", "none")
        for name in ("t", "redraws"):
            integer(self._owner, f"state_dict[{name!r}]", state[name], at_least=0)
        if self.horizon is not None:
            rule, fits = f"must be <= {self.horizon}, the horizon", state["t"] <= self.horizon
            require(fits, self._owner, "state_dict['t']", rule, state["t"])
        for name in ("settings", "inner"):
            rule, is_mapping = "must be a mapping", isinstance(state[name], Mapping)
            require_type(is_mapping, self._owner, f"state_dict[{name!r}]", rule, state[name])
        check_fits(self._owner, state["settings"], self._all_settings())

    def _load(self, state: Mapping[str, Any]) -> None:
        t = int(state["t"])
        self._load_inner(state["inner"], t)
        if isinstance(self.noise, _OWN):  # last, for rows of noise move it when they are loaded
            self.noise.load(state["noise"])
        self.t, self.redraws = t, int(state["redraws"])
        self._torn = False

    def resume(self, state: Mapping[str, Any], *, published: int, strict: bool = True) -> None:
        """Load a state after a crash, knowing how many releases the world has seen.

        Args:
            state: the last one that was written.
            published: number of releases that have been published.
            strict: refuse a state that is behind them. Otherwise they are drawn again, with other
                noise unless its seed or generator was given, and `spent` grows by a whole budget.

        Raises:
            TypeError, ValueError: the state is behind what was published, and `strict`; or as
                `load_state_dict`.
        """
        integer(self._owner, "published", published, at_least=0)
        self._require_state(state)
        behind = int(state["t"]) < published
        if strict:
            rule = f"must be <= {state['t']}, where the state is: it would draw noise again"
            require(not behind, self._owner, "published", rule, published)
        self.load_state_dict(state)
        self.redraws += behind

    def __repr__(self) -> str:
        """Show the settings, the position, and a warning when the noise is somebody's own."""
        shown = [f"{name}={value!r}" for name, value in self._settings().items()]
        warning = ", WARNING: injected noise, not private" if self.injected else ""
        return (
            f"{self._owner}({self.horizon}, {', '.join(shown)}, budget={self.budget!r}, "
            f"sampler={self.sampler!r}, at={self.t}{warning})"
        )


_OWN = (DiscreteNoise, FloatNoise)
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

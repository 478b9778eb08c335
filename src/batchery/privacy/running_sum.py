# SPDX-License-Identifier: Apache-2.0
"""Noisy running sums and the designs they come from; what every counter is made of.

A design is data-independent arithmetic: which law of noise, and the variance of every release. It
begins running sums, which hold the state. `DoublingDesign` makes one without a horizon from designs
with one; the formulas are in `batchery.privacy.counters`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from batchery.privacy.law import NoiseKind
from batchery.privacy.noise_rows import Noise, NoiseRows
from batchery.privacy.saved_state import fill_, same_step


@dataclass(frozen=True)
class Place:
    """Where a running sum lives.

    Attributes:
        noise: what draws its noise.
        shape: of a row.
        device: of sums and noise.
        dtype: of the exact sum.
    """

    noise: Noise
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def rows(self, kind: NoiseKind, scale: Fraction) -> NoiseRows:
        """Return rows of noise of a law."""
        return NoiseRows(self.noise, kind, scale, self.shape, self.device)

    def zeros(self, *lengths: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros of shape [*lengths, *shape]."""
        shape = (*lengths, *self.shape)
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)


class RunningSum(Protocol):
    """A noisy running sum."""

    @property
    def total(self) -> Tensor:
        """The sum, as exact as it is known."""

    def step(self, row: Tensor) -> Tensor:
        """Add a row and return the release."""

    def steps(self, rows: Tensor) -> Tensor:
        """Add rows and return the releases, as so many steps would."""

    def last(self) -> Tensor:
        """Return the last release again."""

    def state(self) -> dict[str, Any]:
        """Return what a resume needs."""

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""


class Design(Protocol):
    """A law of noise and what it does to the releases; depends on no data."""

    @property
    def name(self) -> str:
        """What it is, in a word."""

    @property
    def kind(self) -> NoiseKind:
        """Law of the noise."""

    def largest_scale(self, t: int) -> Fraction:
        """Return the largest σ² or b of any noise in the releases up to `t`."""

    def variance(self, t: int) -> float:
        """Return the variance of one entry of release `t`; of a discrete law an upper bound."""

    def worst(self, t: int) -> float:
        """Return the largest variance of a release up to `t`."""

    def mean(self, t: int) -> float:
        """Return the mean variance of the releases up to `t`."""

    def fraction(self, t: int) -> float:
        """Return the part of the budget that the releases up to `t` spend."""

    def begin(self, place: Place) -> RunningSum:
        """Return a running sum of no rows."""


def law_variance(kind: NoiseKind, scale: Fraction) -> float:
    """Return the variance of a law, of a discrete one an upper bound."""
    return float(scale if kind == "gaussian" else 2 * scale * scale)


class PrefixNoise(Protocol):
    """Noise of the releases of a running sum, step by step."""

    def step(self) -> Tensor:
        """Return the noise of the next release; valid until the next call."""

    def steps(self, n: int) -> Tensor:
        """Return the noise of the next `n` releases, [n, …]."""

    def last(self) -> Tensor:
        """Return the noise of the last release again."""

    def state(self) -> dict[str, Any]:
        """Return what a resume needs."""

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""


class NoisySum:
    """An exact running sum, and noise that is added to each of its releases.

    Args:
        noise: of the releases.
        place: where the sum lives.
    """

    def __init__(self, noise: PrefixNoise, place: Place) -> None:
        """Start at zero; see the class."""
        self.noise = noise
        self.total = place.zeros()

    def step(self, row: Tensor) -> Tensor:
        """Add a row and return the release."""
        noise = self.noise.step()
        self.total.add_(row)
        return self.total + noise

    def steps(self, rows: Tensor) -> Tensor:
        """Add rows and return the releases, as so many steps would."""
        noise = self.noise.steps(len(rows))
        sums = torch.empty(rows.shape, dtype=self.total.dtype, device=self.total.device)
        if sums.dtype == torch.int64:
            torch.cumsum(rows, 0, out=sums)
            sums += self.total
        else:  # in the order of single steps: sums of floats depend on it
            before = self.total
            for row, place in zip(rows, sums, strict=True):
                before = torch.add(before, row, out=place)
        self.total.copy_(sums[-1])
        return sums.add_(noise)

    def last(self) -> Tensor:
        """Return the last release again."""
        return self.total + self.noise.last()

    def state(self) -> dict[str, Any]:
        """Return the sum and the state of the noise."""
        return {"total": self.total.clone(), "noise": self.noise.state()}

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        fill_(self.total, state, "total")
        self.noise.load(state["noise"], t)


@dataclass(frozen=True)
class DoublingDesign:
    """A running sum without a horizon: epoch e has 2^e rows and a running sum of its own.

    Attributes:
        make: makes the design of an epoch of so many rows, with half the budget.
        kind: law of the noise on the totals of epochs past, with the other half.
        total_scale: its scale.
    """

    make: Callable[[int], Design]
    kind: NoiseKind
    total_scale: Fraction

    @property
    def name(self) -> str:
        """What the epochs are."""
        return self.make(1).name

    def largest_scale(self, t: int) -> Fraction:
        """Return the largest scale up to `t`: that of the last epoch, or of the totals."""
        return max(self.total_scale, self.make(1 << epoch_of(t)).largest_scale(t))

    def variance(self, t: int) -> float:
        """Return the variance of one entry of release `t`."""
        epoch = epoch_of(t)
        inner = self.make(1 << epoch).variance(t + 1 - (1 << epoch))
        return epoch * law_variance(self.kind, self.total_scale) + inner

    def worst(self, t: int) -> float:
        """Return the largest variance of a release up to `t`."""
        past = law_variance(self.kind, self.total_scale)
        return max(epoch * past + self.make(1 << epoch).worst(count) for epoch, count in _epochs(t))

    def mean(self, t: int) -> float:
        """Return the mean variance of the releases up to `t`."""
        past = law_variance(self.kind, self.total_scale)
        parts = (
            count * (epoch * past + self.make(1 << epoch).mean(count))
            for epoch, count in _epochs(t)
        )
        return sum(parts) / t

    def fraction(self, t: int) -> float:
        """Return the part of the budget that the first row has spent by step `t`."""
        return 1.0 if t > 1 else 0.5

    def begin(self, place: Place) -> RunningSum:
        """Return a running sum of no rows."""
        return DoublingSum(self, place)


class DoublingSum:
    """The running sum of a `DoublingDesign`.

    Args:
        design: of the epochs.
        place: where the sums live.
    """

    def __init__(self, design: DoublingDesign, place: Place) -> None:
        """Open the first epoch; see the class."""
        self.design = design
        self.place = place
        self.t = 0
        self.past = place.zeros()
        self.noise = place.rows(design.kind, design.total_scale)
        self.inner = design.make(1).begin(place)

    @property
    def total(self) -> Tensor:
        """The noisy total of past epochs and the exact one of this."""
        return self.past + self.inner.total

    def _turn(self) -> None:
        """Close an epoch that is full, and open the next."""
        if self.t and (self.t + 1) & self.t == 0:
            self.past = self.past + self.inner.total + self.noise.take(1)[0]
            self.inner = self.design.make(self.t + 1).begin(self.place)

    def step(self, row: Tensor) -> Tensor:
        """Add a row and return the release."""
        self._turn()
        self.t += 1
        return self.past + self.inner.step(row)

    def steps(self, rows: Tensor) -> Tensor:
        """Add rows and return the releases, as so many steps would."""
        found = []
        while len(rows):
            self._turn()
            now = rows[: (2 << epoch_of(self.t + 1)) - 1 - self.t]
            found.append(self.past + self.inner.steps(now))
            self.t += len(now)
            rows = rows[len(now) :]
        return torch.cat(found)

    def last(self) -> Tensor:
        """Return the last release again."""
        return self.past + self.inner.last()

    def state(self) -> dict[str, Any]:
        """Return the noisy past and the state of the epoch."""
        return {
            "t": self.t,
            "past": self.past.clone(),
            "inner": self.inner.state(),
            "noise": self.noise.state(),
        }

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        self.t = same_step(state, t)
        fill_(self.past, state, "past")
        rows = 1 << epoch_of(max(t, 1))
        self.inner = self.design.make(rows).begin(self.place)
        self.inner.load(state["inner"], t + 1 - rows)
        self.noise.load(state["noise"])


def epoch_of(t: int) -> int:
    """Return the epoch of step `t`, ⌊log2 t⌋."""
    return t.bit_length() - 1


def _epochs(t: int) -> list[tuple[int, int]]:
    """List every epoch up to step `t` with its number of steps."""
    return [(e, min(1 << e, t + 1 - (1 << e))) for e in range(epoch_of(t) + 1)]

# SPDX-License-Identifier: Apache-2.0
"""Lower-triangular Toeplitz strategies C of a running sum, and the noise that they make.

A strategy gives the first column of C and of B = A C⁻¹, where A sums, and runs B z step by step.
The formulas and their sources are in `batchery.privacy.factorisation`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchery.privacy.running_sum import Place, PrefixNoise
from batchery.privacy.saved_state import fill_, same_step

Column = npt.NDArray[np.float64]
_BASE = 64  # steps that are multiplied directly; longer reaches go by FFT


def sqrt_coefficients(n: int) -> Column:
    """Return the first column of the square root of A, f_k = C(2k, k) / 4^k, k < n.

    Examples:
        >>> sqrt_coefficients(4).tolist()
        [1.0, 0.5, 0.375, 0.3125]
    """
    k = np.arange(1, n)
    return np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])


def recovery_coefficients(column: Column, n: int) -> Column:
    """Return the first column of B = A C⁻¹ from that of C, by Newton's iteration on 1/c(x).

    Args:
        column: of C, beginning with 1; entries it lacks are 0.
        n: length of the result.
    """
    column = np.pad(column[:n], (0, max(0, n - len(column))))
    inverse = np.ones(1)
    while len(inverse) < n:
        size = min(2 * len(inverse), n)
        length = 1 << (2 * size).bit_length()
        ahead = np.fft.rfft(inverse, length)
        product = np.fft.irfft(np.fft.rfft(column[:size], length) * ahead, length)[:size]
        product = np.fft.irfft(np.fft.rfft(product, length) * ahead, length)[:size]
        inverse = 2 * np.pad(inverse, (0, size - len(inverse))) - product
    return np.cumsum(inverse)


def squared_sensitivity(column: Column, participations: int = 1, separation: int = 1) -> float:
    """Return the largest ‖C u‖² over u that is at most 1 in norm at the steps of one record.

    For a column that is nonnegative and does not increase, the worst steps are the first ones,
    as close as they may be (Kalinin and Lampert); for another, the triangle inequality is used.

    Args:
        column: first column of C, of the length of the horizon.
        participations: number of steps that one record, or user, is in.
        separation: least distance of two of them.
    """
    if participations > 1 and np.any(np.diff(column) > 0):
        return participations**2 * float(column @ column)
    total = np.zeros_like(column)
    for start in range(0, min(len(column), participations * separation), separation):
        total[start:] += column[: len(column) - start]
    return float(total @ total)


class Strategy(Protocol):
    """A matrix C with ones on its diagonal."""

    @property
    def name(self) -> str:
        """What `FactorizationCounter` calls it."""

    def __hash__(self) -> int:
        """Strategies are values."""

    def column(self, n: int) -> Column:
        """Return the first n entries of the first column of C."""

    def recovery(self, n: int) -> Column:
        """Return the first n entries of the first column of B."""

    def noise(self, horizon: int, scale: Fraction, place: Place) -> PrefixNoise:
        """Return B z, step by step, for Gaussian z of variance `scale`."""


@dataclass(frozen=True)
class SquareRoot:
    """C = B = the square root of A: all past noise is kept."""

    name: ClassVar[str] = "sqrt"

    def column(self, n: int) -> Column:
        """Return the first n entries of the first column of C."""
        return sqrt_coefficients(n)

    def recovery(self, n: int) -> Column:
        """Return the first n entries of the first column of B."""
        return sqrt_coefficients(n)

    def noise(self, horizon: int, scale: Fraction, place: Place) -> PrefixNoise:
        """Return B z, step by step."""
        return SquareRootNoise(horizon, scale, place)


@dataclass(frozen=True)
class Banded:
    """The first diagonals of the square root: as many rows of noise are kept, less one.

    Attributes:
        bands: number of diagonals.
    """

    name: ClassVar[str] = "banded"
    bands: int

    def column(self, n: int) -> Column:
        """Return the first n entries of the first column of C."""
        kept = sqrt_coefficients(min(self.bands, n))
        return np.pad(kept, (0, n - len(kept)))

    def recovery(self, n: int) -> Column:
        """Return the first n entries of the first column of B."""
        return recovery_coefficients(sqrt_coefficients(min(self.bands, n)), n)

    def noise(self, horizon: int, scale: Fraction, place: Place) -> PrefixNoise:
        """Return B z, step by step."""
        return BandedNoise(min(self.bands, horizon), scale, place)


@dataclass(frozen=True)
class Buffered:
    """A few decaying buffers: the first column of C is 1, then Σ_j weight_j · decay_j^(k-1).

    Attributes:
        decays: of the buffers, each in (0, 1).
        weights: of the buffers, each above 0.
    """

    name: ClassVar[str] = "blt"
    decays: tuple[float, ...]
    weights: tuple[float, ...]

    def column(self, n: int) -> Column:
        """Return the first n entries of the first column of C."""
        found, k = np.zeros(n), np.arange(n - 1, dtype=np.float64)
        for decay, weight in zip(self.decays, self.weights, strict=True):
            found[1:] += weight * np.exp(k * math.log(decay))
        found[0] = 1
        return found

    def recovery(self, n: int) -> Column:
        """Return the first n entries of the first column of B."""
        return recovery_coefficients(self.column(n), n)

    def noise(self, horizon: int, scale: Fraction, place: Place) -> PrefixNoise:
        """Return B z, step by step."""
        return BufferedNoise(self, scale, place)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def fit_buffers(horizon: int, buffers: int) -> Buffered:
    """Return the buffers that make the worst variance of a release least.

    That is ‖first column of C‖² · ‖last row of B‖², both in closed form: the response of C⁻¹ has
    the eigenvalues of diag(decays) - √w √wᵀ for decays. Four buffers come within 1 % of the square
    root up to a horizon of 65 536, and within 4 % at a million.

    Args:
        horizon: T.
        buffers: their number; more than log2 T + 1 are not used.
    """
    horizon = max(2, horizon)
    count = min(buffers, horizon.bit_length())
    # The square root is a mixture of decays 1 - s of density s^(-1/2) / π: begin with its parts.
    step = math.log(horizon) / count
    s = torch.exp(-step * (torch.arange(count, dtype=torch.float64) + 0.5))
    weights = s.sqrt() * step / math.pi
    weights *= min(1.0, 0.5 / float(weights.sum()))
    place = torch.stack([-torch.logit(s.clamp(max=0.9)), torch.log(weights)]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [place],
        max_iter=100,
        tolerance_grad=1e-10,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _log_worst_variance(*_unpack(place), horizon)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    decays, weights = _unpack(place.detach())
    return Buffered(tuple(decays.tolist()), tuple(weights.tolist()))


def _unpack(place: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(place[0]), torch.exp(place[1])


def _log_worst_variance(decays: Tensor, weights: Tensor, horizon: int) -> Tensor:
    pairs = decays[:, None] * decays
    column = 1 + (weights[:, None] * weights * _geometric(pairs, horizon - 1)).sum()
    root = weights.sqrt()
    poles, basis = torch.linalg.eigh(torch.diag(decays) - root[:, None] * root)
    # b_k = level + Σ_j part_j · pole_j^k
    parts = (root @ basis).square() / (1 - poles)
    level = 1 - parts.sum()
    row = (
        level.square() * horizon
        + 2 * level * (parts * _geometric(poles, horizon)).sum()
        + (parts[:, None] * parts * _geometric(poles[:, None] * poles, horizon)).sum()
    )
    return torch.log(column) + torch.log(row)


def _geometric(ratio: Tensor, n: int) -> Tensor:
    """Return 1 + ratio + … + ratio^(n-1)."""
    return (1 - ratio**n) / (1 - ratio)


class SquareRootNoise:
    """B z for the square root, by a convolution that goes on as noise comes in.

    A block of the last 2^j rows of z, 2^j the lowest set bit of t, reaches the next 2^j releases by
    FFT; every pair of a row and a later release is met once. Within 64 steps the product is direct.

    Args:
        horizon: T; rows of z that are kept.
        scale: σ².
        place: where they are kept, twice.
    """

    def __init__(self, horizon: int, scale: Fraction, place: Place) -> None:
        """Make room for the horizon; see the class."""
        self.rows = place.rows("gaussian", scale)
        self.horizon = horizon
        self.z = place.zeros(horizon)
        self.ahead = place.zeros(horizon)  # of every release, what came from earlier blocks
        column = torch.from_numpy(sqrt_coefficients(2 * horizon))
        self.column = column.to(place.device, place.dtype)
        k = torch.arange(_BASE)
        lags = (k[:, None] - k).clamp(min=0)
        padded = torch.cat([column, column.new_zeros(_BASE)])
        self.direct = padded[lags].tril().to(place.device, place.dtype)
        self.t = 0

    def step(self) -> Tensor:
        """Return the noise of the next release; valid until the next call."""
        return self.steps(1)[0]

    def steps(self, n: int) -> Tensor:
        """Return the noise of the next `n` releases, [n, …]."""
        found, end = [], self.t + n
        while self.t < end:
            begin = self.t // _BASE * _BASE
            stop = min(end, begin + _BASE)
            self.z[self.t : stop] = self.rows.take(stop - self.t)
            matrix = self.direct[self.t - begin : stop - begin, : stop - begin]
            near = torch.tensordot(matrix, self.z[begin:stop], 1)
            found.append(self.ahead[self.t : stop].add_(near))
            self.t = stop
            if stop % _BASE == 0 and stop < self.horizon:
                self._reach(stop & -stop)
        return torch.cat(found)

    def _reach(self, size: int) -> None:
        block = torch.fft.rfft(self.z[self.t - size : self.t], 2 * size, dim=0)
        column = torch.fft.rfft(self.column[: 2 * size], 2 * size)
        block *= column.reshape(-1, *(1,) * (block.ndim - 1))
        reached = torch.fft.irfft(block, 2 * size, dim=0)[size:]
        room = self.ahead[self.t : self.t + size]
        room += reached[: len(room)]

    def last(self) -> Tensor:
        """Return the noise of the last release again."""
        return self.ahead[self.t - 1]

    def state(self) -> dict[str, Any]:
        """Return all past noise, what it adds to releases to come, and the source's position."""
        return {
            "t": self.t,
            "z": self.z[: self.t].clone(),
            "ahead": self.ahead[max(0, self.t - 1) :].clone(),
            "rows": self.rows.state(),
        }

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        self.t = same_step(state, t)
        fill_(self.z[:t], state, "z")
        fill_(self.ahead[max(0, t - 1) :], state, "ahead")
        self.rows.load(state["rows"])


class IncrementNoise(ABC):
    """B z as the running sum of y = C⁻¹ z; what banded and buffered noise share.

    Args:
        scale: σ².
        place: where the state is kept.
        kept: number of rows that C⁻¹ remembers.
    """

    def __init__(self, scale: Fraction, place: Place, kept: int) -> None:
        """Remember nothing yet; see the class."""
        self.rows = place.rows("gaussian", scale)
        self.sum = place.zeros()
        self.kept = place.zeros(kept)
        self.t = 0

    @abstractmethod
    def _solve(self, z: Tensor) -> Tensor:
        """Return y = C⁻¹ z at the next row z."""

    def step(self) -> Tensor:
        """Return the noise of the next release; valid until the next call."""
        return self._add(self.rows.take(1)[0])

    def steps(self, n: int) -> Tensor:
        """Return the noise of the next `n` releases, [n, …]."""
        return torch.stack([self._add(z).clone() for z in self.rows.take(n)])

    def _add(self, z: Tensor) -> Tensor:
        self.sum.add_(self._solve(z.to(self.sum.dtype)))
        self.t += 1
        return self.sum

    def last(self) -> Tensor:
        """Return the noise of the last release again."""
        return self.sum

    def state(self) -> dict[str, Any]:
        """Return the sum, what is remembered, and where the next row comes from."""
        return {
            "t": self.t,
            "sum": self.sum.clone(),
            "kept": self.kept.clone(),
            "rows": self.rows.state(),
        }

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        self.t = same_step(state, t)
        fill_(self.sum, state, "sum")
        fill_(self.kept, state, "kept")
        self.rows.load(state["rows"])


class BandedNoise(IncrementNoise):
    """y_t = z_t - Σ_{0<k<w} f_k y_{t-k}; the last w - 1 of y are kept, in a ring.

    Args:
        bands: w.
        scale: σ².
        place: where the state is kept.
    """

    def __init__(self, bands: int, scale: Fraction, place: Place) -> None:
        """Remember nothing yet; see the class."""
        super().__init__(scale, place, bands - 1)
        column = torch.from_numpy(sqrt_coefficients(bands)[1:].copy())
        self.column = column.to(place.device, place.dtype).flip(0)  # oldest first

    def _solve(self, z: Tensor) -> Tensor:
        length = len(self.kept)
        if not length:
            return z
        at = self.t % length  # the oldest, which is replaced
        y: Tensor = z - torch.tensordot(self.column.roll(at), self.kept, 1)
        self.kept[at] = y
        return y


class BufferedNoise(IncrementNoise):
    """y_t = z_t - Σ_j weight_j s_j, then s_j ← decay_j s_j + y_t.

    Args:
        strategy: decays and weights.
        scale: σ².
        place: where the state is kept.
    """

    def __init__(self, strategy: Buffered, scale: Fraction, place: Place) -> None:
        """Remember nothing yet; see the class."""
        super().__init__(scale, place, len(strategy.decays))
        decays, weights = torch.tensor([strategy.decays, strategy.weights], dtype=torch.float64)
        shape = (-1, *(1,) * len(place.shape))
        self.decays = decays.reshape(shape).to(place.device, place.dtype)
        self.weights = weights.to(place.device, place.dtype)

    def _solve(self, z: Tensor) -> Tensor:
        y: Tensor = z - torch.tensordot(self.weights, self.kept, 1)
        self.kept.mul_(self.decays).add_(y)
        return y

    def state(self) -> dict[str, Any]:
        """Return the buffers with their decays and weights: a fit elsewhere may differ a little."""
        return super().state() | {"decays": self.decays.clone(), "weights": self.weights.clone()}

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        super().load(state, t)
        fill_(self.decays, state, "decays")
        fill_(self.weights, state, "weights")

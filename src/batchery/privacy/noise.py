# SPDX-License-Identifier: Apache-2.0
r"""Exact discrete Gaussian and Laplace noise, and exact choice, from integers and bits alone.

Use it for whatever leaves the private side as an integer. Noise in floating point has gaps and
roundings from which the value under it can be read (Mironov 2012), and rounding it afterwards does
not heal that. Timing is not hidden: how long a draw takes depends a little on what was drawn.

With φ(x) = x²/(2σ²) or |x|/b rational, P(x) ∝ exp(-φ(x)) over all integers is sampled as x = ±m:

    m = k s + r, s a power of two, 0 <= r < s       s = 1 below a scale of some hundreds
    k    by inversion of F(k) ∝ Σ_{j<=k} exp(-φ(js)), 63 random bits against ⌊2^63 F⌋;
         where they are equal, 64 bits more of both, and so on
    r    uniform, kept with probability exp(-(φ(ks+r) - φ(ks)))
    sign one bit; -0 is drawn again

On a CUDA device the words of narrow laws come from a cipher, and are searched for there: see
`batchery.privacy.device_noise`.

Bernoulli(exp(-γ)) for rational γ <= 1 is the parity of the first failure among Bernoulli(γ/i),
i = 1, 2, …; for larger γ, that of 1 as often as γ holds it, and of what is left.

Reference: Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020,
arXiv 2004.00010; Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012.

Where we differ: the paper rejects from the discrete Laplace law, some fifteen random words a
sample; inversion needs one up to σ = 256 or b = 32, and three above, where r is drawn too. Its
table is as exact, being compared bit by bit until it decides.
"""

import os
import warnings
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batchery._core.validate import integer, one_of, require, require_type
from batchery.privacy.device_noise import can_draw, draw_on
from batchery.privacy.law import BITS, Ints, Law, NoiseKind, Source, Words, cumulative, resolve

Bools = npt.NDArray[np.bool_]

LARGEST = 1 << 61  # of a wide scale's numerator: products with it stay within words
_ENTRIES = {"gaussian": 256, "laplace": 32}  # of a table, per unit of the coarse scale
_CHUNK = 1 << 14  # samples whose words stay in the cache


class BitSource:
    """Uniform integers from the operating system's entropy.

    Args:
        insecure_seed: for tests only: a reproducible and therefore worthless stream. It warns.

    Examples:
        >>> source = BitSource()
        >>> bool((source.below(6, 100) < 6).all())
        True
    """

    def __init__(self, *, insecure_seed: int | None = None) -> None:
        """Open the source; see the class."""
        self.insecure_seed = insecure_seed
        self._used = 0
        self._generator: np.random.PCG64 | None = None
        if insecure_seed is not None:
            integer("BitSource", "insecure_seed", insecure_seed, at_least=0)
            warnings.warn("noise from insecure_seed protects nobody: for tests only", stacklevel=2)
            self._generator = np.random.PCG64(insecure_seed)

    def words(self, n: int) -> Words:
        """Return `n` uniform 64-bit words."""
        if self._generator is None:
            return np.frombuffer(os.urandom(8 * n), dtype=np.uint64)
        self._used += n
        return self._generator.random_raw(n)

    def below(self, bound: int, n: int) -> Words:
        """Return `n` uniform integers in [0, bound), 1 <= bound <= 2^63."""
        if bound & (bound - 1) == 0:
            return self.words(n) & np.uint64(bound - 1)
        limit = np.uint64((1 << 64) // bound * bound - 1)  # the last word of a whole round
        found = self.words(n)
        while (late := np.flatnonzero(found > limit)).size:
            found = found.copy()
            found[late] = self.words(late.size)
        return found % np.uint64(bound)

    def state(self) -> dict[str, int] | None:
        """Return the position of a seeded source; entropy has none."""
        if self._generator is None or self.insecure_seed is None:
            return None
        return {"insecure_seed": self.insecure_seed, "used": self._used}

    def load(self, state: dict[str, int] | None) -> None:
        """Go to a position of a source with the same seed.

        Raises:
            ValueError: the state is that of another seed, or of entropy.
        """
        seed = None if state is None else state["insecure_seed"]
        rule = f"must be that of the saved source, {seed}"
        require(seed == self.insecure_seed, "BitSource", "insecure_seed", rule, self.insecure_seed)
        if state is not None and seed is not None:
            self._generator = np.random.PCG64(seed)
            self._generator.advance(state["used"])
            self._used = state["used"]


def bernoulli_exp(numerators: Words, denominator: int, source: Source) -> Bools:
    """Draw True with probability exp(-numerator / denominator), exactly.

    Args:
        numerators: uint64 [n], below 2^63.
        denominator: in [1, 2^62].
        source: of the randomness.

    Returns:
        Bool array [n].
    """
    whole = numerators // np.uint64(denominator)
    result = _bernoulli_exp_below_one(numerators % np.uint64(denominator), denominator, source)
    alive = np.flatnonzero(result & (whole > 0))
    turn = 0
    while alive.size:  # one factor exp(-1) a turn, for those whose exponent still holds it
        turn += 1
        passed = _bernoulli_exp_below_one(np.ones(alive.size, np.uint64), 1, source)
        result[alive[~passed]] = False
        alive = alive[passed & (whole[alive] > turn)]
    return result


def _bernoulli_exp_below_one(numerators: Words, denominator: int, source: Source) -> Bools:
    result = np.ones(numerators.shape, np.bool_)
    alive = np.arange(numerators.size)
    divisor = 1
    while alive.size:
        # Bernoulli(γ/i) as Bernoulli(γ) and Bernoulli(1/i), so that no product can overflow.
        go_on = source.below(denominator, alive.size) < numerators[alive]
        alive = alive[go_on]
        if divisor > 1 and alive.size:
            alive = alive[source.below(divisor, alive.size) == 0]
        result[alive] ^= True  # the parity of the trials that went on
        divisor += 1
    return result


def law_of(kind: NoiseKind, scale: Fraction) -> Law:
    """Return a law with the step of its table on the CPU; see `DiscreteNoise.sample`."""
    one_of("draw", "kind", kind, _ENTRIES)
    rational = isinstance(scale, int | Fraction) and not isinstance(scale, bool)
    require_type(rational, "draw", "scale", "must be an int or a Fraction", scale)
    require(scale > 0, "draw", "scale", "must be > 0", scale)
    # In steps of the table σ, or b, is at most _ENTRIES; of the Gaussian law σ² is given.
    limit = _ENTRIES[kind]
    step = 1
    while scale > (limit * step if kind == "laplace" else (limit * step) ** 2):
        step *= 2
    law = Law(kind, Fraction(scale), step)
    if step > 1:
        small = law.scale.numerator < LARGEST
        require(small, "draw", "scale", "must have a numerator below 2^61", scale)
    return law


@lru_cache(maxsize=64)
def _table(law: Law) -> Words:
    return np.array(cumulative(law, BITS), np.uint64)


def _some(law: Law, table: Words, n: int, source: Source) -> Ints:
    """Make `n` trials and return those that were kept, in their order."""
    words = source.words(n)
    uniform = words >> np.uint64(1)
    k = np.searchsorted(table, uniform, side="right").astype(np.int64, copy=False)
    for at in np.flatnonzero(table[k - 1] == uniform):
        k[at] = resolve(law, int(uniform[at]), BITS, source)
    minus = (words & np.uint64(1)).view(np.int64)
    if law.step > 1:
        fine = source.below(law.step, n).view(np.int64)
        coarse = k * law.step
        magnitude = coarse + fine
        keep = bernoulli_exp(*law.extra(coarse, fine), source)
        keep &= (magnitude | (1 - minus)) != 0
    else:
        magnitude = k
        keep = (magnitude | (1 - minus)) != 0
    return ((magnitude ^ -minus) + minus)[keep]


class DiscreteNoise:
    """Exact integer noise.

    On a CUDA device it is drawn there, of scales up to σ = 4096 or b = 512. That of wider laws, or
    with a seed, or without Triton, is drawn on the CPU and moved: slower, and the same law.

    Args:
        device: of the noise, which then comes as tensors; without one, as arrays.
        insecure_seed: for tests only; see `BitSource`. It draws the same on every device.

    Examples:
        >>> noise = DiscreteNoise()
        >>> z = noise.sample("gaussian", Fraction(9), (2, 3))
        >>> z.dtype, z.shape
        (dtype('int64'), (2, 3))
    """

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        insecure_seed: int | None = None,
    ) -> None:
        """Open the source of bits; see the class."""
        self.device = None if device is None else torch.device(device)
        self.source = BitSource(insecure_seed=insecure_seed)

    def sample(self, kind: NoiseKind, scale: Fraction, shape: tuple[int, ...]) -> Any:
        """Draw independent integers.

        Args:
            kind: `"gaussian"` or `"laplace"`.
            scale: the variance parameter σ² of the Gaussian law (its variance is a little
                less), or b of the Laplace law; an int or a Fraction, > 0.
            shape: of the result.

        Returns:
            int64 array of that shape, or with a device a tensor there.

        Raises:
            TypeError: the scale is a float, which would not be the number that was meant.
            ValueError: it is not positive, or above 256 with a numerator of 2^61 or more.
        """
        law = law_of(kind, scale)
        if self.device is None:
            return draw(law, shape, self.source)
        if self.source.insecure_seed is None and can_draw(law, self.device):
            return draw_on(self.device, law, shape, self.source)
        return torch.from_numpy(draw(law, shape, self.source)).to(self.device)

    def select(self, scores: Ints, coefficient: Fraction) -> int:
        """Draw index j with probability proportional to exp(coefficient · scores[j]), exactly."""
        return exponential(scores, coefficient, self.source)

    def state(self) -> dict[str, Any] | None:
        """Return the position of a seeded stream; None when the noise is from entropy."""
        return self.source.state()

    def load(self, state: dict[str, Any] | None) -> None:
        """Go to a position of the same seeded stream."""
        self.source.load(state)

    def __repr__(self) -> str:
        """Show the device and the seed where there are."""
        device = None if self.device is None else str(self.device)
        given = {"device": device, "insecure_seed": self.source.insecure_seed}
        shown = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return f"DiscreteNoise({', '.join(shown)})"


def draw(law: Law, shape: tuple[int, ...], source: Source) -> Ints:
    """Draw integers of a law on the CPU, an array of a shape, with words of a source."""
    table = _table(law)
    count = 1
    for length in shape:
        count *= length
    result = np.empty(count, np.int64)
    done = 0
    while done < count:
        kept = _some(law, table, min(count - done, _CHUNK), source)
        result[done : done + kept.size] = kept
        done += kept.size
    return result.reshape(shape)


def exponential(scores: Ints, coefficient: Fraction, source: Source) -> int:
    """Draw index j with probability proportional to exp(coefficient · scores[j]), exactly.

    An index is drawn uniformly and kept with probability exp(-coefficient · (max - score)), until
    one is kept: at most as many trials as indices, on average.

    Args:
        scores: integers [d].
        coefficient: > 0; of the exponential mechanism with privacy ε, ε / (2 · sensitivity).
        source: of the randomness.

    Raises:
        ValueError: there are no scores, or they are too far apart for 63 bits.
    """
    require(scores.size > 0, "exponential", "scores", "must not be empty", scores.shape)
    rate = Fraction(coefficient)
    require(rate > 0, "exponential", "coefficient", "must be > 0", coefficient)
    gaps = scores.max() - scores
    widest = int(gaps.max()) * rate.numerator
    fits = widest < 1 << 63 and rate.denominator <= 1 << 62
    require(fits, "exponential", "coefficient", "must have fewer digits", coefficient)
    numerators = (gaps.astype(np.int64) * np.int64(rate.numerator)).view(np.uint64)
    trials = 16
    while True:
        drawn = source.below(scores.size, trials).view(np.int64)
        kept = np.flatnonzero(bernoulli_exp(numerators[drawn], rate.denominator, source))
        if kept.size:
            return int(drawn[kept[0]])
        trials = min(4 * trials, _CHUNK)


def discrete_gaussian(
    sigma2: Fraction, shape: int | tuple[int, ...] = (), *, insecure_seed: int | None = None
) -> Ints:
    """Draw exact discrete Gaussian noise, P(x) ∝ exp(-x² / (2 sigma2)).

    Args:
        sigma2: σ², an int or a Fraction.
        shape: of the result.
        insecure_seed: for tests only; it warns.

    Returns:
        int64 array.

    Examples:
        >>> bool(abs(discrete_gaussian(Fraction(100), 1000).mean()) < 5)
        True
    """
    lengths = _as_shape("discrete_gaussian", shape)
    return draw(law_of("gaussian", sigma2), lengths, BitSource(insecure_seed=insecure_seed))


def discrete_laplace(
    scale: Fraction, shape: int | tuple[int, ...] = (), *, insecure_seed: int | None = None
) -> Ints:
    """Draw exact discrete Laplace noise, P(x) ∝ exp(-|x| / scale).

    Args:
        scale: b, an int or a Fraction.
        shape: of the result.
        insecure_seed: for tests only; it warns.

    Returns:
        int64 array.

    Examples:
        >>> bool(abs(discrete_laplace(Fraction(10), 1000).mean()) < 5)
        True
    """
    lengths = _as_shape("discrete_laplace", shape)
    return draw(law_of("laplace", scale), lengths, BitSource(insecure_seed=insecure_seed))


def _as_shape(owner: str, shape: int | tuple[int, ...]) -> tuple[int, ...]:
    lengths = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    return tuple(int(integer(owner, "shape", length, at_least=0)) for length in lengths)


def round_up(value: Fraction, bits: int = 24) -> Fraction:
    """Return the least fraction n · 2^e with n < 2^bits that is not below `value` > 0.

    Noise scales are rounded this way: never less noise than the budget asks for, and few digits.

    Examples:
        >>> round_up(Fraction(1, 3), 4)
        Fraction(11, 32)
    """
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - bits
    while True:
        unit = Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)
        steps = -(-value // unit)
        if steps < 1 << bits:
            return steps * unit
        exponent += 1

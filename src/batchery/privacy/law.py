# SPDX-License-Identifier: Apache-2.0
r"""Laws of integer noise, and exact tables of their distributions.

Use a table to turn uniform bits into noise by inversion: `batchery.privacy.noise` does on the CPU,
`batchery.privacy.device_noise` on a GPU. No floating point is in it.

With φ(x) = x²/(2σ²) or |x|/b rational, and P(k) ∝ exp(-φ(k s)) for k = 0, 1, …:

    table[k] = ⌊2^bits F(k)⌋,  F(k) = Σ_{j<=k} P(j)

A uniform number 0.word… belongs to the first k with word < table[k]; where word = table[k - 1], the
bits so far do not decide between k - 1 and k, and further ones are drawn, of both.

Of a law that is `halved`, P(0) has half of that weight: k with a random sign is then the noise,
since 0 and -0 are one number.

Reference: Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020,
arXiv 2004.00010, for the laws; the table is ours.
"""

import bisect
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
NoiseKind = Literal["gaussian", "laplace"]

BITS = 63  # of a word that a table is asked for; the last one is the sign


class Source(Protocol):
    """Where uniform randomness comes from."""

    def words(self, n: int) -> Words:
        """Return `n` uniform 64-bit words."""

    def below(self, bound: int, n: int) -> Words:
        """Return `n` uniform integers in [0, bound)."""


def exp_bounds(exponent: Fraction, bits: int) -> tuple[int, int]:
    """Return integers around 2^bits · exp(-exponent), at most 2 apart.

    Args:
        exponent: at least 0.
        bits: precision.
    """
    halvings = (exponent.numerator // exponent.denominator).bit_length() + 8
    precision = bits + halvings + 40
    one = 1 << precision
    # exp(-x) with x = exponent / 2^halvings <= 2^-8 by its series; every rounding is below 2 units,
    # and what the rounding of x adds stays below one.
    x = (exponent.numerator << (precision - halvings)) // exponent.denominator
    term, total, count = one, one, 1
    while term:
        term = ((term * x) >> precision) // count
        total += -term if count & 1 else term
        count += 1
    error = 4 * count + 8
    for _ in range(halvings):  # squaring v <= 1 doubles its error, rounds, and adds a square of it
        total = (total * total) >> precision
        error = 2 * error + 2
    down = precision - bits
    return max(0, (total - error) >> down), ((total + error) >> down) + 1


@dataclass(frozen=True)
class Law:
    """P(x) ∝ exp(-φ(x)) on the integers.

    Attributes:
        kind: φ(x) = x²/(2 scale) for `"gaussian"`, |x|/scale for `"laplace"`.
        scale: the variance parameter σ², or b.
        step: s, the spacing of the table; a power of two.
        halved: 0 has half of its weight in the table, for a sign to be given to it too.
    """

    kind: NoiseKind
    scale: Fraction
    step: int
    halved: bool = False

    def exponent(self, x: int) -> Fraction:
        """Return φ(x)."""
        return x * x * self._rate() if self.kind == "gaussian" else x * self._rate()

    def _rate(self) -> Fraction:
        top, bottom = self.scale.denominator, self.scale.numerator
        return Fraction(top, 2 * bottom if self.kind == "gaussian" else bottom)

    def extra(self, coarse: Ints, fine: Ints) -> tuple[Words, int]:
        """Return numerators and the denominator of φ(coarse + fine) - φ(coarse)."""
        rate = self._rate()
        square = self.kind == "gaussian"
        more = fine * (2 * coarse + fine) if square else fine
        return (more * np.int64(rate.numerator)).view(np.uint64), rate.denominator


@lru_cache(maxsize=64)
def cumulative(law: Law, bits: int) -> list[int]:
    """Return ⌊2^bits F(k)⌋ for k = 0, 1, … up to the first that is 2^bits - 1.

    F is the distribution function of the magnitude's coarse part k: P(k) ∝ exp(-φ(k · step)), half
    of it for k = 0 if the law is halved.
    Every entry is exact: bounds are narrowed until both have the same floor.
    """
    precision = bits + 64
    while (found := _cumulative(law, bits, precision)) is None:
        precision += 64
    return found


def _cumulative(law: Law, bits: int, precision: int) -> list[int] | None:
    weights: list[tuple[int, int]] = []
    while not weights or weights[-1][1] > 2:
        weights.append(exp_bounds(law.exponent(len(weights) * law.step), precision))
    # φ is convex: the rest is below a geometric series, w / (1 - exp(-δ)) <= w (1 + 1/δ).
    last = len(weights) - 1
    delta = law.exponent(law.step * len(weights)) - law.exponent(law.step * last)
    rest = weights[-1][1] * (2 + delta.denominator // delta.numerator)
    if law.halved:
        weights[0] = weights[0][0] >> 1, (weights[0][1] + 1) >> 1
    least, most = (sum(pair[side] for pair in weights) for side in (0, 1))
    low = high = 0
    found = []
    for lower, upper in weights:
        low, high = low + lower, high + upper
        floor = (low << bits) // (most + rest)
        found.append(floor)
        if floor == (1 << bits) - 1:  # F < 1: no bound is needed from above
            return found
        if floor != (high << bits) // least:
            return None
    return None


def resolve(law: Law, word: int, bits: int, source: Source) -> int:
    """Return the k that the uniform number 0.word… belongs to, drawing the bits it takes.

    Args:
        law: whose table is meant.
        word: the first `bits` bits, an integer.
        bits: their number.
        source: of the further bits.
    """
    while True:
        table = cumulative(law, bits)
        k = bisect.bisect_right(table, word)
        if k == 0 or table[k - 1] != word:
            return k
        word = (word << 64) | int(source.words(1)[0])
        bits += 64

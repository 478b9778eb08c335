# SPDX-License-Identifier: Apache-2.0
"""What exact noise is tested against: probabilities in many digits, and prepared words."""

import mpmath
import numpy as np
from scipy import stats


def exact_mass(kind, scale, x):
    """P(x) · normaliser, in 60 digits."""
    scale = mpmath.mpf(scale.numerator) / scale.denominator
    return mpmath.exp(
        -(mpmath.mpf(x) ** 2) / (2 * scale) if kind == "gaussian" else -abs(x) / scale
    )


def exact_pmf(kind, scale, width):
    """Probabilities of -width … width, the normaliser over all that can be told from 0."""
    with mpmath.workdps(60):
        mass = [exact_mass(kind, scale, x) for x in range(20 * width)]
        total = mass[0] + 2 * mpmath.fsum(mass[1:])
        return [float(mass[abs(x)] / total) for x in range(-width, width + 1)]


class Script:
    """A source that hands out prepared words, to look at one branch."""

    def __init__(self, *words):
        self.prepared = list(words)

    def words(self, n):
        taken, self.prepared = self.prepared[:n], self.prepared[n:]
        assert len(taken) == n
        return np.array(taken, np.uint64)


def p_value(samples, kind, scale):
    """χ² of samples against the exact law, in cells that expect at least ten."""
    width = int(np.abs(samples).max())
    expected = np.array(exact_pmf(kind, scale, width)) * samples.size
    observed = np.bincount(samples + width, minlength=2 * width + 1)
    cell = np.minimum(np.cumsum(expected) // 10, (samples.size - 10) // 10).astype(int)
    cell = np.unique(cell, return_inverse=True)[1]
    observed, expected = np.bincount(cell, observed), np.bincount(cell, expected)
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue

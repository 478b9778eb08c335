# SPDX-License-Identifier: Apache-2.0
"""Noise that tests put into a mechanism in place of its own."""

import numpy as np


class Zero:
    """No noise at all."""

    def sample(self, kind, scale, shape):
        return np.zeros(shape, np.int64)


class Given:
    """Rows prepared in advance, handed out in order; counts what was asked for."""

    def __init__(self, rows):
        self.rows = np.asarray(rows)
        self.used = 0
        self.laws = []

    def sample(self, kind, scale, shape):
        taken = self.rows[self.used : self.used + shape[0]]
        assert taken.shape == shape, (taken.shape, shape)
        self.used += shape[0]
        self.laws.append((kind, scale))
        return taken.copy()


class Recording:
    """Another's noise, kept as it goes by."""

    def __init__(self, noise):
        self.noise = noise
        self.drawn = []

    def sample(self, kind, scale, shape):
        drawn = np.asarray(self.noise.sample(kind, scale, shape))
        self.drawn.append((kind, scale, drawn.copy()))
        return drawn


class Replay:
    """Prepared draws, handed out in order whatever their shape; `shift` is added draw by draw."""

    def __init__(self, drawn, shifts=None):
        self.drawn = list(drawn)
        self.shifts = shifts or {}
        self.used = 0

    def sample(self, kind, scale, shape):
        was_kind, was_scale, drawn = self.drawn[self.used]
        assert (was_kind, was_scale, drawn.shape) == (kind, scale, shape)
        drawn = drawn + self.shifts.get(self.used, 0)
        self.used += 1
        return drawn

# SPDX-License-Identifier: Apache-2.0
r"""The hard stream: why the maximum cannot be released continually at the price of a running count.

Use it to measure that price, and as an attack: from the releases of a mechanism that is too
accurate it reads out a data set that was never to be told. It is no typical stream; for what your
own costs, run the mechanism on public data like yours.

A hidden data set of n rows over d columns comes first, then two blocks for each column:

    n rows y_i          the secret, c_j = Σ_i y_i[j]
    for j = 0 … d-1:
      n rows e_j        column j alone; at their end it leads: M = c_j + n + j n, a read of c_j
      n rows 1 - e_j    all others: the columns are level again

So n (2d + 1) rows give d marginals of n records. Few columns could be answered by a counter each,
many more than (Tρ)^(2/3) privately not at all: with d = (Tρ)^(2/3) / 2 the error T^(1/3) is what a
mechanism must have (Jain et al. 2023). Zero rows fill up the horizon.

Reference: Jain, Raskhodnikova, Sivakumar, Smith, "The Price of Differential Privacy under Continual
Observation", ICML 2023, arXiv 2112.00828; Dwork, Smith, Steinke, Ullman, Vadhan, "Robust
Traceability from Trace Amounts", FOCS 2015, for columns of random means.

Where we differ: the proof answers marginal queries with the mechanism as a black box; here the
reads are the attack itself, and their error is what is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from batchery._core.random import new_generator
from batchery._core.validate import integer, number, require


def hard_shape(horizon: int, rho: float) -> tuple[int, int]:
    """Return the numbers of columns and of hidden rows with which a horizon is hardest.

    Args:
        horizon: T, at least 3.
        rho: ρ of the mechanism under attack.

    Returns:
        (d, n): about (Tρ)^(2/3) / 2, and T / (2d + 1).

    Examples:
        >>> hard_shape(1024, 0.5)
        (32, 15)
    """
    integer("hard_shape", "horizon", horizon, at_least=3)
    number("hard_shape", "rho", rho, above=0)
    columns = min(max(1, round((horizon * rho) ** (2 / 3) / 2)), (horizon - 1) // 2)
    return columns, horizon // (2 * columns + 1)


def hard_stream(
    horizon: int, num_columns: int, n: int, generator: torch.Generator | None = None
) -> "HardStream":
    """Return a stream that makes a mechanism for the maximum reveal a hidden data set.

    Args:
        horizon: T, at least n (2d + 1).
        num_columns: d; see `hard_shape`.
        n: number of hidden rows.
        generator: of the hidden data set: column means are uniform in [0, 1]. By default it is
            always the same.

    Raises:
        ValueError: an argument is below 1, or the horizon too short.

    Examples:
        >>> stream = hard_stream(40, 4, 4)
        >>> sum(repeats for _, repeats in stream.runs())
        40
    """
    for name, value, least in (("num_columns", num_columns, 1), ("n", n, 1)):
        integer("hard_stream", name, value, at_least=least)
    integer("hard_stream", "horizon", horizon, at_least=1)
    rule = f"must be >= n (2 num_columns + 1) = {n * (2 * num_columns + 1)}"
    require(horizon >= n * (2 * num_columns + 1), "hard_stream", "horizon", rule, horizon)
    generator = generator or new_generator("hard_stream")
    means = torch.rand(num_columns, generator=generator)
    return HardStream(torch.rand(n, num_columns, generator=generator) < means, horizon)


@dataclass(frozen=True, eq=False)
class HardStream:
    """A stream of bits, never held as a whole: n d bits and arithmetic.

    Attributes:
        secret: the hidden rows, bool [n, d].
        horizon: T, the number of rows.

    Examples:
        >>> stream = HardStream(torch.tensor([[True, False], [True, True]]), 10)
        >>> stream.read_out(stream.maxima()).tolist() == stream.counts().tolist() == [2, 1]
        True
    """

    secret: Tensor
    horizon: int

    @property
    def n(self) -> int:
        """Number of hidden rows."""
        return self.secret.shape[0]

    @property
    def num_columns(self) -> int:
        """Number of columns, d."""
        return self.secret.shape[1]

    def runs(self) -> Iterator[tuple[Tensor, int]]:
        """Yield every row, bool [d], with the number of times that it is repeated."""
        for row in self.secret:
            yield row, 1
        for j in range(self.num_columns):
            unit = torch.zeros(self.num_columns, dtype=torch.bool)
            unit[j] = True
            yield unit, self.n
            yield ~unit, self.n
        rest = self.horizon - self.n * (2 * self.num_columns + 1)
        if rest:
            yield torch.zeros(self.num_columns, dtype=torch.bool), rest

    def chunks(self, cells: int = 1 << 22) -> Iterator[Tensor]:
        """Yield the rows in their order, bool [m, d], for `update_many`.

        Args:
            cells: the most entries of a chunk; it has at least one row.
        """
        integer("HardStream", "cells", cells, at_least=1)
        room = free = max(1, cells // self.num_columns)
        rows: list[Tensor] = []
        counts: list[int] = []
        for row, left in self.runs():
            while left:
                taken = min(left, free)
                rows.append(row)
                counts.append(taken)
                left -= taken
                free -= taken
                if not free:
                    yield _spread(rows, counts)
                    rows, counts, free = [], [], room
        if rows:
            yield _spread(rows, counts)

    def counts(self) -> Tensor:
        """Return the secret's column sums c, int64 [d]: what the reads are after."""
        return self.secret.sum(0)

    def maxima(self) -> Tensor:
        """Return the true maximum after every row, int64 [T], in O(n d) operations."""
        n, d = self.secret.shape
        c = self.counts()
        step, block = torch.arange(1, n + 1), n * torch.arange(d)[:, None]
        top = c.max()
        others = top.repeat(d)  # the largest of all columns but j
        leader = int(c.argmax())
        rest = torch.cat([c[:leader], c[leader + 1 :]])
        others[leader] = rest.max() if d > 1 else 0
        up = block + torch.maximum(c[:, None] + step, top)
        level = block + torch.maximum((c + n)[:, None], (others[:, None] + step) * (d > 1))
        blocks = torch.stack([up, level], 1).flatten()
        found = torch.cat([self.secret.cumsum(0).amax(1), blocks])
        return torch.cat([found, found[-1:].expand(self.horizon - len(found))])

    def reads(self) -> Tensor:
        """Return the steps, from 1, after which each column is read, int64 [d]."""
        return self.n * (2 * torch.arange(self.num_columns) + 2)

    def read_out(self, releases: Tensor) -> Tensor:
        """Return what the releases of a mechanism for the maximum tell of the secret's counts.

        Args:
            releases: one for each row, [T].

        Returns:
            Float64 [d], an estimate of `counts()` in [0, n]. Knowing nothing, n/2 would be off by
            n/4 on average.
        """
        fits = tuple(releases.shape) == (self.horizon,)
        rule = f"must have shape {[self.horizon]}"
        require(fits, "HardStream", "releases", rule, list(releases.shape))
        level = self.n * (torch.arange(self.num_columns) + 1)
        seen = releases[self.reads().to(releases.device) - 1].cpu().double()
        return (seen - level).clamp(0, self.n)


def _spread(rows: list[Tensor], counts: list[int]) -> Tensor:
    if len(rows) == 1:
        return rows[0].expand(counts[0], -1)
    return torch.stack(rows).repeat_interleave(torch.tensor(counts), dim=0)

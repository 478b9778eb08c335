# SPDX-License-Identifier: Apache-2.0
r"""The game of continual release: an adversary that adapts, and a replay that must agree.

Use it in the tests of whatever draws noise. It finds wrong scales, wrong sensitivities, noise that
is drawn again or used twice. A mechanism that passes is not proved; proofs are on paper.

An adversary sees the releases a_1 … a_{t-1} and chooses row x_t. Once, at a step t* of its choice,
it gives two records, and the b-th is taken. What it sees for b = 0 and b = 1 must be close.

    coupling   run b = 0 with recorded noise z; run b = 1 with z + C (x - x'), x and x' the rows of
               the two sides. If both see the same releases, for every z, then the loss is that of
               telling noise from shifted noise: ρ = Σ ‖shift‖² / (2σ²), or ε = Σ |shift| / b.
    audit      run both sides often and tell them apart by a score; see `batchery.privacy.audit`.

Reference: Denisov et al., "Improved Differential Privacy for SGD via Optimal Private Linear
Operators on Adaptive Streams", NeurIPS 2022, arXiv 2202.08312; Jain et al., arXiv 2112.00828.

Where we differ: the proofs' change of variables is carried out, so that one run finds a scale that
is short by one level of twenty, for which counting needs some 10^5 runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchery._core.validate import integer, number, one_of, require
from batchery.privacy.audit import Audit
from batchery.privacy.column_mechanism import ColumnMechanism
from batchery.privacy.counters import Counter
from batchery.privacy.factorisation import FactorDesign
from batchery.privacy.mechanism import Mechanism
from batchery.privacy.noise_rows import Noise
from batchery.privacy.raw_release import Counted, Held
from batchery.privacy.running_sum import Design, DoublingDesign, epoch_of
from batchery.privacy.tree import TreeDesign


class Challenge(NamedTuple):
    """Two records, of which the game takes one.

    Examples:
        >>> Challenge(0, 1).second
        1
    """

    first: Any
    second: Any


Adversary = Callable[[Sequence[Any]], Any]  # the releases so far -> the next row, or a Challenge


@dataclass(frozen=True)
class Draw:
    """One call for noise: its law, what came, and the step it was for."""

    kind: str
    scale: Fraction
    drawn: Tensor
    step: int


@dataclass(frozen=True)
class View:
    """One side of a game.

    Attributes:
        releases: all that the adversary saw.
        rows: all that the mechanism was given.
        at: t*, from 1.
        pair: the two records.
        mechanism: after its last release.
    """

    releases: list[Any]
    rows: list[Tensor]
    at: int
    pair: Challenge
    mechanism: Mechanism


@dataclass(frozen=True)
class Coupling:
    """What a replay with shifted noise has shown.

    Attributes:
        differs_at: the first step at which the two sides saw different releases; None for none.
        cost: what the shift costs: ρ of Gaussian noise, ε of Laplace noise.
        declared: what the mechanism says that it has spent.
    """

    differs_at: int | None
    cost: float
    declared: float

    @property
    def holds(self) -> bool:
        """Whether the sides agree at no more than the declared cost."""
        return self.differs_at is None and self.cost <= self.declared * (1 + 1e-9)


class ContinualGame:
    """An adaptive adversary against a mechanism that releases continually.

    Args:
        build: makes a new mechanism with the noise it is given; None stands for its own.
        adversary: makes the next row from the releases so far, or a `Challenge`, once. It must do
            the same for the same releases: coins are fixed in advance.
        steps: length of the game; by default the mechanism's horizon.

    Examples:
        >>> from batchery.privacy import Budget, DiscreteNoise, TreeCounter
        >>> def adversary(releases):
        ...     return Challenge(0, 1) if len(releases) == 2 else int(sum(releases)) % 2
        >>> game = ContinualGame(lambda z: TreeCounter(7, budget=Budget(0.5), noise=z), adversary)
        >>> game.couple(DiscreteNoise()).holds
        True
    """

    def __init__(
        self,
        build: Callable[[Noise | None], Mechanism],
        adversary: Adversary,
        steps: int | None = None,
    ) -> None:
        """Keep the rules; see the class."""
        if steps is not None:
            integer("ContinualGame", "steps", steps, at_least=1)
        self.build = build
        self.adversary = adversary
        self.steps = steps

    def view(self, b: int, noise: Noise | None = None) -> View:
        """Play side `b`, 0 or 1.

        Raises:
            ValueError: there is no length, or not exactly one challenge.
        """
        one_of("ContinualGame", "b", b, (0, 1))
        mechanism = self.build(noise)
        steps = self.steps or mechanism.horizon
        require(
            steps is not None, "ContinualGame", "steps", "must be given without a horizon", None
        )
        releases: list[Any] = []
        rows: list[Tensor] = []
        at, pair = 0, None
        for t in range(1, (steps or 0) + 1):
            row = self.adversary(releases)
            if isinstance(row, Challenge):
                require(pair is None, "ContinualGame", "adversary", "must challenge once", t)
                at, pair, row = t, row, row[b]
            if isinstance(noise, _Tape | _Played):
                noise.step = t
            rows.append(torch.as_tensor(row))
            releases.append(mechanism.update(row))
        if pair is None:
            raise ValueError("ContinualGame: adversary must challenge once, got no challenge")
        return View(releases, rows, at, pair, mechanism)

    def couple(self, noise: Noise, *, tolerance: float = 0.0) -> Coupling:
        """Play b = 0 with this noise, then b = 1 with what makes up for the other record.

        Args:
            noise: what both sides' noise is made of.
            tolerance: by how much releases may differ and be the same: 0 where they are integers.

        Raises:
            ValueError: no shift is known for the mechanism: it must be a counter, or a `MaxSum`
                that recomputes or counts.
        """
        number("ContinualGame", "tolerance", tolerance, at_least=0)
        tape = _Tape(noise)
        view = self.view(0, tape)
        shifts = _shifts(view, tape.draws)
        cost = 0.0
        for draw, shift in zip(tape.draws, shifts, strict=True):
            size = shift.double().abs()
            gaussian = draw.kind == "gaussian"
            cost += float(size.square().sum() / 2 if gaussian else size.sum()) / float(draw.scale)
        spent = view.mechanism.spent
        declared = spent.rho if spent.pure_epsilon is None else spent.pure_epsilon
        played = _Played(tape.draws, shifts)
        try:
            other = self.view(1, played)
        except _AskedOtherwise:
            return Coupling(played.step, cost, declared)
        differs = None
        for t, (one, two) in enumerate(zip(view.releases, other.releases, strict=True), 1):
            gap = (torch.as_tensor(one) - torch.as_tensor(two)).abs().max()
            if gap > tolerance:
                differs = t
                break
        return Coupling(differs, cost, declared)

    def audit(
        self, score: Callable[[View], Any], runs: int = 1, *, confidence: float = 0.95
    ) -> Audit:
        """Play both sides often, each with noise of its own, and tell them apart by a score.

        Args:
            score: of a view, larger where b = 1 is more likely: a number, or one for each of many
                columns. A counter of n columns is n independent runs at once.
            runs: of each side.
            confidence: of each limit.
        """
        integer("ContinualGame", "runs", runs, at_least=1)
        sides = [
            np.concatenate([np.atleast_1d(np.asarray(score(self.view(b)))) for _ in range(runs)])
            for b in (0, 1)
        ]
        return Audit(*sides, confidence=confidence)


class _Tape:
    """Noise that is written down as it is drawn."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise
        self.draws: list[Draw] = []
        self.step = 0

    def sample(self, kind: Any, scale: Fraction, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.as_tensor(self.noise.sample(kind, scale, shape))
        self.draws.append(Draw(kind, scale, drawn.clone(), self.step))
        return drawn


class _AskedOtherwise(Exception):
    """A mechanism asked for other noise than it did on the first side."""


class _Played:
    """Recorded noise, each draw shifted."""

    def __init__(self, draws: Sequence[Draw], shifts: Sequence[Tensor]) -> None:
        self.pairs = iter(list(zip(draws, shifts, strict=True)))
        self.step = 0

    def sample(self, kind: Any, scale: Fraction, shape: tuple[int, ...]) -> Tensor:
        draw, shift = next(self.pairs, (None, None))
        if draw is None or shift is None:
            raise _AskedOtherwise
        if (draw.kind, draw.scale, tuple(draw.drawn.shape)) != (kind, scale, tuple(shape)):
            raise _AskedOtherwise
        return draw.drawn + shift


def _shifts(view: View, draws: Sequence[Draw]) -> list[Tensor]:
    """Return what must be added to each draw so that the second record leaves no trace."""
    mechanism = view.mechanism
    inner = mechanism._raw if isinstance(mechanism, ColumnMechanism) else None
    counter = inner.counter if isinstance(inner, Counted) else mechanism
    if isinstance(counter, Counter):
        first, second = (torch.as_tensor(record) for record in view.pair)
        change = first - second if first.dtype.is_floating_point else first.long() - second.long()
        parts = _exposure(counter.design, len(view.rows), view.at)
        return [
            torch.tensor(part, dtype=draw.drawn.dtype).reshape(-1, *(1,) * change.ndim) * change
            for part, draw in zip(parts, draws, strict=True)
        ]
    additive = isinstance(inner, Held) and all(draw.kind != "gumbel" for draw in draws)
    rule = "must make a counter, or a MaxSum that recomputes or counts"
    require(additive, "ContinualGame", "build", rule, type(mechanism).__name__)
    sums = torch.stack(view.rows).cumsum(0)
    other = torch.stack(view.rows)
    other[view.at - 1] = torch.as_tensor(view.pair.second)
    moved = sums.amax(1) - other.cumsum(0).amax(1)
    return [moved[draw.step - 1].to(draw.drawn.dtype).reshape(1) for draw in draws]


def _exposure(design: Design, steps: int, at: int) -> list[list[float]]:
    """Return how often the record of step `at` is in each row of noise, draw by draw: C's column.

    A record that is outside of 1 … `steps` is in none.
    """
    found: list[list[float]] = []
    if isinstance(design, DoublingDesign):
        for epoch in range(epoch_of(steps) + 1):
            begin = (1 << epoch) - 1
            if epoch:  # the total of the epoch before
                found.append([float(begin // 2 < at <= begin)])
            length = min(1 << epoch, steps - begin)
            found += _exposure(design.make(1 << epoch), length, at - begin)
        return found
    if isinstance(design, FactorDesign):
        column = design.strategy.column(design.horizon)
        for t in range(1, steps + 1):
            found.append([float(column[t - at]) if 1 <= at <= t else 0.0])
        return found
    honaker = isinstance(design, TreeDesign) and design.estimator == "honaker"
    for t in range(1, steps + 1):
        low = t & -t
        widths = [1 << j for j in range(low.bit_length())] if honaker else [low]
        found.append([float(t - width < at <= t) for width in widths])
    return found

# SPDX-License-Identifier: Apache-2.0
"""Where the raw releases of `MaxSum` and `SumSelect` come from: held, counted, fired, or constant.

Each is given rows that have been checked and answers one integer for each. What they do and why is
in `batchery.privacy.max_sum`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from batchery.privacy.bounds import Recompute, Sparse
from batchery.privacy.counters import Counter
from batchery.privacy.noise_rows import Noise, NoiseRows
from batchery.privacy.running_sum import epoch_of
from batchery.privacy.saved_state import Misfit, fill_, same_step

_CELLS = 1 << 22  # of rows that are summed at once


class RawRelease(Protocol):
    """One integer for each row."""

    def answers(self, rows: Tensor) -> list[int]:
        """Add rows and return the release after each."""

    def fraction(self) -> float:
        """Return the part of the budget that the releases so far have spent."""

    def stats(self) -> dict[str, Any]:
        """Return what releases tell about themselves; public."""

    def state(self) -> dict[str, Any]:
        """Return what a resume needs."""

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""


class Held:
    """An answer computed anew every few steps, and held between.

    Args:
        plan: makes the plan of an epoch: the 0th without end, or the e-th of 2^e steps.
        answer: the release for column sums, [d] int64, by a plan.
        sums: zeros, [d] int64.
        epochs: the stream has no horizon.
        shares: part of the budget of each epoch.
    """

    def __init__(
        self,
        plan: Callable[[int], Recompute],
        answer: Callable[[Tensor, Recompute], int],
        sums: Tensor,
        *,
        epochs: bool,
        shares: Callable[[int], float],
    ) -> None:
        """Hold 0; see the class."""
        self._make_plan = plan
        self._plans: dict[int, Recompute] = {}  # not lru_cache, which cannot be pickled
        self.answer = answer
        self.sums = sums
        self.epochs = epochs
        self.shares = shares
        self.t = 0
        self.held = 0

    def plan(self, epoch: int) -> Recompute:
        """Return the plan of an epoch."""
        if epoch not in self._plans:
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def answers(self, rows: Tensor) -> list[int]:
        """Add rows and return the release after each."""
        found: list[int] = []
        while len(rows):
            plan, begin, end = self._around(self.t + 1)
            age = (self.t - begin) % plan.interval
            if age == 0:
                self.sums += rows[0]
                self.held = self.answer(self.sums, plan)
                taken = 1
            else:
                taken = min(len(rows), plan.interval - age)
                taken = taken if end is None else min(taken, end - self.t)
                self.sums += rows[:taken].sum(0, dtype=torch.int64)
            found += [self.held] * taken
            self.t += taken
            rows = rows[taken:]
        return found

    def _around(self, t: int) -> tuple[Recompute, int, int | None]:
        """Return the plan that step `t` is in, the steps before it and up to its end."""
        if not self.epochs:
            return self.plan(0), 0, None
        epoch = epoch_of(t)
        return self.plan(epoch), (1 << epoch) - 1, (2 << epoch) - 1

    def epoch(self) -> int:
        """Return the number of the epoch of the last step."""
        return epoch_of(max(self.t, 1)) if self.epochs else 0

    def _released(self) -> int:
        """Return the number of releases in this epoch."""
        plan, begin, _ = self._around(max(self.t, 1))
        return -(-(self.t - begin) // plan.interval)

    def fraction(self) -> float:
        """Return the part of the budget that the releases so far have spent."""
        epoch = self.epoch()
        now = self.shares(epoch) * self._released() / self.plan(epoch).releases
        return now + sum(self.shares(past) for past in range(epoch))

    def stats(self) -> dict[str, Any]:
        """Return the number of releases."""
        past = sum(self.plan(epoch).releases for epoch in range(self.epoch()))
        return {"releases": past + self._released()}

    def state(self) -> dict[str, Any]:
        """Return the sums, what is held, and the position."""
        return {"t": self.t, "sums": self.sums.clone(), "held": self.held}

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        self.t, self.held = same_step(state, t), int(state["held"])
        fill_(self.sums, state, "sums")


class Counted:
    """The maximum, or its index, of a counter of all columns.

    Args:
        counter: of shape [d].
        margin: None for the maximum; for the index, what another column must be ahead by.
    """

    def __init__(self, counter: Counter, margin: float | None) -> None:
        """Begin with index 0; see the class."""
        self.counter = counter
        self.margin = margin
        self.index = 0

    def answers(self, rows: Tensor) -> list[int]:
        """Add rows and return the release after each."""
        found: list[int] = []
        for part in _parts(rows):
            counts = self.counter.update_many(part)
            if self.margin is None:
                tops = counts.amax(-1)
                found += (tops.round() if tops.is_floating_point() else tops).long().tolist()
            elif self.margin == 0:
                found += counts.argmax(-1).tolist()
                self.index = found[-1]
            else:
                found += [self._ahead(row, self.margin) for row in counts]
        return found

    def _ahead(self, counts: Tensor, margin: float) -> int:
        best = int(counts.argmax())
        if counts[best] > counts[self.index] + margin:
            self.index = best
        return self.index

    def fraction(self) -> float:
        """Return the part of the budget that the releases so far have spent."""
        return self.counter.fraction()

    def stats(self) -> dict[str, Any]:
        """Return the number of releases."""
        return {"releases": self.counter.t}

    def state(self) -> dict[str, Any]:
        """Return the state of the counter and the index that is held."""
        return {"counter": self.counter.state_dict(), "index": self.index}

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        same_step(state["counter"], t)
        self.counter.load_state_dict(state["counter"])
        self.index = int(state["index"])


class Fired:
    """The maximum, released when it is found far enough above the last release.

    Args:
        plan: threshold, number of releases and noise.
        noise: draws it.
        sums: zeros, [d] int64.
    """

    def __init__(self, plan: Sparse, noise: Noise, sums: Tensor) -> None:
        """Hold 0; see the class."""
        self.plan = plan
        self.noise = noise
        self.sums = sums
        self.queries = NoiseRows(noise, "laplace", plan.query_scale, (), "cpu")
        self.held = 0
        self.firings = 0
        self.threshold: float | None = None  # with its noise; drawn once a release, and kept

    def answers(self, rows: Tensor) -> list[int]:
        """Add rows and return the release after each."""
        found: list[int] = []
        for part in _parts(rows):
            sums = part.cumsum(0, dtype=torch.int64).add_(self.sums)
            self.sums.copy_(sums[-1])
            found += [self._compare(top) for top in sums.amax(-1).tolist()]
        return found

    def _compare(self, top: int) -> int:
        plan = self.plan
        if self.firings == plan.firings:
            return self.held
        if self.threshold is None:
            drawn = self.noise.sample("laplace", plan.threshold_scale, (1,))[0].item()
            self.threshold = plan.threshold + drawn
        if top - self.held + self.queries.take(1)[0].item() >= self.threshold:
            self.held = round(top + self.noise.sample(plan.kind, plan.scale, (1,))[0].item())
            self.firings += 1
            self.threshold = None
        return self.held

    def fraction(self) -> float:
        """Return the part of the budget that the releases so far have spent."""
        compared = self.firings + (self.threshold is not None)
        return (compared + self.firings) / (2 * self.plan.firings)

    def stats(self) -> dict[str, Any]:
        """Return the number of releases, and whether they are used up."""
        return {"releases": self.firings, "exhausted": self.firings == self.plan.firings}

    def state(self) -> dict[str, Any]:
        """Return the sums, what is held, the noisy threshold, and where noise comes from."""
        return {
            "sums": self.sums.clone(),
            "held": self.held,
            "firings": self.firings,
            "threshold": self.threshold,
            "queries": self.queries.state(),
        }

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        fill_(self.sums, state, "sums")
        self.held, self.firings = int(state["held"]), int(state["firings"])
        if not 0 <= self.firings <= self.plan.firings:  # it would not stop
            raise Misfit(f"'firings' from 0 to {self.plan.firings}, got {self.firings}")
        self.threshold = state["threshold"]
        self.queries.load(state["queries"])


class Constant:
    """What needs no data: half the steps so far, or the first index.

    Args:
        slope: rise per step.
    """

    def __init__(self, slope: float) -> None:
        """Begin at 0; see the class."""
        self.slope = slope
        self.t = 0

    def answers(self, rows: Tensor) -> list[int]:
        """Count rows and return the release after each."""
        first = self.t + 1
        self.t += len(rows)
        return [int(t * self.slope) for t in range(first, self.t + 1)]

    def fraction(self) -> float:
        """Return 0: nothing is spent."""
        return 0.0

    def stats(self) -> dict[str, Any]:
        """Return the number of releases: none that depends on data."""
        return {"releases": 0}

    def state(self) -> dict[str, Any]:
        """Return the position."""
        return {"t": self.t}

    def load(self, state: dict[str, Any], t: int) -> None:
        """Go on from a state at step `t`."""
        self.t = same_step(state, t)


def _parts(rows: Tensor) -> Sequence[Tensor]:
    return torch.split(rows, max(1, _CELLS // rows.shape[1]))

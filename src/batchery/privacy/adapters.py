# SPDX-License-Identifier: Apache-2.0
"""Private counters inside training code: on several ranks, and in place of running metrics.

Use `OnOneRank` when each rank sees a part of every row: the parts are summed, one rank draws noise
and releases, all ranks learn the release. A mechanism on every rank would spend the budget once for
each of them, and its noise could be averaged away. Use `PrivateAccuracy` for an accuracy that may
be shown while evaluation data are still private.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchery._core.dist import all_reduce_sum_, rank_and_size
from batchery._core.validate import integer, require
from batchery.privacy.accounting import Budget
from batchery.privacy.counters import TreeCounter
from batchery.privacy.mechanism import Commit, Mechanism
from batchery.privacy.noise_rows import Noise


class OnOneRank:
    """A mechanism that lives on the first rank, fed by all.

    Every rank calls `update` at the same time, with a row that is its part of the sum; rows that
    are zeros but on one rank are allowed. The state is on the first rank alone.

    Args:
        mechanism: used on the first rank; may be None on the others.
        process_group: of the ranks; the default one.

    Raises:
        ValueError: the first rank has no mechanism.

    Example:
        >>> counter = OnOneRank(TreeCounter(10, budget=Budget(rho=0.5)))
        >>> counter.update(torch.tensor(1)).dtype
        torch.int64
    """

    def __init__(
        self, mechanism: Mechanism | None, process_group: dist.ProcessGroup | None = None
    ) -> None:
        """Keep the mechanism; see the class."""
        self.rank, self.size = rank_and_size(process_group)
        present = mechanism is not None or self.rank > 0
        require(present, "OnOneRank", "mechanism", "must be given on the first rank", mechanism)
        self.mechanism = mechanism if self.rank == 0 else None
        self.process_group = process_group

    def update(self, row: Tensor, *, commit: Commit | None = None) -> Any:
        """Sum the ranks' rows, and return the release to all of them.

        Args:
            row: this rank's part, an integer or floating-point tensor.
            commit: as in `Mechanism.update`; called on the first rank.

        Raises:
            RuntimeError: on the other ranks, when the first one raised.
        """
        total = all_reduce_sum_(row.clone(), self.process_group)
        found: list[Any] = [None, None]
        try:
            if self.mechanism is not None:
                found[0] = self.mechanism.update(total, commit=commit)
        except Exception as error:
            found[1] = f"{type(error).__name__} on the first rank"
            raise
        finally:  # the others wait for an answer, whatever it is
            if self.size > 1:
                dist.broadcast_object_list(found, group=self.process_group, group_src=0)
        if found[1] is not None:
            raise RuntimeError(f"OnOneRank: {found[1]}")
        return found[0]


class PrivateAccuracy:
    """A running accuracy of batches, released privately after each.

    Number of right answers and number of answers are two columns of one counter, with integer
    noise. One example changes each by at most 1, if it is in one batch: Δ = √2.

    Args:
        batches: number of updates, T.
        budget: of all releases together, for every example; a pure one takes Laplace noise.
        noise: draws the noise in place of the counter's own; for tests.

    Example:
        >>> accuracy = PrivateAccuracy(100, budget=Budget(rho=0.5))
        >>> accuracy.update(torch.tensor([1, 0, 2]), torch.tensor([1, 1, 2]))
        >>> 0.0 <= accuracy.compute() <= 1.0
        True
    """

    def __init__(self, batches: int, *, budget: Budget, noise: Noise | None = None) -> None:
        """Begin with no batches; see the class."""
        integer("PrivateAccuracy", "batches", batches, at_least=1)
        sensitivity = 2.0 if budget.pure_epsilon is not None else 2**0.5
        self.counter = TreeCounter(
            batches, 2, budget=budget, row_sensitivity=sensitivity, noise=noise
        )

    def update(self, predicted: Tensor, target: Tensor, *, commit: Commit | None = None) -> None:
        """Count a batch of class indices of one shape; the release goes into `compute`."""
        shapes = [list(predicted.shape), list(target.shape)]
        fits = predicted.shape == target.shape
        require(fits, "PrivateAccuracy", "predicted", "must have the shape of target", shapes)
        right = (predicted == target).sum()
        row = torch.stack([right, torch.full_like(right, target.numel())])
        self.counter.update(row.to(self.counter.device), commit=commit)

    def compute(self) -> float:
        """Return the released accuracy, in [0, 1]; NaN before the first batch."""
        counts = self.counter.last()
        if counts is None:
            return float("nan")
        right, answers = (int(count) for count in counts)
        return min(1.0, max(0.0, right / max(1, answers)))

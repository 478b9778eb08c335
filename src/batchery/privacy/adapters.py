# SPDX-License-Identifier: Apache-2.0
"""Private counters inside training code: on several ranks, and in place of running metrics.

Use `OnOneRank` when each rank sees a part of every row: the parts are summed, one rank draws noise
and releases, all ranks learn the release. A mechanism on every rank would spend the budget once for
each of them, and its noise could be averaged away. Use `PrivateAccuracy` for an accuracy that may
be shown while evaluation data are still private.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchery._core.dist import all_reduce_sum_, rank_and_size
from batchery._core.validate import integer, require, require_type
from batchery.privacy.accounting import Budget
from batchery.privacy.counters import TreeCounter
from batchery.privacy.mechanism import Commit, Mechanism, State
from batchery.privacy.noise_rows import Noise
from batchery.privacy.saved_state import kind_of


class OnOneRank:
    """A mechanism that lives on the first rank, fed by all.

    Every rank calls `update` at the same time, with a row that is its part of the sum; rows that
    are zeros but on one rank are allowed. The state is on the first rank alone.

    Args:
        mechanism: used on the first rank; may be None on the others.
        process_group: of the ranks; the default one.

    Raises:
        ValueError: the first rank has no mechanism.

    Examples:
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
            TypeError: the row is no tensor.
            RuntimeError: on the other ranks, when the first one raised.
        """
        require_type(isinstance(row, Tensor), "OnOneRank", "row", "must be a tensor", row)
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
    noise; with `num_classes` the columns are the cells of a confusion matrix. One example changes
    two of them by at most 1, if it is in one batch: Δ = √2.

    Args:
        batches: number of updates, T.
        budget: of all releases together, for every example; a pure one takes Laplace noise.
        num_classes: K, for `confusion`; the accuracy is then its diagonal's, with more noise.
        noise: draws the noise in place of the counter's own; for tests.

    Raises:
        ValueError: an argument is outside its range; it is named.

    Examples:
        >>> accuracy = PrivateAccuracy(100, budget=Budget(rho=0.5))
        >>> accuracy.update(torch.tensor([1, 0, 2]), torch.tensor([1, 1, 2]))
        >>> 0.0 <= accuracy.compute() <= 1.0
        True
    """

    def __init__(
        self,
        batches: int,
        *,
        budget: Budget,
        num_classes: int | None = None,
        noise: Noise | None = None,
    ) -> None:
        """Begin with no batches; see the class."""
        integer("PrivateAccuracy", "batches", batches, at_least=1)
        if num_classes is not None:
            integer("PrivateAccuracy", "num_classes", num_classes, at_least=2)
        require_type(
            isinstance(budget, Budget), "PrivateAccuracy", "budget", "must be a Budget", budget
        )
        self.num_classes = num_classes
        shape = (2,) if num_classes is None else (num_classes, num_classes)
        sensitivity = 2.0 if budget.pure_epsilon is not None else 2**0.5
        self.counter = TreeCounter(
            batches, shape, budget=budget, row_sensitivity=sensitivity, noise=noise
        )
        self._base = torch.zeros(shape, dtype=torch.int64)  # a release: counts before the reset
        self._since = 0

    def update(self, predicted: Tensor, target: Tensor, *, commit: Commit | None = None) -> None:
        """Count a batch of class indices of one shape; the release goes into `compute`.

        Args:
            predicted: class indices.
            target: the right ones.
            commit: as in `Mechanism.update`; it is given what `state_dict` will return.

        Raises:
            HorizonExceeded, TypeError, ValueError: as the counter, or for other tensors; nothing
                has changed.
        """
        for name, value in (("predicted", predicted), ("target", target)):
            require_type(
                isinstance(value, Tensor), "PrivateAccuracy", name, "must be a tensor", value
            )
        shapes = [list(predicted.shape), list(target.shape)]
        fits = predicted.shape == target.shape
        require(fits, "PrivateAccuracy", "predicted", "must have the shape of target", shapes)
        row = self._row(predicted, target).to(self.counter.device)
        write = None if commit is None else lambda state: commit(self._with_base(state))
        self.counter.update(row, commit=write)

    def _row(self, predicted: Tensor, target: Tensor) -> Tensor:
        if self.num_classes is None:
            right = (predicted == target).sum()
            return torch.stack([right, torch.full_like(right, target.numel())])
        classes = self.num_classes
        for name, value in (("predicted", predicted), ("target", target)):
            whole = not (value.is_floating_point() or value.is_complex())
            inside = whole and bool(((value >= 0) & (value < classes)).all())
            rule = f"must hold class indices below {classes}"
            require(inside, "PrivateAccuracy", name, rule, str(value.dtype))
        cells = target.flatten().long() * classes + predicted.flatten().long()
        return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes)

    def compute(self) -> float:
        """Return the released accuracy since the reset, in [0, 1]; NaN before a batch."""
        counts = self._counts()
        if counts is None:
            return float("nan")
        if self.num_classes is None:
            right, answers = (int(count) for count in counts)
        else:
            right, answers = int(counts.trace()), int(counts.sum())
        return min(1.0, max(0.0, right / max(1, answers)))

    def confusion(self) -> Tensor:
        """Return released counts since the reset, int64 [K, K], by target and prediction.

        They are as the noise left them: some may be negative.

        Raises:
            ValueError: there is no `num_classes`.
        """
        known = self.num_classes is not None
        rule = "must be given for a confusion matrix"
        require(known, "PrivateAccuracy", "num_classes", rule, self.num_classes)
        counts = self._counts()
        return torch.zeros_like(self._base) if counts is None else counts

    def _counts(self) -> Tensor | None:
        counts: Tensor | None = self.counter.last() if self.counter.t > self._since else None
        return None if counts is None else counts.cpu() - self._base

    def reset(self) -> None:
        """Count from here, at no cost: what was released is taken off. The horizon goes on."""
        if self.counter.t:
            self._base, self._since = self.counter.last().cpu(), self.counter.t

    @property
    def spent(self) -> Budget:
        """What the releases so far have cost."""
        return self.counter.spent

    def _with_base(self, state: State) -> State:
        return {"counter": state, "base": self._base.clone(), "since": self._since}

    def state_dict(self) -> State:
        """Return the whole state: as sensitive as the data."""
        return self._with_base(self.counter.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            TypeError, ValueError: it is no such state, or of other settings; nothing has changed.
        """
        is_mapping = isinstance(state_dict, Mapping)
        require_type(is_mapping, "PrivateAccuracy", "state_dict", "must be a mapping", state_dict)
        for name in ("counter", "base", "since"):
            there = name in state_dict
            require(there, "PrivateAccuracy", "state_dict", f"must hold {name!r}", "none")
        base, since = state_dict["base"], state_dict["since"]
        wanted, found = kind_of(self._base), kind_of(base)
        rule = f"must hold 'base' as {wanted}"
        require(found == wanted, "PrivateAccuracy", "state_dict", rule, found)
        integer("PrivateAccuracy", "state_dict['since']", since, at_least=0)
        self.counter.load_state_dict(state_dict["counter"])
        self._base, self._since = base.cpu().clone(), since

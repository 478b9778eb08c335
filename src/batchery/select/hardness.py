# SPDX-License-Identifier: Apache-2.0
"""How hard every batch or example was: losses, reported in any order by any rank, become scores.

The inside of `batchery.select.hard_batches`, which states the method; use it there. A unit is a
batch or an example. At the end of a round, for every unit i that has reports,

    loss_i = Σ l_j / count      over its examples j reported on any rank; l_j is a rank's last of j
    s_i   ← keep s_i + (1 - keep) loss_i        or loss_i, when there is no score yet or keep is 0

`selection` chooses by these scores.
"""

import math
import reprlib
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from batchery._core.dist import all_reduce_sum_, rank_and_size
from batchery.select.selection import Floats, Ints


def as_indices(indices: Sequence[int] | Ints | Tensor) -> Tensor:
    """Return a copy of indices as int64 `[n]`, on their device; of pairs (index, shape) the first.

    Raises:
        TypeError: they are not whole numbers.

    Examples:
        >>> as_indices([3, 1]), as_indices(torch.tensor([[2]], dtype=torch.uint8))
        (tensor([3, 1]), tensor([2]))
    """
    if isinstance(indices, np.ndarray) and indices.dtype.kind in "iu":
        return torch.from_numpy(indices.astype(np.int64).reshape(-1))
    if isinstance(indices, Tensor):
        whole = not (indices.is_floating_point() or indices.is_complex())
        if whole and indices.dtype != torch.bool:
            return indices.to(torch.int64, copy=True).flatten()
    else:
        with suppress(TypeError, struct.error):  # what is no row of integers
            if isinstance(next(iter(indices), None), tuple):  # a batch drawn with a shape
                indices = [index for index, _ in indices]  # type: ignore[misc]
            packed = struct.pack(f"{len(indices)}q", *indices)  # thrice as fast as an array of them
            return torch.from_numpy(np.frombuffer(packed, np.int64).copy())
    got = reprlib.repr(indices)
    raise TypeError(f"HardBatchSampler: indices must be whole numbers, got {got}")


def as_losses(loss: float | Sequence[float] | Tensor) -> Tensor:
    """Return a copy of losses as `[n]`, on their device and of their dtype.

    Raises:
        TypeError: they are no numbers.

    Examples:
        >>> as_losses(0.5), as_losses(torch.ones(2, 1))
        (tensor([0.5000]), tensor([1., 1.]))
    """
    if isinstance(loss, Tensor):
        # A copy: captured graphs write over their outputs.
        return loss.detach().clone().flatten()
    with suppress(TypeError, ValueError, RuntimeError):  # what torch makes no tensor of
        return torch.tensor(loss).flatten()
    got = reprlib.repr(loss)
    raise TypeError(f"HardBatchSampler: loss must be a number or a tensor, got {got}")


class Hardness:
    """A score for each unit, made of reported losses.

    Reports wait, on their device, until `absorb`. Of several on one example the last counts; a
    unit's new loss is the mean over its examples, on all ranks.

    Args:
        examples: examples in the data set.
        units: units that have a score.
        keep: weight of the old score in the new; 0 forgets it.

    Attributes:
        scores: float32 `[units]`, NaN where there is none.
        last_seen: int32 `[units]`, the last round that trained on the unit; -1 for none.
        not_finite: reported losses that were not finite; they leave the score as it is.
    """

    def __init__(self, examples: int, units: int, keep: float) -> None:
        """Know nothing; see the class."""
        self.examples = examples
        self.keep = keep
        self.scores = torch.full((units,), torch.nan)
        self.last_seen = torch.full((units,), -1, dtype=torch.int32)
        self.not_finite = 0
        self._reports: list[tuple[Tensor, Tensor, int]] = []

    def report(self, examples: Tensor, losses: Tensor, unit: int = -1) -> None:
        """Take losses (`[n]` or `[1]`, of any dtype) of examples (int64 `[n]`), not yet looked at.

        A unit says that these are all of its examples on this rank, and that they share one loss.
        """
        self._reports.append((examples, losses, unit))

    def check(self, examples: Tensor) -> None:
        """Raise `IndexError` when an index lies outside the data set."""
        # As unsigned, what is negative lies beyond all: one look instead of two.
        if examples.numel() and examples.numpy().view(np.uint64).max() >= self.examples:
            low, high = (int(end) for end in torch.aminmax(examples))
            rule, got = f"indices must be >= 0 and < {self.examples}", low if low < 0 else high
            raise IndexError(f"HardBatchSampler: {rule}, got {got}")

    def reports(self) -> tuple[Tensor, Tensor]:
        """Return this rank's waiting reports, a loss for each example; two transfers in all."""
        if self._reports:
            one = _joined([of for of, *_ in self._reports])
            whole = [
                loss if loss.numel() == of.numel() else loss.expand(of.numel())
                for of, loss, _ in self._reports
            ]
            two = _joined(whole).float()
            self.check(one)  # those of another device were not looked at before
            self._reports = [(one, two, -1)]
            return one, two
        return torch.empty(0, dtype=torch.int64), torch.empty(0)

    def absorb(
        self, units_of: Callable[[Ints], Ints] | None, process_group: dist.ProcessGroup | None
    ) -> None:
        """Turn the waiting reports of all ranks into scores: one collective.

        Args:
            units_of: gives the units of examples, -1 for an example that is in none; None when
                every example is a unit.
            process_group: the ranks whose reports belong together.
        """
        units, losses = self._new_losses(units_of, process_group)
        self._reports = []
        scores = self.scores.numpy()
        if self.keep:
            old = scores[units]
            blend = self.keep * old + (1 - self.keep) * losses
            losses = np.where(np.isnan(old), losses, blend)
        scores[units] = losses  # of repeated indices numpy keeps the last

    def _new_losses(
        self, units_of: Callable[[Ints], Ints] | None, process_group: dist.ProcessGroup | None
    ) -> tuple[Ints, Floats]:
        """Return the units with finite reports and the mean loss of each over its examples.

        They are all different, unless the last of several losses is all that counts.
        """
        total = len(self.scores)
        if self._reports and all(unit >= 0 for *_, unit in self._reports):
            tally = self._tally_units(total)
        else:
            examples, losses = (tensor.numpy() for tensor in self.reports())
            finite = self._finite(losses, np.broadcast_to(1, len(losses)))
            if not finite.all():
                examples, losses = examples[finite], losses[finite]
            alone = units_of is None and rank_and_size(process_group)[1] == 1
            if alone and not self.keep:
                return examples, losses
            known, latest = _latest(examples, losses, self.examples)
            if alone:
                return known, latest
            tally = _tally(units_of(known) if units_of else known, latest, total)
        means = _means(_sum_over_ranks(tally, process_group)).numpy()
        known = np.flatnonzero(~np.isnan(means))
        return known, means[known]

    def _tally_units(self, total: int) -> Tensor:
        """Return what `_tally` would of reports on whole units, without a look at examples.

        To the bit: a float64 holds the sum of equal float32 exactly.
        """
        units = np.array([unit for *_, unit in self._reports], np.int64)
        sizes = np.array([of.numel() for of, *_ in self._reports], np.int64)
        losses = _joined([loss for _, loss, _ in self._reports]).float().numpy()
        finite = self._finite(losses, sizes)
        known, latest = _latest(units[finite], losses[finite], total)
        counts, tally = np.zeros(total), np.zeros((2, total))
        counts[units] = sizes
        tally[:, known] = latest * counts[known], counts[known]
        return torch.from_numpy(tally)

    def _finite(self, losses: Floats, sizes: Ints) -> npt.NDArray[np.bool_]:
        """Return which losses are finite, and count the examples that the others stand for."""
        finite = np.isfinite(losses)
        if not finite.all():
            if not self.not_finite:
                warnings.warn("HardBatchSampler: a reported loss is not finite", stacklevel=3)
            self.not_finite += int(sizes[~finite].sum())
        return finite

    def complete(self, unseen: float = math.inf) -> Floats:
        """Return scores to select by: without one, `unseen` if never trained on, else lowest."""
        scores: Floats = self.scores.numpy().copy()
        blank = np.flatnonzero(np.isnan(scores))
        scores[blank] = np.where(self.last_seen.numpy()[blank] < 0, unseen, -np.inf)
        return scores

    def mean(self, units: Ints | None = None) -> float:
        """Return the mean of the scores there are; NaN when there is none."""
        scores = self.scores.numpy() if units is None else self.scores.numpy()[units]
        blank = np.isnan(scores)
        known = scores[~blank] if blank.any() else scores
        return float(known.mean(dtype=np.float64)) if len(known) else math.nan

    def move(self, old: Ints, new: Ints) -> None:
        """Carry scores over to other units: example i leaves unit `old[i]` for `new[i]`.

        A new unit has the mean of the scores, and the age of the oldest, that its examples bring;
        -1 stands for no unit.
        """
        moved = (old >= 0) & (new >= 0)
        old, new = old[moved], new[moved]
        total, latest = len(self.scores), self.last_seen.numpy()
        brought = self.scores.numpy()[old]
        scored = ~np.isnan(brought)
        self.scores = _means(_tally(new[scored], brought[scored], total))
        oldest = np.full(total, latest.max(), np.int32)
        np.minimum.at(oldest, new, latest[old])
        self.last_seen = torch.from_numpy(oldest)

    def state_dict(self) -> dict[str, Any]:
        """Return scores, ages and this rank's waiting reports."""
        examples, losses = self.reports()
        return {
            "scores": self.scores.clone(),
            "last_seen": self.last_seen.clone(),
            "not_finite": self.not_finite,
            "reported_examples": examples,
            "reported_losses": losses,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, own: bool) -> None:
        """Load a state; reports only when it is this rank's own, else they would count twice."""
        self.scores = state_dict["scores"].clone()
        self.last_seen = state_dict["last_seen"].clone()
        self.not_finite = state_dict["not_finite"]
        reports = (state_dict["reported_examples"], state_dict["reported_losses"], -1)
        self._reports = [reports] if own else []


def _joined(tensors: list[Tensor]) -> Tensor:
    """Return tensors as one, on the CPU: one transfer when all lie on one device."""
    if not all(tensor.is_cpu for tensor in tensors):
        tensors = [tensor.to(tensors[0].device) for tensor in tensors]
    return torch.cat(tensors).cpu()


def _latest(keys: Ints, losses: Floats, total: int) -> tuple[Ints, Floats]:
    """Return the keys that there are, ascending and below `total`, and the last loss of each."""
    latest = np.full(total, np.nan, np.float32)
    latest[keys] = losses  # of repeated indices numpy keeps the last
    known = np.flatnonzero(~np.isnan(latest))
    return known, latest[known]


def _tally(units: Ints, values: Floats, total: int) -> Tensor:
    """Return sums and counts of the values by unit, -1 left out: float64 `[2, total]`."""
    inside = units >= 0
    values, units = values[inside], units[inside]
    sums = np.bincount(units, values, total)
    return torch.from_numpy(np.stack([sums, np.bincount(units, minlength=total)]))


def _means(tally: Tensor) -> Tensor:
    """Return sums over counts: float32, NaN where nothing was counted."""
    return (tally[0] / tally[1]).float()


def _sum_over_ranks(tally: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    if rank_and_size(process_group)[1] == 1:
        return tally
    on_cpu = "cpu" in dist.get_backend_config(process_group)
    return all_reduce_sum_(tally.to("cpu" if on_cpu else "cuda"), process_group).cpu()

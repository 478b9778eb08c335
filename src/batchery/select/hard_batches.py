# SPDX-License-Identifier: Apache-2.0
r"""Hard batches: after one ordinary epoch, train only on the batches whose last loss was highest.

Use it as an importance-sampling baseline where a part of the data stays hard: rare classes, long
tails; prefer `mode="sample"`. Do not expect much from the paper's own form. Its batches are fixed,
so a batch's loss is a mean of B random losses and differs from other batches' by σ/√B, and most
of what selection does is to visit some batches more often. With noisy labels the highest losses
are the wrong labels: lower `clip_quantile`. The gradient is biased to what is hard, by design.

With n units (batches, or examples in sample mode), score s_i and k = max(1, int(δ n)):

    round 0 … warmup-1    all n units; s_i = loss of unit i in its own update, before the step
    later rounds          the k units of highest s; ties: the one ranked higher before
                          a score stays as it is until its unit is trained again ("stale"), or
                          s_i ← a s_i + (1-a) loss ("ema")

With a temperature τ the k units of a later round are drawn, with replacement, at

    p_i ∝ exp(s_i / τ)        and 1 / (n p_i) times a unit's loss has the mean of all as its mean

A budget of E epochs is E·b updates over b batches, not E passes: `train_budget`. Training with
equal updates is the only fair comparison.

Reference: Sahayam, Zakkam, Jayaraman, "Can we learn better with hard samples?", arXiv 2304.03486.

Where we differ: the authors' code does not shuffle before it fixes the batches
(`shuffle_partition=False`), loads the batches that it skips, never trains when δ b < 1 (k is at
least 1 here), and passes over the data until a number of updates is reached, which its "zeta"
does not bound; we have no zeta. The text can be read as re-evaluating all losses in each round:
for that, report a forward pass over the data before each `iter()`; of several reports on an
example within a round the last counts. A unit without a score goes first if it was never
trained and last if its loss was never finite. Ties in sample mode go to the lower index, since
a ranking of all examples would cost more than the selection.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from batchery._core.random import new_generator
from batchery._core.validate import integer, number, one_of, require
from batchery.select import selection
from batchery.select.batch_sampler import ResumableBatchSampler
from batchery.select.hardness import Hardness, as_indices, as_losses
from batchery.select.selection import Ints, RoundStats


def train_budget(
    num_batches: int, epochs: int, delta: float, warmup_epochs: int = 1
) -> tuple[int, int]:
    """Return (rounds, updates) that equal `epochs` ordinary epochs in updates.

    The last round is cut short where the updates are used up.

    Args:
        num_batches: b, batches of an ordinary epoch.
        epochs: E, at least `warmup_epochs`.
        delta: share of the batches that a round keeps, in (0, 1].
        warmup_epochs: rounds that keep all.

    Examples:
        >>> train_budget(10, epochs=4, delta=0.4)  # 10 + 7 · 4 + 2
        (9, 40)
    """
    owner = "train_budget"
    integer(owner, "num_batches", num_batches, at_least=1)
    integer(owner, "warmup_epochs", warmup_epochs, at_least=1)
    integer(owner, "epochs", epochs, at_least=warmup_epochs)
    number(owner, "delta", delta, above=0, at_most=1)
    kept = max(1, int(delta * num_batches))
    later = math.ceil((epochs - warmup_epochs) * num_batches / kept)
    return warmup_epochs + later, epochs * num_batches


class HardBatchSampler(ResumableBatchSampler):
    """A batch sampler whose passes, after the first, hold only what was hardest.

    Iterating yields one round; in the base class's words a round is an epoch. Report the loss of
    every batch with `update`. The selection of a round uses what was reported before its `iter()`,
    so that a loader may read ahead within the round.

    On several ranks each trains and reports its share of the same global batches. At the end of a
    round the ranks add up their reports in one collective, inside `iter()` or `set_epoch()`. With
    `rank` and `world_size` given and no process group, report every rank's losses to every rank.

    Args:
        data_source_or_len: the data set, or its number of examples.
        batch_size: examples of a global batch, over all ranks.
        delta: δ, the share of units that a round keeps, in (0, 1]; 1 is ordinary training. With
            `drop_last`, examples are kept in full batches.
        mode: select whole batches of a fixed partition (the paper), or examples.
        regroup: how a round's batches are made. `"fixed"` is batch mode's; in sample mode
            `"random"` shuffles the selected examples, `"sorted"` puts equally hard ones together.
        refresh: a new loss replaces the score, or is averaged into it (`"ema"`).
        ema: a, the weight of the old score.
        temperature: τ, in units of loss; units are drawn by their scores instead of taken from the
            top, and `importance_weights` makes up for it. None takes the top.
        exploration: probability that a selected unit gives way to a random unselected one.
        max_age: a unit left out of this many rounds in a row is in the next; 0 is off. More such
            units than a round holds wait for their turn, the oldest first.
        warmup_epochs: rounds that keep everything, at least 1.
        order: in which the selected batches are visited: by batch index, hardest first, or
            shuffled. A short batch comes last.
        shuffle_partition: draw the fixed batches at random; else cut them by index.
        repartition_every: in batch mode, draw new batches every so many rounds, whose scores are
            the means that their examples bring along; 0 is never. With `drop_last` a partition
            that stays leaves out the same examples for ever.
        clip_quantile: units above this quantile of the scores come last; below 1 where labels are
            noisy.
        drop_last: leave out what does not fill a batch.
        generator: whose initial seed decides everything random.
        rank: as in the base class, and so are the two that follow.
        world_size: number of processes.
        process_group: the ranks that share the batches and add up their scores.

    Raises:
        ValueError: an argument is out of range, belongs to the other mode, or leaves fewer than
            two batches.

    Examples:
        >>> sampler = HardBatchSampler(8, 2, delta=0.5, shuffle_partition=False)
        >>> for batch, loss in zip(sampler, [0.1, 0.9, 0.4, 0.7]):
        ...     sampler.update(loss)
        >>> list(sampler), sampler.selected.tolist()
        ([[2, 3], [6, 7]], [1, 3])
    """

    _saved: ClassVar[dict[str, type]] = ResumableBatchSampler._saved | {
        **dict.fromkeys(("rank", "partition_number", "not_finite"), int),
        **dict.fromkeys(("ranking", "scores", "last_seen"), Tensor),
        **dict.fromkeys(("reported_examples", "reported_losses"), Tensor),
    }

    def __init__(
        self,
        data_source_or_len: Sized | int,
        batch_size: int,
        delta: float = 0.5,
        *,
        mode: Literal["batch", "sample"] = "batch",
        regroup: Literal["fixed", "random", "sorted"] | None = None,
        refresh: Literal["stale", "ema"] = "stale",
        ema: float = 0.9,
        temperature: float | None = None,
        exploration: float = 0.0,
        max_age: int = 0,
        warmup_epochs: int = 1,
        order: Literal["index", "hardest", "shuffle"] = "index",
        shuffle_partition: bool = True,
        repartition_every: int = 0,
        clip_quantile: float = 1.0,
        drop_last: bool = True,
        generator: torch.Generator | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Check the arguments and draw the batches; see the class."""
        owner = type(self).__name__
        one_of(owner, "mode", mode, ("batch", "sample"))
        whole = mode == "batch"
        regroup = regroup or ("fixed" if whole else "random")
        groups = ("fixed",) if whole else ("random", "sorted")
        orders = ("index", "shuffle") if regroup == "random" else ("index", "hardest", "shuffle")
        one_of(owner, f"regroup in mode {mode!r}", regroup, groups)
        one_of(owner, f"order with regroup {regroup!r}", order, orders)
        one_of(owner, "refresh", refresh, ("stale", "ema"))
        self.delta = number(owner, "delta", delta, above=0, at_most=1)
        self.ema = number(owner, "ema", ema, at_least=0, at_most=1)
        self.exploration = number(owner, "exploration", exploration, at_least=0, at_most=1)
        self.clip_quantile = number(owner, "clip_quantile", clip_quantile, above=0, at_most=1)
        self.max_age = integer(owner, "max_age", max_age, at_least=0)
        if temperature is not None:
            number(owner, "temperature", temperature, above=0)
            plain = exploration == 0 and max_age == 0
            rule = "must be None with exploration or max_age, whose weights are not known"
            require(plain, owner, "temperature", rule, temperature)
            rule = "must be None in mode 'batch' without drop_last: a short batch may come twice"
            require(drop_last or not whole, owner, "temperature", rule, temperature)
        self.warmup_epochs = integer(owner, "warmup_epochs", warmup_epochs, at_least=1)
        self.repartition_every = integer(owner, "repartition_every", repartition_every, at_least=0)
        fits = repartition_every == 0 or (whole and shuffle_partition)
        rule = "must be 0 unless mode is 'batch' and shuffle_partition is on"
        require(fits, owner, "repartition_every", rule, repartition_every)
        super().__init__(
            data_source_or_len,
            batch_size,
            shuffle=shuffle_partition,
            drop_last=drop_last,
            generator=generator,
            rank=rank,
            world_size=world_size,
            process_group=process_group,
        )
        self.mode, self.regroup, self.order = mode, regroup, order
        self.refresh, self.temperature = refresh, temperature
        batches = self.batches_per_epoch
        require(batches >= 2, owner, "data_source_or_len", "must make at least 2 batches", batches)
        self._unit_size = batch_size if whole else 1  # examples of a unit
        units, least = (batches, 1) if whole else (self.num_examples, batch_size)
        kept = max(least, int(delta * units))
        if delta * units < least:
            message = f"{owner}: delta {delta} is less than one batch; keeping one"
            warnings.warn(message, stacklevel=2)
        self._kept = kept - kept % least if drop_last else kept
        keep = ema if refresh == "ema" else 0.0
        self._hardness = Hardness(self.num_examples, units, keep)
        self._ranking = np.arange(units if whole else 0)
        self._reported = 0  # batches since iter() that were reported without indices
        self._partition_number = 0
        if whole:
            self._deal(0)

    @property
    def batches_per_epoch(self) -> int:
        """b, the number of batches that would hold all examples."""
        full, rest = divmod(self.num_examples, self._first_batch_size)
        return full + (rest > 0 and not self.drop_last)

    def _deal(self, number: int) -> None:
        """Draw the fixed batches: the order they are cut from, and the batch of each example."""
        size, count = self._first_batch_size, self.num_examples
        generator = new_generator(self._seed, "partition", number) if self.shuffle else None
        self._partition, self._batch_of = selection.deal(count, size, self.drop_last, generator)
        self._partition_number = number

    def _units_of(self, examples: Ints) -> Ints:
        """Return the units that examples belong to; -1 for those that are in no batch."""
        return examples if self.mode == "sample" else self._batch_of[examples]

    def update(self, loss: float | Tensor, indices: Sequence[int] | Tensor | None = None) -> None:
        """Report the loss of a batch, or of examples. Nothing waits for the device.

        Losses that are not finite leave scores as they are; they are counted in `not_finite`, and
        the first ones warn.

        Args:
            loss: mean loss of this rank's share of a batch (a number or a tensor of one element),
                or a loss for each of its examples (`[n]`), of any floating dtype, on any device.
            indices: the examples' indices in the data set (`[n]`). Without them the report is on
                the first batch since `iter()` that has none: report every batch, in order. They are
                needed where batches come in another order, or not all to this process.

        Raises:
            TypeError: what should be numbers is not.
            IndexError: an index is outside the data set (raised at the next round when indices
                lie on another device than the CPU).
            ValueError: the number of losses is neither 1 nor that of the indices.
            RuntimeError: every yielded batch has been reported.

        Examples:
            >>> sampler = HardBatchSampler(6, 2, mode="sample")
            >>> sampler.update(torch.arange(6.0), range(6))  # a pass over all, before a round
            >>> sampler.set_epoch(1)
            >>> sorted(sampler.selected.tolist())  # of three, one full batch
            [4, 5]
        """
        owner, unit, losses = type(self).__name__, -1, as_losses(loss)
        given = losses.numel()
        if indices is not None:
            examples = as_indices(indices)
            if examples.is_cpu:
                self._hardness.check(examples)
        elif self._reported + 1 < len(self._ends):
            start, end = self._ends[self._reported : self._reported + 2]
            examples = torch.from_numpy(self._share(self._reported))
            if given == 1 and end - start <= self._unit_size:  # else a short batch has joined it
                unit = int(self._selected[start // self._unit_size])
        else:
            raise RuntimeError(f"{owner}: update came for a batch that was not yielded yet")
        wanted = examples.numel()
        require(given in (1, wanted), owner, "loss", f"must be 1 number or {wanted}", given)
        self._reported += indices is None
        self._hardness.report(examples, losses, unit)

    def _end_pass(self) -> None:
        """Note what the round trained on, and turn its reports into scores."""
        if self._ends[-1] > 0:
            self._order()
            trained = self._selected[: math.ceil(self._ends[-1] / self._unit_size)]
            self._hardness.last_seen.numpy()[trained] = self._epoch
        units_of = None if self.mode == "sample" else self._units_of
        self._hardness.absorb(units_of, self.process_group)

    def _draw_order(self) -> Tensor:
        """Select this round's units and put their examples in order."""
        epoch, hardness = self._epoch, self._hardness
        number = epoch // self.repartition_every if self.repartition_every else 0
        if self.mode == "batch" and number != self._partition_number:
            before = self._batch_of
            self._deal(number)
            hardness.move(before, self._batch_of)
            self._ranking = np.arange(len(self._ranking))
        scores = hardness.complete()
        total = len(scores)
        count = total if epoch < self.warmup_epochs else self._kept
        selects = count < total
        if selects and self.clip_quantile < 1:
            noise = total - round(self.clip_quantile * total)
            scores[selection.highest(hardness.complete(unseen=-math.inf), noise)] = -np.inf
        if self.mode == "batch":
            self._ranking = self._ranking[selection.falling(scores[self._ranking])]
            chosen = self._ranking[:count]
        else:
            chosen = selection.highest(scores, count)
        generator = new_generator(self._seed, "round", epoch)
        self._weights = np.ones(total, np.float32)
        if selects and self.temperature is not None:
            chosen, self._weights = selection.draw(scores, count, self.temperature, generator)
        if selects and self.exploration:
            chosen = selection.explore(chosen, total, self.exploration, generator)
        if selects and self.max_age:
            age = epoch - 1 - hardness.last_seen.numpy()
            chosen = selection.force(chosen, scores, age, self.max_age)
        size, order = self._first_batch_size, self.order
        if self.mode == "batch":
            full = len(self._partition) // size
            self._selected = selection.visits(chosen, self._ranking, full, order, generator)
            return selection.examples_of(self._selected, self._partition, size)
        self._selected = selection.regrouped(chosen, scores, size, self.regroup, order, generator)
        return torch.from_numpy(self._selected)

    def __iter__(self) -> Iterator[list[Any]]:
        """Begin, go on with, or repeat a round; its selection uses what was reported before."""
        self._reported = 0
        return super().__iter__()

    def set_batch_size(self, batch_size: int, shape: Sequence[int] | None = None) -> None:
        """Change the form of batches not cut yet; in batch mode their size is fixed."""
        fits = self.mode == "sample" or batch_size == self.batch_size
        require(fits, type(self).__name__, "batch_size", "is fixed in mode 'batch'", batch_size)
        super().set_batch_size(batch_size, shape)

    @property
    def scores(self) -> Tensor:
        """Scores of all units as the round in hand uses them: float32, NaN where there is none."""
        return self._hardness.scores.clone()

    @property
    def selected(self) -> Tensor:
        """The batches, or in sample mode the examples, of the round in hand, in their order."""
        self._order()
        return torch.from_numpy(self._selected.copy())

    def importance_weights(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return what to multiply the losses of examples by in the round in hand.

        1 / (n p) for units drawn with probability p (see `temperature`), so that the mean loss of a
        round has the mean over all units as its expectation; 1 where nothing was drawn.

        Args:
            indices: of examples, as batches hold them.

        Returns:
            float32 `[len(indices)]`, on the CPU.
        """
        self._order()
        examples = as_indices(indices).cpu()
        self._hardness.check(examples)
        return torch.from_numpy(self._weights[self._units_of(examples.numpy())])

    @property
    def last_round(self) -> RoundStats:
        """What the selection of the round in hand looked like."""
        self._order()
        hardness, oldest = self._hardness, int(self._hardness.last_seen.min())
        age = self._epoch - 1 - oldest
        return RoundStats(hardness.mean(self._selected), hardness.mean(), age)

    @property
    def not_finite(self) -> int:
        """How many examples were reported, up to the last round, with a loss that is not finite."""
        return self._hardness.not_finite

    def _settings(self) -> dict[str, Any]:
        own = (
            *("delta", "mode", "regroup", "refresh", "ema", "temperature", "exploration"),
            *("max_age", "warmup_epochs", "order", "repartition_every", "clip_quantile"),
        )
        return super()._settings() | {name: getattr(self, name) for name in own}

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return where training stands, with scores, ages and the reports of this round.

        Report every batch that counts as consumed first. On several ranks each saves its own
        state, as it does its random states: reports of the round in hand differ by rank until its
        end. One rank's state, loaded everywhere, loses the others' reports of that round.

        Args:
            consumed: as in the base class.
        """
        return super().state_dict(consumed) | {
            "rank": self._place()[0],
            "ranking": torch.from_numpy(self._ranking.copy()),
            "partition_number": self._partition_number,
            **self._hardness.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Stand where a state was taken, with the scores and reports of then.

        Raises:
            ValueError: the state is of another class, of other settings or sizes; both are named.
            TypeError: it is no mapping, or holds a value of another type.
        """
        super().load_state_dict(state_dict)
        if self.mode == "batch":
            self._deal(state_dict["partition_number"])
        self._ranking = state_dict["ranking"].numpy().copy()
        self._reported = 0
        self._hardness.load_state_dict(state_dict, own=state_dict["rank"] == self._place()[0])

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        super()._check_state(state_dict)
        current, reported = self._hardness, state_dict["reported_examples"].numel()
        for name, like, shape in (
            ("ranking", torch.int64, self._ranking.shape),
            ("scores", torch.float32, current.scores.shape),
            ("last_seen", torch.int32, current.last_seen.shape),
            ("reported_examples", torch.int64, (reported,)),
            ("reported_losses", torch.float32, (reported,)),
        ):
            value, rule = state_dict[name], f"must be of {like} and shape {tuple(shape)}"
            fits = value.dtype == like and value.shape == shape
            got = f"{value.dtype} and {tuple(value.shape)}"
            require(fits, type(self).__name__, f"state_dict[{name!r}]", rule, got)

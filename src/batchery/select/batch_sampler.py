# SPDX-License-Identifier: Apache-2.0
"""A batch sampler that stops and resumes anywhere, on any number of ranks, at any batch size.

Use it as `DataLoader(data, batch_sampler=…)` where training may be interrupted within an epoch, or
where the size of batches or the shape of their examples changes while it runs. For neither, torch's
own samplers do. The selecting samplers of this package stand on it and change one thing: which
examples a pass holds, in which order.

A pass over the data (an epoch; a round of a selecting sampler) is an order of examples, a pure
function of seed and epoch. Global batches are cut from it one after another, and of each the rank
r of W takes every W-th example:

    batch k  = order[p_k : p_{k+1}]      p_0 = 0,  p_{k+1} = p_k + size in force when k is cut
    rank r   : batch[r], batch[r+W], batch[r+2W], …

So the state is a position, not a list of indices. Two rules for the end of a pass:

- `drop_last`: what is less than a batch is left out, on all ranks alike (others the next time when
  the order is shuffled).
- otherwise every example comes once, on one rank: the last batch is short, ranks' shares differ by
  one at most, and fewer examples than ranks join the batch before, so that no rank goes without.

A loader with workers draws batches long before training sees them, and only the training loop
knows how many it has used. Count them from the start of the loop and say so:

    for done, batch in enumerate(loader, 1):
        ...
        state = sampler.state_dict(consumed=done)

Batches drawn but not used are then drawn again after a resume, at the sizes and shapes they had.
Without a loader, or one that does not read ahead, `state_dict()` alone is right.

With a shape in force a batch is a list of pairs (index, shape), for a data set whose `__getitem__`
takes such a pair and gives an example of that shape: so many frames, so many pixels, so many
tokens.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from batchery._core.dist import rank_and_size
from batchery._core.random import new_generator, seed_of
from batchery._core.state import check_fits
from batchery._core.validate import integer, one_of, require, require_type

Ints = npt.NDArray[np.int64]
Shape = tuple[int, ...]  # of an example; empty where none was asked for


class Form(NamedTuple):
    """What a global batch is to be: so many examples, of a shape."""

    size: int
    shape: Shape


def cut(start: int, size: int, total: int, world_size: int, drop_last: bool) -> int | None:
    """Return where the global batch that begins at `start` ends; None when there is none.

    Args:
        start: position of its first example in the order.
        size: examples it should hold.
        total: examples in the order.
        world_size: ranks that share the batch.
        drop_last: leave out what is less than a batch.

    Examples:
        >>> [cut(start, 4, 10, 2, False) for start in (0, 4, 8, 10)], cut(8, 4, 10, 2, True)
        ([4, 8, 10, None], None)
        >>> cut(4, 4, 9, 2, False)  # one example for two ranks joins the batch before
        9
    """
    left = total - start
    if left < size:
        return total if left > 0 and not drop_last else None
    joins = 0 < left - size < world_size and not drop_last
    return total if joins else start + size


def count_batches(start: int, size: int, total: int, world_size: int, drop_last: bool) -> int:
    """Return how many batches `cut` makes from `start` on."""
    full, rest = divmod(max(total - start, 0), size)
    joins = rest < world_size and full > 0
    return full + (rest > 0 and not drop_last and not joins)


class ResumableBatchSampler(Sampler[list[Any]]):
    """Batches of indices, resumable within an epoch, shared by ranks, whose form may change.

    `iter()` begins the pass in hand, or the next one when that is used up; after
    `load_state_dict` it goes on where the state was taken. A pass left early begins anew. All
    ranks need the same arguments; a generator only lends its seed.

    Args:
        data_source_or_len: the data set, or its number of examples.
        batch_size: examples of a global batch, over all ranks: a multiple of the world size.
        shuffle: draw a new order for each epoch; else go by index.
        drop_last: leave out the examples at the end that do not fill a batch.
        generator: whose initial seed decides the orders; None is seed 0.
        rank: this process's number; by default its rank in `process_group`, when one runs.
        world_size: number of processes; given together with `rank`.
        process_group: the ranks that share the batches.

    Raises:
        ValueError: an argument is out of its range, or there are too few examples for one batch.
        TypeError: the data source has no length.

    Examples:
        >>> sampler = ResumableBatchSampler(10, 4, shuffle=False)
        >>> batches = iter(sampler)
        >>> next(batches)
        [0, 1, 2, 3]
        >>> state = sampler.state_dict()
        >>> again = ResumableBatchSampler(10, 4, shuffle=False)
        >>> again.load_state_dict(state)
        >>> list(again)
        [[4, 5, 6, 7], [8, 9]]
    """

    _saved: ClassVar[dict[str, type]] = {  # what a state holds beside the settings
        "seed": int,
        "epoch": int,
        "position": int,
        "batches": int,
        "ahead": list,
        "next_form": list,
        "over": bool,
    }

    def __init__(
        self,
        data_source_or_len: Sized | int,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Check the arguments and stand before the first pass; see the class."""
        owner = type(self).__name__
        if isinstance(data_source_or_len, Sized):
            count = len(data_source_or_len)
        else:
            rule = "must be an integer or have a length"
            whole = hasattr(data_source_or_len, "__index__")
            require_type(whole, owner, "data_source_or_len", rule, data_source_or_len)
            count = int(data_source_or_len)
        integer(owner, "batch_size", batch_size, at_least=1)
        together = (rank is None) == (world_size is None)
        require(together, owner, "rank", "must be given together with world_size", rank)
        if rank is not None and world_size is not None:
            integer(owner, "world_size", world_size, at_least=1)
            integer(owner, "rank", rank, at_least=0)
            require(rank < world_size, owner, "rank", f"must be < world_size {world_size}", rank)
        one_of(owner, "shuffle", shuffle, (True, False))
        one_of(owner, "drop_last", drop_last, (True, False))
        self.num_examples = count
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.process_group = process_group
        self._given = None if rank is None or world_size is None else (rank, world_size)
        self._seed = seed_of(owner, generator)
        self._form = Form(int(batch_size), ())
        self._first_batch_size = self._form.size
        self._check_batch_size(batch_size)
        fewest = batch_size if drop_last else self._place()[1]
        rule = f"must hold at least {fewest} examples"
        require(count >= fewest, owner, "data_source_or_len", rule, count)
        self._begin(0)

    # --- where it stands

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._start = 0  # position in the order at which iter() begins
        self._before = 0  # batches of this pass that lie before that position
        self._ahead: list[Form] = []  # of the next batches, which were cut before a resume
        self._ends = [0]  # the position at which iter() began, then the end of each batch since
        self._shapes: list[Shape] = []  # of each batch since
        self._over = False  # iter() has come to the end
        self._order_in_hand: Ints | None = None

    def _end_pass(self) -> None:
        """Do what is due between two passes."""

    def _draw_order(self) -> Tensor:
        """Return this pass's examples in order: int64, a pure function of the state at its start.

        This is what a subclass changes.
        """
        if not self.shuffle:
            return torch.arange(self.num_examples)
        generator = new_generator(self._seed, "order", self._epoch)
        return torch.randperm(self.num_examples, generator=generator)

    def _order(self) -> Ints:
        # An array: slices of it, once a batch, cost a tenth of a tensor's.
        if self._order_in_hand is None:
            self._order_in_hand = self._draw_order().numpy()
        return self._order_in_hand

    def _place(self) -> tuple[int, int]:
        """Return (rank, world size); a process group may start after this object was made."""
        return self._given or rank_and_size(self.process_group)

    def _next_form(self, ends: list[int], ahead: list[Form]) -> Form:
        done = len(ends) - 1
        return ahead[done] if done < len(ahead) else self._form

    def _next_end(self, ends: list[int], ahead: list[Form]) -> int | None:
        size, total = self._next_form(ends, ahead).size, len(self._order())
        return cut(ends[-1], size, total, self._place()[1], self.drop_last)

    def _is_used_up(self) -> bool:
        return self._over or self._next_end(self._ends, self._ahead) is None

    def _share(self, batch: int) -> Ints:
        """Return this rank's part of a batch, counted from the last `iter()`."""
        rank, world_size = self._place()
        return self._order()[self._ends[batch] + rank : self._ends[batch + 1] : world_size]

    # --- what users call

    @property
    def batch_size(self) -> int:
        """Examples of the next global batch to be cut."""
        return self._form.size

    @property
    def shape(self) -> Shape:
        """Shape of the examples of the next batch to be cut; empty where none was asked for."""
        return self._form.shape

    @property
    def epoch(self) -> int:
        """The pass that the next batch to be cut belongs to."""
        return self._epoch + self._is_used_up()

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of a pass; nothing happens when `iter()` would go on in it.

        With a process group, call it on every rank.
        """
        integer(type(self).__name__, "epoch", epoch, at_least=0)
        if epoch != self.epoch:
            self._end_pass()
            self._begin(epoch)

    def set_batch_size(self, batch_size: int, shape: Sequence[int] | None = None) -> None:
        """Change size and shape of the global batches that are not cut yet, in this pass and after.

        Call it on every rank before the same batch. A loader with workers has already cut some.

        Args:
            batch_size: examples of a global batch.
            shape: of its examples; batches are then lists of pairs (index, shape). By default the
                one in force stays; `()` goes back to plain indices.

        Raises:
            ValueError: the size is not a multiple of the world size, or a length is below 1.
            TypeError: the shape is no sequence of whole numbers.

        Examples:
            >>> sampler = ResumableBatchSampler(6, 2, shuffle=False)
            >>> batches = iter(sampler)
            >>> next(batches)
            [0, 1]
            >>> sampler.set_batch_size(4, shape=(8, 112, 112))
            >>> next(batches)[0]
            (2, (8, 112, 112))
        """
        owner = type(self).__name__
        integer(owner, "batch_size", batch_size, at_least=1)
        self._check_batch_size(batch_size)
        self._form = Form(int(batch_size), self.shape if shape is None else _shape(owner, shape))

    def _check_batch_size(self, batch_size: int) -> None:
        world_size = self._place()[1]
        rule = f"must be a multiple of world_size {world_size}"
        fits = batch_size % world_size == 0
        require(fits, type(self).__name__, "batch_size", rule, batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        """Begin, go on with, or repeat a pass; the order is fixed here, before the first batch."""
        self._check_batch_size(self.batch_size)
        if self._is_used_up():
            self._end_pass()
            self._begin(self._epoch + 1)
        self._order()
        self._ends, self._shapes = [self._start], []
        return self._walk(self._ends, self._shapes, self._ahead)

    def _walk(self, ends: list[int], shapes: list[Shape], ahead: list[Form]) -> Iterator[list[Any]]:
        self._require_current(ends)
        while (end := self._next_end(ends, ahead)) is not None:
            shape = self._next_form(ends, ahead).shape
            shapes.append(shape)
            ends.append(end)
            batch = self._share(len(ends) - 2).tolist()
            yield [(index, shape) for index in batch] if shape else batch
            self._require_current(ends)
        self._over = True

    def _require_current(self, ends: list[int]) -> None:
        if ends is not self._ends:
            raise RuntimeError(f"{type(self).__name__}: a later iter() has taken over")

    def __len__(self) -> int:
        """Return the number of batches in the pass in hand, those already yielded included."""
        ends = list(self._ends)
        while len(ends) <= len(self._ahead) and (end := self._next_end(ends, self._ahead)):
            ends.append(end)
        known = self._before + len(ends) - 1
        if self._over:
            return known
        total, world_size = len(self._order()), self._place()[1]
        return known + count_batches(ends[-1], self.batch_size, total, world_size, self.drop_last)

    def _settings(self) -> dict[str, Any]:
        """Return what a state must share with the object that loads it."""
        return {
            "num_examples": self.num_examples,
            "batch_size": self._first_batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return where training stands, as plain values.

        Args:
            consumed: batches that training has used since the last `iter()`; by default all that
                were yielded. A loader with workers yields ahead: count in the training loop.

        Raises:
            ValueError: `consumed` is negative or more than were yielded.

        Examples:
            >>> sampler = ResumableBatchSampler(8, 2, shuffle=False)
            >>> ahead = list(sampler)  # a loader has read all of it; training has used one
            >>> again = ResumableBatchSampler(8, 2, shuffle=False)
            >>> again.load_state_dict(sampler.state_dict(consumed=1))
            >>> next(iter(again))
            [2, 3]
        """
        owner, yielded = type(self).__name__, len(self._ends) - 1
        used = yielded if consumed is None else integer(owner, "consumed", consumed, at_least=0)
        require(used <= yielded, owner, "consumed", f"must be <= {yielded}, those yielded", used)
        ahead = [
            Form(self._ends[batch + 1] - self._ends[batch], self._shapes[batch])
            for batch in range(used, yielded)
        ] + self._ahead[yielded:]
        return self._settings() | {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._ends[used],
            "batches": self._before + used,
            "ahead": [[form.size, *form.shape] for form in ahead],
            "next_form": [self.batch_size, *self.shape],
            "over": self._over and used == yielded,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Stand where a state was taken: the next `iter()` goes on from there.

        The world size may differ from the one of the run that saved it.

        Raises:
            ValueError: the state is of another class or of other settings; both are named.
            TypeError: it is no mapping, or holds a value of another type.
        """
        self._check_state(state_dict)
        self._begin(state_dict["epoch"])
        self._seed = state_dict["seed"]
        self._start = state_dict["position"]
        self._before = state_dict["batches"]
        self._form, *self._ahead = (
            Form(form[0], tuple(form[1:]))
            for form in (state_dict["next_form"], *state_dict["ahead"])
        )
        self._over = state_dict["over"]
        self._ends = [self._start]

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse what cannot be loaded, before anything of it is."""
        owner = type(self).__name__
        mapping = isinstance(state_dict, Mapping)
        require_type(mapping, owner, "state_dict", "must be a mapping", state_dict)
        check_fits(owner, state_dict, self._settings())
        for name, kind in self._saved.items():
            require(name in state_dict, owner, "state_dict", f"must hold {name!r}", [*state_dict])
            value = state_dict[name]
            rule = f"must be of type {kind.__name__}"
            require_type(isinstance(value, kind), owner, f"state_dict[{name!r}]", rule, value)
        for name in ("epoch", "position", "batches"):
            integer(owner, f"state_dict[{name!r}]", state_dict[name], at_least=0)
        for form in (state_dict["next_form"], *state_dict["ahead"]):
            fits = isinstance(form, list | tuple) and len(form) > 0
            require_type(fits, owner, "forms in state_dict", "must be lists [size, *shape]", form)
            _shape(owner, form)

    def __repr__(self) -> str:
        """Show the settings and the position."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings}) at epoch {self._epoch}, {self._ends[-1]}"


def _shape(owner: str, lengths: Sequence[int]) -> Shape:
    """Return lengths as plain numbers, or raise a ValueError or TypeError."""
    rule = "must be a sequence of whole numbers"
    require_type(hasattr(lengths, "__iter__"), owner, "shape", rule, lengths)
    checked = [integer(owner, "shape", length, at_least=1) for length in lengths]
    return tuple(map(int, checked))

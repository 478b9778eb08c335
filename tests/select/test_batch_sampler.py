# SPDX-License-Identifier: Apache-2.0
"""Oracles of the batch sampler under all others. What every sampler owes is in tests/contracts."""

import json
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from dist_ranks import run_on_ranks
from torch.utils.data import DataLoader, TensorDataset

from batchery.select import ResumableBatchSampler
from batchery.select.batch_sampler import count_batches, cut


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def flat(batches):
    """The indices of batches, whose examples may come with a shape."""
    found = (example for batch in batches for example in batch)
    return [example[0] if isinstance(example, tuple) else example for example in found]


def cut_all(size, total, world_size, drop_last):
    ends = [0]
    while (end := cut(ends[-1], size, total, world_size, drop_last)) is not None:
        ends.append(end)
    return ends


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_cuts_follow_the_rules_for_every_length(world_size, drop_last):
    for size in (s for s in range(1, 9) if s % world_size == 0):
        for total in range(size if drop_last else world_size, 40):
            ends = cut_all(size, total, world_size, drop_last)
            lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
            assert ends[-1] == (total - total % size if drop_last else total)
            assert all(length == size for length in lengths[:-1])
            assert all(length >= world_size for length in lengths)
            assert lengths[-1] < size + world_size
            assert count_batches(0, size, total, world_size, drop_last) == len(lengths)


@pytest.mark.parametrize("total", [12, 13, 14, 15, 16, 17])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_an_uneven_end_without_loss_or_repeat(total, world_size):
    shares = [
        list(ResumableBatchSampler(total, 4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert Counter(flat(flat(shares))) == Counter(range(total))
    assert len({len(share) for share in shares}) == 1
    for parts in zip(*shares, strict=True):
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


def test_what_one_epoch_drops_another_brings():
    sampler = ResumableBatchSampler(11, 4, drop_last=True)
    epochs = [flat(sampler) for _ in range(8)]
    assert all(len(set(epoch)) == len(epoch) == 8 for epoch in epochs)
    assert set(flat(epochs)) == set(range(11))


def test_epochs_follow_each_other_in_different_orders():
    sampler = ResumableBatchSampler(12, 4, generator=seeded(3))
    first, second = list(sampler), list(sampler)
    assert first != second
    assert sampler.epoch == 2
    sampler.set_epoch(1)
    assert list(sampler) == second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(ResumableBatchSampler(6, 4, shuffle=False)) == [[0, 1, 2, 3], [4, 5]]


def test_naming_the_epoch_that_comes_anyway_changes_nothing():
    plain, named = (ResumableBatchSampler(12, 4) for _ in range(2))
    stream = [list(plain) for _ in range(3)]
    for epoch in range(3):
        named.set_epoch(epoch)
        named.set_epoch(epoch)
        assert list(named) == stream[epoch]


def test_a_pass_that_was_left_begins_anew_and_the_old_iterator_ends():
    sampler = ResumableBatchSampler(12, 4)
    left = iter(sampler)
    first = next(left)
    assert next(iter(sampler)) == first
    with pytest.raises(RuntimeError, match="ResumableBatchSampler: a later iter"):
        next(left)
    assert len(list(sampler)) == 3


@pytest.mark.parametrize("at", range(13))
def test_resumes_at_any_batch_of_any_epoch(at):
    whole = ResumableBatchSampler(14, 4, generator=seeded(1))
    stream = [batch for _ in range(4) for batch in whole]
    stopped = ResumableBatchSampler(14, 4, generator=seeded(1))
    running, before = None, []
    while len(before) < at:
        running = running or iter(stopped)
        batch = next(running, None)
        if batch is None:
            running = None
        else:
            before.append(batch)
    resumed = ResumableBatchSampler(14, 4)  # the state brings the seed
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    while len(rest) < len(stream) - at:
        rest += list(resumed)
    assert before + rest == stream


def test_a_state_at_the_end_of_a_pass_leads_to_the_next_and_not_to_an_empty_one():
    sampler = ResumableBatchSampler(8, 4)
    whole = [list(sampler) for _ in range(2)]
    for exhaust in (False, True):
        stopped = ResumableBatchSampler(8, 4)
        batches = iter(stopped)
        assert list(islice(batches, 2)) == whole[0]
        if exhaust:
            assert next(batches, None) is None
        resumed = ResumableBatchSampler(8, 4)
        resumed.load_state_dict(stopped.state_dict())
        assert resumed.epoch == 1
        resumed.set_epoch(1)
        assert list(resumed) == whole[1]


def test_a_peek_after_a_resume_is_not_lost():
    sampler = ResumableBatchSampler(16, 4)
    whole = list(sampler)
    stopped = ResumableBatchSampler(16, 4)
    next(iter(stopped))
    resumed = ResumableBatchSampler(16, 4)
    resumed.load_state_dict(stopped.state_dict())
    assert next(iter(resumed)) == whole[1]
    assert list(resumed) == whole[1:]


@pytest.mark.parametrize("shapes", [[()], [(), (8,), (4, 16)]], ids=["sizes", "shapes"])
@pytest.mark.parametrize("seed", range(5))
def test_random_changes_of_form_lose_and_repeat_nothing_and_resume(seed, shapes):
    """Forms change, states are taken behind what was read ahead; the rest is the same."""
    draw = random.Random(seed)
    sampler = ResumableBatchSampler(200, 4, generator=seeded(seed))
    stream, states = [], []
    for batch in sampler:
        stream.append(batch)
        behind = max(0, len(stream) - draw.randrange(4))
        states.append((behind, json.dumps(sampler.state_dict(consumed=behind))))
        if draw.random() < 0.5:
            sampler.set_batch_size(draw.randint(1, 12), draw.choice(shapes))
    assert Counter(flat(stream)) == Counter(range(200))
    sampler.set_batch_size(1000)  # neither this nor anything later is in the states
    for position, (behind, state) in enumerate(states):
        if behind == len(stream):
            continue  # nothing is left of the epoch
        resumed = ResumableBatchSampler(200, 4)
        resumed.load_state_dict(json.loads(state))
        rest = list(resumed)
        assert rest[: position + 1 - behind] == stream[behind : position + 1]
        assert Counter(flat(stream[:behind] + rest)) == Counter(range(200))


def test_a_resume_of_a_resume_with_sizes_read_ahead():
    sampler = ResumableBatchSampler(40, 4)
    batches = iter(sampler)
    stream = [next(batches) for _ in range(3)]
    sampler.set_batch_size(6)
    stream += [next(batches) for _ in range(2)]
    second = ResumableBatchSampler(40, 4)
    second.load_state_dict(sampler.state_dict(consumed=1))
    assert len(second) == len(sampler) == 3 + 5
    again = iter(second)
    assert [next(again) for _ in range(2)] == stream[1:3]
    second.set_batch_size(9)
    third = ResumableBatchSampler(40, 4)
    third.load_state_dict(second.state_dict(consumed=1))
    assert list(third)[:3] == stream[2:5]
    assert len(third) == 5 + 2


def test_a_new_size_holds_from_the_next_batch_and_in_later_epochs():
    sampler = ResumableBatchSampler(20, 4, shuffle=False)
    batches = iter(sampler)
    assert len(sampler) == 5
    next(batches)
    sampler.set_batch_size(8)
    assert len(sampler) == 3
    assert [len(batch) for batch in batches] == [8, 8]
    assert len(sampler) == 3
    sampler.set_batch_size(10)
    assert [len(batch) for batch in sampler] == [10, 10]
    shrunk = ResumableBatchSampler(10, 4, drop_last=True)
    assert len(list(shrunk)) == 2
    shrunk.set_batch_size(2)  # the two that were dropped do not come back in the same epoch
    again = ResumableBatchSampler(10, 4, drop_last=True)
    again.load_state_dict(shrunk.state_dict())
    assert [len(list(sampler)) for sampler in (shrunk, again)] == [5, 5]


def test_a_shape_comes_with_every_index_until_it_is_taken_back():
    sampler = ResumableBatchSampler(20, 4, shuffle=False)
    batches = iter(sampler)
    assert next(batches) == [0, 1, 2, 3]
    sampler.set_batch_size(2, shape=[8, 112])
    assert sampler.shape == (8, 112)
    assert next(batches) == [(4, (8, 112)), (5, (8, 112))]
    sampler.set_batch_size(3)
    assert next(batches) == [(index, (8, 112)) for index in (6, 7, 8)]
    sampler.set_batch_size(3, shape=())
    assert next(batches) == [9, 10, 11]
    with pytest.raises(ValueError, match="shape must be >= 1, got 0"):
        sampler.set_batch_size(3, shape=(4, 0))
    with pytest.raises(TypeError, match="shape must be an integer"):
        sampler.set_batch_size(3, shape=(4.5,))
    with pytest.raises(TypeError, match="shape must be a sequence of whole numbers, got int"):
        sampler.set_batch_size(3, shape=8)
    assert sampler.shape == ()
    sampler.set_batch_size(np.int64(3), shape=torch.tensor([3, 4]))
    assert json.dumps(ResumableBatchSampler(8, np.int64(4)).state_dict())
    assert json.loads(json.dumps(sampler.state_dict()))["next_form"] == [3, 3, 4]


def test_an_iterator_that_was_given_up_leaves_no_shape_behind():
    sampler = ResumableBatchSampler(20, 2, shuffle=False)
    old, new = iter(sampler), iter(sampler)
    next(new)
    sampler.set_batch_size(4, shape=(9,))
    with pytest.raises(RuntimeError, match="a later iter"):
        next(old)
    next(new)
    assert sampler.state_dict(consumed=0)["ahead"] == [[2], [4, 9]]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("next_form", [], r"must be lists .*, got list"),
        ("ahead", [3], r"must be lists .*, got int"),
        ("next_form", ["a"], "must be an integer, got str"),
        ("ahead", [[0]], "must be >= 1, got 0"),
        ("position", -3, "'position'. must be >= 0, got -3"),
    ],
)
def test_a_state_of_no_sense_is_refused_and_changes_nothing(name, value, message):
    sampler = ResumableBatchSampler(20, 4)
    batches = iter(sampler)
    next(batches)
    before = sampler.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        sampler.load_state_dict({**before, name: value})
    assert sampler.state_dict() == before


class Clips:
    """Examples that are as long as they are asked to be."""

    def __len__(self):
        return 32

    def __getitem__(self, key):
        index, (frames,) = key
        return torch.full((frames,), index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_batches_of_the_shape_and_resumes_in_it(workers):
    sampler = ResumableBatchSampler(32, 4)
    sampler.set_batch_size(8, shape=(3,))
    loader = DataLoader(Clips(), batch_sampler=sampler, num_workers=workers)
    batches = iter(loader)
    first = next(batches)
    assert first.shape == (8, 3)
    state = sampler.state_dict(consumed=1)
    rest = list(batches)
    resumed = ResumableBatchSampler(32, 4)
    resumed.load_state_dict(state)
    again = list(DataLoader(Clips(), batch_sampler=resumed, num_workers=workers))
    assert len(again) == len(rest) == 3
    assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))


def test_a_run_on_two_ranks_resumes_on_one():
    one = list(ResumableBatchSampler(30, 4))
    first = [ResumableBatchSampler(30, 4, rank=rank, world_size=2) for rank in range(2)]
    for sampler in first:
        list(islice(iter(sampler), 3))
    assert first[0].state_dict() == first[1].state_dict()
    resumed = ResumableBatchSampler(30, 4)
    resumed.load_state_dict(first[1].state_dict())
    assert list(resumed) == one[3:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("used", [1, 4, 7])
def test_the_state_counts_what_training_took_from_a_loader(workers, used):
    data = TensorDataset(torch.arange(32))
    whole = list(ResumableBatchSampler(32, 4))
    sampler = ResumableBatchSampler(32, 4)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    for done, _ in enumerate(loader, 1):
        if done == used:
            state = sampler.state_dict(consumed=done)
            break
    ahead = len(state["ahead"])
    assert ahead == (min(2 * workers, 8 - used))  # the loader had indeed read ahead
    resumed = ResumableBatchSampler(32, 4)
    resumed.load_state_dict(state)
    rest = DataLoader(data, batch_sampler=resumed, num_workers=workers)
    assert [batch[0].tolist() for batch in rest] == whole[used:]


MADE_EARLY = ResumableBatchSampler(16, 4)


def _made_before_the_group(rank, size):
    return list(MADE_EARLY)


@pytest.mark.dist
def test_a_process_group_may_start_after_the_sampler_is_made():
    shares = run_on_ranks(_made_before_the_group)
    joined = [sorted(a + b) for a, b in zip(*shares, strict=True)]
    assert joined == [sorted(batch) for batch in ResumableBatchSampler(16, 4)]


def test_accelerate_prepares_its_loader():
    from accelerate import Accelerator

    sampler = ResumableBatchSampler(16, 4)
    loader = DataLoader(TensorDataset(torch.arange(16)), batch_sampler=sampler)
    prepared = Accelerator(cpu=True).prepare(loader)
    expected = ResumableBatchSampler(16, 4)
    for _ in range(3):
        assert [batch[0].tolist() for batch in prepared] == list(expected)


def test_accelerate_goes_on_in_mid_epoch_when_it_is_told_the_epoch():
    from accelerate import Accelerator

    whole = ResumableBatchSampler(16, 4)
    stream = [list(whole) for _ in range(2)]
    stopped = ResumableBatchSampler(16, 4)
    list(stopped)
    next(iter(stopped))
    resumed = ResumableBatchSampler(16, 4)
    resumed.load_state_dict(stopped.state_dict())
    loader = DataLoader(TensorDataset(torch.arange(16)), batch_sampler=resumed)
    prepared = Accelerator(cpu=True).prepare(loader)
    prepared.set_epoch(resumed.epoch)
    assert [batch[0].tolist() for batch in prepared] == stream[1][1:]


@pytest.mark.parametrize(
    ("arguments", "kinds", "error", "message"),
    [
        ((10, 0), {}, ValueError, "batch_size must be >= 1, got 0"),
        ((10, 2.5), {}, TypeError, "batch_size must be an integer, got float"),
        ((1.5, 1), {}, TypeError, "data_source_or_len must be an integer or have a length"),
        ((0, 1), {}, ValueError, "data_source_or_len must hold at least 1 examples, got 0"),
        ((3, 4), {"drop_last": True}, ValueError, "must hold at least 4 examples, got 3"),
        ((9, 3), {"rank": 0, "world_size": 2}, ValueError, "multiple of world_size 2, got 3"),
        ((1, 2), {"rank": 0, "world_size": 2}, ValueError, "at least 2 examples, got 1"),
        ((9, 4), {"generator": 3}, TypeError, "generator must be a torch.Generator or None"),
        ((9, 4), {"rank": 0}, ValueError, "rank must be given together with world_size"),
        ((9, 4), {"rank": 2, "world_size": 2}, ValueError, "rank must be < world_size 2, got 2"),
        ((9, 4), {"rank": -1, "world_size": 2}, ValueError, "rank must be >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, kinds, error, message):
    with pytest.raises(error, match=f"ResumableBatchSampler: .*{message}"):
        ResumableBatchSampler(*arguments, **kinds)


def test_bad_calls_are_named():
    sampler = ResumableBatchSampler(8, 4, rank=0, world_size=2)
    with pytest.raises(ValueError, match="consumed must be <= 0, those yielded, got 1"):
        sampler.state_dict(consumed=1)
    with pytest.raises(ValueError, match="batch_size must be a multiple of world_size 2, got 3"):
        sampler.set_batch_size(3)
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(ValueError, match="the saved state has no 'num_examples'"):
        sampler.load_state_dict({})

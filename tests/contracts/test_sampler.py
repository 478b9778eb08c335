# SPDX-License-Identifier: Apache-2.0
"""What every batch sampler owes. Broken ones at the end show that the suite can fail."""

import io
from collections import Counter

import pytest
import torch
from dist_ranks import run_on_ranks
from torch.utils.data import DataLoader, TensorDataset

from .cases import CASES, global_randomness, objects

SAMPLERS = [CASES[path] for path in objects("sampler") if path in CASES]
every = pytest.mark.parametrize("case", SAMPLERS, ids=lambda case: case.name)
SIZE, BATCH = 48, 4


def check_whole_epoch(build):
    """The first epoch holds every example exactly once, in batches of the size asked for."""
    sampler = build(SIZE, BATCH)
    batches = [list(batch) for batch in sampler]
    assert Counter(i for batch in batches for i in batch) == Counter(range(SIZE))
    assert {len(batch) for batch in batches} == {BATCH}
    assert len(sampler) == len(batches) or len(build(SIZE, BATCH)) == len(batches)


def check_resume(build, at):
    """A sampler stopped after `at` batches goes on, in another object, with the rest."""
    whole = [list(batch) for batch in build(SIZE, BATCH)]
    first = build(SIZE, BATCH)
    stream = iter(first)
    before = [list(next(stream)) for _ in range(at)]
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    again = build(SIZE, BATCH)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert before + [list(batch) for batch in again] == whole


@every
def test_a_full_epoch_holds_every_example_once(case):
    check_whole_epoch(case.build)


@every
@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_resumes_in_mid_epoch_in_another_object(case, at):
    check_resume(case.build, at)


@every
def test_the_seed_decides_and_nothing_else(case):
    def stream(seed):
        generator = torch.Generator().manual_seed(seed)
        return [list(batch) for batch in case.build(SIZE, BATCH, generator=generator)]

    before = global_randomness()
    assert stream(1) == stream(1)
    assert stream(1) != stream(2)
    assert global_randomness() == before


@every
def test_shares_of_the_ranks_are_the_batches_of_one_process(case):
    whole = [list(batch) for batch in case.build(SIZE, BATCH)]
    shares = [
        [list(batch) for batch in case.build(SIZE, BATCH, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    joined = [sorted(a + b) for a, b in zip(*shares, strict=True)]
    assert joined == [sorted(batch) for batch in whole]
    assert all(len(a) == len(b) for a, b in zip(*shares, strict=True))


def _on_rank(rank, size, path):
    return [list(batch) for batch in CASES[path].build(SIZE, BATCH)]


@every
@pytest.mark.dist
def test_two_processes_find_their_shares_themselves(case):
    shares = run_on_ranks(_on_rank, case.path)
    joined = [sorted(a + b) for a, b in zip(*shares, strict=True)]
    assert joined == [sorted(batch) for batch in case.build(SIZE, BATCH)]


@every
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_takes_it(case, workers):
    data = TensorDataset(torch.arange(SIZE))
    loader = DataLoader(data, batch_sampler=case.build(SIZE, BATCH), num_workers=workers)
    seen = [batch[0].tolist() for batch in loader]
    assert seen == [list(batch) for batch in case.build(SIZE, BATCH)]


@every
def test_a_state_counts_what_was_used_and_not_what_was_read_ahead(case):
    whole = [list(batch) for batch in case.build(SIZE, BATCH)]
    sampler = case.build(SIZE, BATCH)
    batches = iter(sampler)
    for _ in range(7):
        next(batches)
    again = case.build(SIZE, BATCH)
    again.load_state_dict(sampler.state_dict(consumed=3))
    assert [list(batch) for batch in again] == whole[3:]


@every
def test_a_state_from_the_end_of_an_epoch_leads_to_the_next(case):
    sampler = case.build(SIZE, BATCH)
    list(sampler)
    again = case.build(SIZE, BATCH)
    again.load_state_dict(sampler.state_dict())
    assert [list(batch) for batch in again] == [list(batch) for batch in sampler] != []


@every
@pytest.mark.parametrize("extra", [1, 2, 3])
def test_an_uneven_end_loses_and_repeats_nothing_and_leaves_no_rank_without(case, extra):
    shares = [
        [
            list(batch)
            for batch in case.build(SIZE + extra, BATCH, drop_last=False, rank=rank, world_size=2)
        ]
        for rank in range(2)
    ]
    assert Counter(i for share in shares for b in share for i in b) == Counter(range(SIZE + extra))
    assert all(a and b for a, b in zip(*shares, strict=True))


@every
def test_a_state_of_other_settings_is_refused(case):
    state = case.build(SIZE, BATCH).state_dict()
    for size, batch in ((SIZE * 2, BATCH), (SIZE, BATCH * 2)):
        with pytest.raises(ValueError, match=rf"{case.name}.*({SIZE}|{BATCH})"):
            case.build(size, batch).load_state_dict(state)


@every
def test_repr_names_it_and_bad_arguments_are_named(case):
    text = repr(case.build(SIZE, BATCH))
    assert text.startswith(case.name)
    assert str(BATCH) in text
    assert case.bad
    for kinds, error, message in case.bad:
        with pytest.raises(error, match=message):
            case.build(SIZE, **({"batch_size": BATCH} | kinds))


class Doubling:
    """Broken on purpose: the last batch repeats the first."""

    def __init__(self, size, batch_size):
        order = list(range(size))
        self.batches = [order[k : k + batch_size] for k in range(0, size, batch_size)]
        self.batches[-1] = self.batches[0]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_the_suite_catches_a_sampler_that_repeats_examples():
    with pytest.raises(AssertionError):
        check_whole_epoch(Doubling)


def test_the_suite_catches_a_sampler_that_starts_over():
    with pytest.raises(AssertionError):
        check_resume(Doubling, 5)

# SPDX-License-Identifier: Apache-2.0
"""Hard batches resumed to the bit, read ahead by loaders, and shared by ranks."""

import random
from itertools import chain, islice, repeat

import pytest
import torch
from dist_ranks import run_on_ranks
from hard_rounds import pseudo, saved
from torch.utils.data import DataLoader, TensorDataset

from batchery.select import HardBatchSampler, ResumableBatchSampler

MODES = [
    {},
    {"delta": 0.3, "order": "hardest", "max_age": 2},
    {"refresh": "ema", "exploration": 0.3, "order": "shuffle"},
    {"drop_last": False, "warmup_epochs": 2, "clip_quantile": 0.8},
    {"repartition_every": 2, "exploration": 0.2, "max_age": 3},
    {"mode": "sample"},
    {"temperature": 0.5},
    {"mode": "sample", "temperature": 0.3, "refresh": "ema"},
    {"mode": "sample", "regroup": "sorted", "order": "shuffle", "refresh": "ema"},
    {"mode": "sample", "drop_last": False, "exploration": 0.2, "max_age": 2, "clip_quantile": 0.9},
]


def report(sampler, batch, step):
    few = [random.Random(f"{i} {step}").randrange(3) / 4 for i in batch]  # ties are the rule
    losses = torch.tensor(few if step % 2 else few[:1] * len(batch))
    if sampler.mode == "batch" and step % 3:
        sampler.update(losses.mean())
    elif sampler.mode == "batch" and step % 2:
        sampler.update(losses)
    else:
        sampler.update(losses, batch)
        if sampler.mode == "batch":
            sampler._reported += 1


def train(sampler, steps, start=0):
    """Train on a stream of rounds; return the batches, leaving the sampler in mid-round."""
    stream, found = chain.from_iterable(repeat(sampler)), []
    for step, batch in enumerate(islice(stream, steps), start):
        report(sampler, batch, step)
        found.append(batch)
    return found


@pytest.mark.parametrize("kinds", MODES, ids=lambda kinds: "-".join(map(str, kinds.values())))
def test_resumes_to_the_bit_wherever_it_stops(kinds):
    def build():
        return HardBatchSampler(43, 4, generator=torch.Generator().manual_seed(7), **kinds)

    whole = build()
    stream = train(whole, 50)
    for at in range(1, 50, 2):
        stopped, resumed = build(), build()
        before = train(stopped, at)
        resumed.load_state_dict(saved(stopped.state_dict()))
        assert before + train(resumed, 50 - at, at) == stream
        for ours, theirs in ((resumed.scores, whole.scores), (resumed.selected, whole.selected)):
            assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1))
        assert resumed.last_round == pytest.approx(whole.last_round, nan_ok=True)
        assert resumed.state_dict()["last_seen"].tolist() == whole._hardness.last_seen.tolist()


def test_a_batch_size_changed_in_mid_round_survives_a_resume():
    def go(resume):
        sampler = HardBatchSampler(48, 4, 0.5, mode="sample")
        train(sampler, 12)
        batches = iter(sampler)
        found = [next(batches)]
        sampler.set_batch_size(8)
        if resume:
            state = sampler.state_dict()
            sampler = HardBatchSampler(48, 4, 0.5, mode="sample")
            sampler.load_state_dict(state)
            batches = iter(sampler)
        return found + list(batches)

    assert go(True) == go(False)
    assert [len(batch) for batch in go(True)] == [4, 8, 8]


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_that_read_ahead_select_by_all_reports_and_resume(mode, workers):
    data = TensorDataset(torch.arange(40))

    def build():
        return HardBatchSampler(40, 4, 0.5, mode=mode)

    def loader(sampler):
        return DataLoader(
            data, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0
        )

    expected = train(build(), 10 + 5 + 5)
    sampler = build()
    rows, step, state = loader(sampler), 0, None
    for turn in range(3):
        for done, (indices,) in enumerate(rows, 1):
            assert indices.tolist() == expected[step]
            report(sampler, indices.tolist(), step)
            step += 1
            if (turn, done) == (1, 2):
                state = saved(sampler.state_dict(consumed=done))
    assert step == 20
    resumed = build()
    resumed.load_state_dict(state)
    for turn, length in ((1, 3), (2, 5)):
        seen = []
        for (indices,) in loader(resumed):
            at = 12 + (0 if turn == 1 else 3) + len(seen)
            report(resumed, indices.tolist(), at)
            seen.append(indices.tolist())
        assert len(seen) == length
        assert seen == expected[at + 1 - length : at + 1]


def test_accelerate_which_reads_one_batch_ahead_changes_nothing():
    from accelerate import Accelerator

    sampler = HardBatchSampler(40, 4, 0.5)
    loader = DataLoader(TensorDataset(torch.arange(40)), batch_sampler=sampler)
    prepared, found = Accelerator(cpu=True).prepare(loader), []
    for _ in range(3):
        for (indices,) in prepared:
            found.append(indices.tolist())
            sampler.update(pseudo(found[-1][0], 1))
    plain, expected = HardBatchSampler(40, 4, 0.5), []
    for batch in islice(chain.from_iterable(repeat(plain)), 20):
        expected.append(batch)
        plain.update(pseudo(batch[0], 1))
    assert found == expected


# --- ranks


def _train(mode, resume=False):
    """Train four rounds; return the batches, the scores and the last selection."""

    def build():
        return HardBatchSampler(46, 4, 0.5, mode=mode, exploration=0.2, drop_last=False)

    sampler, found = build(), []
    for turn in range(4):
        batches = iter(sampler)
        while (batch := next(batches, None)) is not None:
            found.append(batch)
            sampler.update(torch.tensor([pseudo(i, 1 + turn) for i in batch]), batch)
            if resume and len(found) in (3, 14):
                state = saved(sampler.state_dict())
                sampler = build()
                sampler.load_state_dict(state)
                batches = iter(sampler)
    list(sampler)
    return found, sampler.scores, sampler.selected


def _means_of_shares():
    """Report the mean of each rank's share; return the scores and the collectives they took."""
    sampler = HardBatchSampler(12, 4, 0.5, shuffle_partition=False)
    for batch in sampler:
        sampler.update(torch.tensor(batch).float().mean())
    calls, original = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (calls.append(a[0].shape), original(*a, **k))
    iter(sampler)
    torch.distributed.all_reduce = original
    return sampler.scores, calls


RUNS = [(mode, resume) for mode in ("batch", "sample") for resume in (False, True)]


def _on_rank(rank, size):
    return [_train(*run) for run in RUNS], _means_of_shares()


@pytest.fixture(scope="module")
def two_ranks():
    return run_on_ranks(_on_rank)


@pytest.mark.dist
@pytest.mark.parametrize("run", range(len(RUNS)), ids=map(str, RUNS))
def test_two_ranks_select_as_one_process_and_resume(two_ranks, run):
    alone = _train(RUNS[run][0])
    first, second = (trained[run] for trained, _ in two_ranks)
    joined = [sorted(a + b) for a, b in zip(first[0], second[0], strict=True)]
    assert joined == [sorted(batch) for batch in alone[0]]
    for place in (1, 2):
        assert torch.equal(first[place], second[place])
        assert torch.equal(first[place], alone[place])


@pytest.mark.dist
def test_batch_scores_are_means_over_ranks_in_one_collective_a_round(two_ranks):
    for _, (scores, calls) in two_ranks:
        assert scores.tolist() == [1.5, 5.5, 9.5]
        assert calls == [torch.Size([2, 3])]


def test_the_state_of_another_rank_brings_no_reports():
    first = HardBatchSampler(8, 2, 0.5, rank=0, world_size=2)
    next(iter(first))
    first.update(1.0)
    second = HardBatchSampler(8, 2, 0.5, rank=1, world_size=2)
    second.load_state_dict(first.state_dict())
    assert len(second.state_dict()["reported_losses"]) == 0
    again = HardBatchSampler(8, 2, 0.5, rank=0, world_size=2)
    again.load_state_dict(first.state_dict())
    assert again.state_dict()["reported_losses"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({}, {"delta": 0.25}, "the saved state has delta=0.5, this object delta=0.25"),
        ({}, {"mode": "sample"}, "has mode='batch', this object mode='sample'"),
        ({"batch_size": 4}, {}, "has batch_size=4, this object batch_size=2"),
        ({"data_source_or_len": 22}, {}, "has num_examples=22, this object num_examples=20"),
    ],
)
def test_a_state_of_other_settings_is_refused_naming_both(one, other, message):
    plain = {"data_source_or_len": 20, "batch_size": 2}
    state = HardBatchSampler(**(plain | one)).state_dict()
    with pytest.raises(ValueError, match=message):
        HardBatchSampler(**(plain | other)).load_state_dict(state)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scores", lambda value: value[:3]),
        ("scores", lambda value: value[None]),
        ("scores", lambda value: value.double()),
        ("last_seen", lambda value: value[:-1]),
        ("ranking", lambda value: torch.arange(3)),
        ("reported_examples", lambda value: value[None]),
        ("reported_losses", lambda value: value[:1]),
    ],
)
def test_a_state_of_another_size_is_refused_by_entry_and_changes_nothing(mode, name, change):
    def read(sampler):
        return repr(sampler), {key: repr(value) for key, value in sampler.state_dict().items()}

    stopped, sampler = (HardBatchSampler(20, 2, mode=mode) for _ in range(2))
    train(stopped, 3)
    train(sampler, 12)
    before, state = read(sampler), stopped.state_dict()
    with pytest.raises(ValueError, match=rf"HardBatchSampler: state_dict\['{name}'\] must be"):
        sampler.load_state_dict(state | {name: change(state[name])})
    assert read(sampler) == before
    sampler.load_state_dict(state)


@pytest.mark.parametrize("make", [ResumableBatchSampler, HardBatchSampler])
def test_a_state_that_cannot_be_loaded_changes_nothing(make):
    def read(sampler):
        return {name: repr(value) for name, value in sampler.state_dict().items()}

    def build():
        sampler = make(12, 4)
        next(iter(sampler))
        return sampler

    good, sampler = make(12, 4).state_dict(), build()
    before = read(sampler)
    for name in good:
        less = {key: value for key, value in good.items() if key != name}
        with pytest.raises(ValueError, match=f"{make.__name__}: .* (has no|hold) '{name}'"):
            sampler.load_state_dict(less)
        if name not in sampler._settings():
            message = rf"{make.__name__}: state_dict\['{name}'\] must be of type .*, got NoneType"
            with pytest.raises(TypeError, match=message):
                sampler.load_state_dict(good | {name: None})
    with pytest.raises(TypeError, match=f"{make.__name__}: state_dict must be a mapping, got str"):
        sampler.load_state_dict("x")
    assert read(sampler) == before

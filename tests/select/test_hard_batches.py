# SPDX-License-Identifier: Apache-2.0
"""Oracles of hard batches: traces of the paper's algorithm, limits, options, errors."""

import random
from collections import Counter
from itertools import chain, islice, repeat

import numpy as np
import pytest
import torch
from hard_rounds import flat, pseudo, rounds
from torch.utils.data import DataLoader, TensorDataset

from batchery.select import HardBatchSampler, train_budget

# --- the paper's algorithm


def official(total, share, losses, count):
    """The published procedure, with lists: losses(batch, visit) are those met in training."""
    kept, visits = max(1, int(share * total)), Counter()
    ranked, score, selections = list(range(total)), {}, []
    for turn in range(count):
        if turn:
            ranked = sorted(ranked, key=lambda batch: -score[batch])  # stable
        selected = sorted(ranked[: kept if turn else total])
        selections.append(selected)
        for batch in selected:
            visits[batch] += 1
            score[batch] = losses(batch, visits[batch])
    return selections


@pytest.mark.parametrize("share", [0.1, 0.34, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_selections_are_those_of_the_published_procedure(share, seed):
    """Losses take few values, so that ties are the rule."""
    draw = random.Random(seed)
    table = {(b, v): draw.randrange(4) / 4 for b in range(13) for v in range(1, 40)}
    expected = official(13, share, lambda b, v: table[b, v], 30)
    sampler = HardBatchSampler(40, 3, share, shuffle_partition=False)
    visits, found = Counter(), []
    for _ in range(30):
        for batch in sampler:
            assert batch == list(range(batch[0], batch[0] + 3))
            visits[batch[0] // 3] += 1
            sampler.update(table[batch[0] // 3, visits[batch[0] // 3]])
        found.append(sampler.selected.tolist())
    assert found == expected


def test_a_trace_by_hand():
    """Four batches, two kept; stale scores let batch 0 back in when the others have fallen."""
    sampler = HardBatchSampler(8, 2, 0.5, shuffle_partition=False)
    assert len(sampler) == 4
    for batch, loss in zip(sampler, (0.5, 0.9, 0.4, 0.7), strict=True):
        sampler.update(loss)
        assert len(batch) == 2
    assert [(b, sampler.update(x)) for b, x in zip(sampler, (0.3, 0.6), strict=True)] == [
        ([2, 3], None),
        ([6, 7], None),
    ]
    assert list(sampler) == [[0, 1], [6, 7]]  # 0.5, 0.3, 0.4, 0.6
    assert sampler.scores.tolist() == pytest.approx([0.5, 0.3, 0.4, 0.6])
    assert sampler.last_round == pytest.approx((0.55, 0.45, 1))
    assert len(sampler) == 2


def test_delta_one_is_an_ordinary_loader_that_does_not_shuffle():
    data = TensorDataset(torch.arange(22))
    plain = DataLoader(data, batch_size=4, drop_last=True)
    sampler = HardBatchSampler(22, 4, 1.0, shuffle_partition=False, exploration=0.5, max_age=1)
    for batches in rounds(sampler, pseudo, 4):
        assert batches == [batch[0].tolist() for batch in plain]


@pytest.mark.parametrize(("batches", "epochs", "share"), [(10, 4, 0.4), (7, 5, 0.5), (5, 3, 1.0)])
def test_the_budget_is_that_of_ordinary_epochs(batches, epochs, share):
    sampler = HardBatchSampler(batches * 2, 2, share)
    wanted, updates = train_budget(len(sampler), epochs, share)
    assert updates == batches * epochs
    lengths = []

    def passes():
        for _ in repeat(None):
            lengths.append(0)
            yield sampler

    for batch in islice(chain.from_iterable(passes()), updates):
        lengths[-1] += 1
        sampler.update(float(batch[0]))
    assert len(lengths) == wanted
    assert sum(lengths) == updates
    assert lengths[0] == batches
    assert set(lengths[1:-1]) <= {int(share * batches)}


def test_equal_losses_keep_the_same_batches_for_ever_unless_age_forces_the_others():
    kinds = {"shuffle_partition": False}
    stuck = rounds(HardBatchSampler(12, 2, 0.5, **kinds), lambda i, v: 1.0, 6)
    assert all(batches == [[0, 1], [2, 3], [4, 5]] for batches in stuck[1:])
    for age in (1, 2, 4):
        aged = rounds(HardBatchSampler(12, 2, 0.5, max_age=age, **kinds), lambda i, v: 1.0, 14)
        for batch in range(6):
            seen = [turn for turn, taken in enumerate(aged) if [2 * batch, 2 * batch + 1] in taken]
            gaps = [b - a - 1 for a, b in zip(seen, seen[1:], strict=False)]
            assert max(gaps) <= age
            assert len(aged) - 1 - seen[-1] <= age


def test_reports_after_iter_wait_for_the_next_selection():
    sampler = HardBatchSampler(8, 2, 0.5, shuffle_partition=False)
    for loss, _ in enumerate(sampler):
        sampler.update(loss)
    batches = iter(sampler)
    sampler.update(9.0, [0])
    assert list(batches) == [[4, 5], [6, 7]]
    assert list(sampler) == [[0, 1], [6, 7]]


# --- selection


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_with_a_temperature_the_weighted_mean_of_a_round_is_that_of_all(mode):
    sampler = HardBatchSampler(40, 4, 0.5, mode=mode, shuffle_partition=False, temperature=0.7)
    losses = torch.rand(40, generator=torch.Generator().manual_seed(3)) * 3
    means, hard = [], []
    for r in range(400):
        found = []
        for batch in sampler:
            weights = sampler.importance_weights(batch)
            assert weights.dtype == torch.float32
            assert r > 0 or torch.equal(weights, torch.ones(len(batch)))
            own = losses[batch] if mode == "sample" else losses[batch].mean().expand(len(batch))
            found.append((weights * own).mean())
            sampler.update(losses[batch], batch)
        means.append(float(torch.stack(found).mean()))
        hard.append(sampler.last_round.mean_selected - sampler.last_round.mean_all)
    assert means[0] == pytest.approx(float(losses.mean()), rel=1e-6)
    drawn = torch.tensor(means[1:])
    assert abs(drawn.mean() - losses.mean()) < 4 * drawn.std() / len(drawn) ** 0.5
    assert min(np.mean(hard[1:]), drawn.std()) > 0.01  # what is hard is drawn more often


def test_drawn_batches_are_visited_hardest_first_and_may_come_twice():
    sampler = HardBatchSampler(
        12, 2, 0.9, shuffle_partition=False, order="hardest", temperature=0.3
    )
    found = rounds(sampler, lambda i, v: float(i), 30)
    for batches in found[1:]:
        firsts = [batch[0] for batch in batches]
        assert firsts == sorted(firsts, reverse=True)
        assert len(firsts) == 5
    assert any(len({batch[0] for batch in batches}) < 5 for batches in found[1:])


def test_sample_mode_trains_on_the_hardest_examples_in_fresh_batches():
    sampler = HardBatchSampler(30, 3, 0.4, mode="sample")
    found = rounds(sampler, lambda i, v: float(i), 3)
    assert Counter(flat(found[0])) == Counter(range(30))
    for batches in found[1:]:
        assert Counter(flat(batches)) == Counter(range(18, 30))
        assert {len(batch) for batch in batches} == {3}
    assert found[1] != found[2]


def test_sorted_batches_are_of_one_hardness():
    sampler = HardBatchSampler(30, 3, 0.4, mode="sample", regroup="sorted")
    found = rounds(sampler, lambda i, v: float((7 * i) % 30), 3)
    hardness = [[(7 * i) % 30 for i in batch] for batch in found[1]]
    assert flat(hardness) == list(range(29, 17, -1))
    assert found[0] != [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(10)]  # nothing is known yet
    mixed = HardBatchSampler(30, 3, 0.4, mode="sample", regroup="sorted", order="shuffle")
    again = rounds(mixed, lambda i, v: float((7 * i) % 30), 3)
    assert again[1] != found[1]
    assert sorted(again[1]) == sorted(found[1])


def test_batches_are_visited_by_index_hardest_first_or_shuffled():
    losses = [3.0, 9.0, 5.0, 1.0, 7.0, 6.0]

    def second(order, seed=0):
        generator = torch.Generator().manual_seed(seed)
        sampler = HardBatchSampler(12, 2, 0.67, order=order, generator=generator)
        for batch in sampler:
            where = int(sampler._batch_of[batch[0]])
            sampler.update(losses[where], batch)
        return [int(sampler._batch_of[batch[0]]) for batch in sampler]

    assert second("index") == [1, 2, 4, 5]
    assert second("hardest") == [1, 4, 5, 2]
    shuffled = [second("shuffle", seed) for seed in range(6)]
    assert len({tuple(visit) for visit in shuffled}) > 1
    assert all(sorted(visit) == [1, 2, 4, 5] for visit in shuffled)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_clipping_passes_over_the_highest_but_not_over_the_unseen(mode):
    size = 1 if mode == "sample" else 2
    sampler = HardBatchSampler(10 * size, size, 0.4, mode=mode, clip_quantile=0.8,
                               shuffle_partition=False)  # fmt: skip
    rounds(sampler, lambda i, v: float(i // size), 1)
    assert sorted(flat(sampler)) == list(range(4 * size, 8 * size))
    full = HardBatchSampler(10, 1, 1.0, mode=mode, clip_quantile=0.5)
    assert [sorted(flat(batches)) for batches in rounds(full, pseudo, 2)] == [list(range(10))] * 2
    late = HardBatchSampler(11, 2, 0.4, mode="sample", clip_quantile=0.8)
    seen = set(flat(rounds(late, pseudo, 1)[0]))
    assert set(range(11)) - seen <= set(flat(late))


def test_what_the_first_round_dropped_comes_first_in_the_second():
    sampler = HardBatchSampler(23, 4, 0.6, mode="sample")
    first, second = rounds(sampler, pseudo, 2)
    assert set(range(23)) - set(flat(first)) <= set(flat(second))
    assert len(set(flat(second))) == len(flat(second)) == 12  # int(13.8), in full batches


def test_a_short_batch_is_kept_whole_and_comes_last():
    for order in ("index", "hardest", "shuffle"):
        sampler = HardBatchSampler(11, 4, 0.7, drop_last=False, order=order)
        first = list(sampler)
        assert Counter(flat(first)) == Counter(range(11))
        for batch in first:
            sampler.update(99.0 if len(batch) == 3 else float(batch[0]), batch)
        second = list(sampler)
        assert [len(batch) for batch in second] == [4, 3]
        assert all(batch in first for batch in second)
        assert len(sampler) == 2


def test_new_partitions_carry_the_means_of_their_examples():
    kinds = {"repartition_every": 2, "generator": torch.Generator().manual_seed(1)}
    sampler = HardBatchSampler(13, 3, 0.5, warmup_epochs=2, **kinds)
    rounds(sampler, pseudo, 2)
    assert sampler.epoch == 2
    before = sampler._batch_of.copy()
    list(sampler)  # round 2 has new batches; its scores are carried
    sampler.set_epoch(3)
    after = sampler._batch_of
    old = HardBatchSampler(13, 3, 0.5, warmup_epochs=2, **kinds)
    rounds(old, pseudo, 2)
    old._end_pass()
    brought = old.scores.numpy()
    assert not np.array_equal(before, after)
    for batch in range(4):
        members = [i for i in range(13) if after[i] == batch and before[i] >= 0]
        expected = np.mean([brought[before[i]] for i in members])
        assert sampler.scores[batch].item() == pytest.approx(expected, rel=1e-6)
    dropped = set()
    for _ in range(12):
        list(sampler)
        dropped |= {int(i) for i in np.flatnonzero(sampler._batch_of < 0)}
    assert len(dropped) > 1


# --- errors


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"delta": 0.0}, "delta must be > 0 and <= 1, got 0.0"),
        ({"delta": 1.5}, "delta must be > 0 and <= 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": 7}, "data_source_or_len must make at least 2 batches, got 1"),
        ({"mode": "epoch"}, "mode must be one of 'batch', 'sample', got 'epoch'"),
        ({"regroup": "sorted"}, "regroup in mode 'batch' must be one of 'fixed', got 'sorted'"),
        ({"mode": "sample", "regroup": "fixed"}, "regroup in mode 'sample' must be one of"),
        ({"mode": "sample", "order": "hardest"}, "order with regroup 'random' must be one of"),
        ({"refresh": "full"}, "refresh must be one of 'stale', 'ema', got 'full'"),
        ({"ema": 1.1}, "ema must be >= 0 and <= 1, got 1.1"),
        ({"exploration": -0.1}, "exploration must be >= 0 and <= 1, got -0.1"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        (
            {"temperature": 1.0, "max_age": 2},
            "temperature must be None with exploration or max_age",
        ),
        ({"temperature": 1.0, "drop_last": False}, "temperature must be None in mode 'batch'"),
        ({"clip_quantile": 0.0}, "clip_quantile must be > 0 and <= 1, got 0.0"),
        ({"max_age": -1}, "max_age must be >= 0, got -1"),
        ({"warmup_epochs": 0}, "warmup_epochs must be >= 1, got 0"),
        ({"mode": "sample", "repartition_every": 2}, "repartition_every must be 0 unless"),
        ({"shuffle_partition": False, "repartition_every": 2}, "repartition_every must be 0"),
    ],
)
def test_bad_settings_are_named(kinds, message):
    with pytest.raises(ValueError, match=f"HardBatchSampler: {message}"):
        HardBatchSampler(10, **({"batch_size": 2} | kinds))


def test_less_than_a_batch_is_raised_to_one_with_a_warning():
    for mode, kept in (("batch", 1), ("sample", 1)):
        with pytest.warns(UserWarning, match="HardBatchSampler: delta 0.05 is less than one batch"):
            sampler = HardBatchSampler(20, 2, 0.05, mode=mode)
        assert [len(batches) for batches in rounds(sampler, pseudo, 3)] == [10, kept, kept]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 0.5), "num_batches must be >= 1, got 0"),
        ((10, 0, 0.5), "epochs must be >= 1, got 0"),
        ((10, 3, 0.0), "delta must be > 0 and <= 1, got 0.0"),
        ((10, 1, 0.5, 2), "epochs must be >= 2, got 1"),
    ],
)
def test_bad_budgets_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"train_budget: {message}"):
        train_budget(*arguments)

# SPDX-License-Identifier: Apache-2.0
"""Oracles of hard batches: traces, limits, resume in every mode, ranks, loaders, the Trainer."""

import io
import math
import random
import warnings
from collections import Counter
from itertools import chain, islice, repeat

import numpy as np
import pytest
import torch
from dist_ranks import run_on_ranks
from torch.utils.data import DataLoader, TensorDataset

from batchery.select import HardBatchSampler, train_budget
from batchery.select.hardness import Hardness, chances, explore, falling, force, highest


def flat(batches):
    return [index for batch in batches for index in batch]


def rounds(sampler, loss, count, indices=False):
    """Train `count` rounds; `loss(examples, visit)` gives a loss for each example."""
    visits, found = Counter(), []
    for _ in range(count):
        found.append([])
        for batch in sampler:
            found[-1].append(batch)
            visits.update(batch)
            losses = torch.tensor([loss(i, visits[i]) for i in batch])
            if indices or sampler.mode == "sample":
                sampler.update(losses, batch)
            else:
                sampler.update(losses.mean())
    return found


def pseudo(example, visit, seed=0):
    """A loss that differs by example and falls with visits, in exact binary fractions."""
    return random.Random(f"{seed} {example} {visit}").randrange(1, 64) / 16 / visit.bit_length()


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


# --- scores


def test_an_average_is_in_closed_form():
    sampler = HardBatchSampler(4, 2, 0.5, refresh="ema", ema=0.75, shuffle_partition=False)
    reports = [(8.0, 1.0), (4.0, None), (2.0, None)]
    for first, second in reports:
        next(iter(sampler))
        sampler.update(first, [0, 1])
        if second:
            sampler.update(second, [2, 3])
        sampler.set_epoch(sampler.epoch + 1)
    expected = 0.75 * (0.75 * 8 + 0.25 * 4) + 0.25 * 2
    assert sampler.scores.tolist() == [expected, 1.0]


def test_a_forward_pass_over_everything_is_a_full_refresh():
    """Of several reports on an example within a round the last counts; one is in no batch."""
    sampler = HardBatchSampler(13, 2, 0.5, generator=torch.Generator().manual_seed(4))
    rounds(sampler, pseudo, 3)
    fresh = torch.arange(13.0).flip(0)
    for part in (torch.arange(5, 13), torch.arange(5)):  # in batches of any make
        sampler.update(fresh[part], part)
    list(sampler)
    members = sampler._partition.view(6, 2)
    assert torch.equal(sampler.scores, fresh[members].mean(1))
    hardest = fresh[members].mean(1).topk(3).indices.sort().values
    assert torch.equal(sampler.selected, hardest)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_the_order_of_reports_does_not_matter(mode):
    def train(shuffle):
        sampler = HardBatchSampler(24, 4, 0.5, mode=mode)
        for _ in range(4):
            batches = list(sampler)
            for batch in random.Random(0).sample(batches, len(batches)) if shuffle else batches:
                order = random.Random(1).sample(batch, len(batch)) if shuffle else batch
                sampler.update(torch.tensor([pseudo(i, 1) for i in order]), order)
        return list(sampler), sampler.scores.nan_to_num(-1).tolist()

    assert train(False) == train(True)


def test_a_loss_that_is_not_finite_leaves_the_score_and_warns_once():
    sampler = HardBatchSampler(8, 2, 0.5, shuffle_partition=False)
    for loss, _ in zip((0.9, 0.8, 0.2, math.nan), sampler, strict=True):
        sampler.update(loss)
    with pytest.warns(UserWarning, match="HardBatchSampler: a reported loss is not finite"):
        assert list(sampler) == [[0, 1], [2, 3]]  # the one with no finite loss comes last
    assert sampler.scores[3].isnan()
    sampler.update(math.inf)
    sampler.update(torch.tensor([0.1, math.nan]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(sampler) == [[0, 1], [4, 5]]
    assert sampler.scores[:3].tolist() == pytest.approx([0.9, 0.1, 0.2])
    assert sampler.not_finite == 2 + 2 + 1


def test_update_reads_nothing_of_what_it_is_given():
    """A meta tensor has no data: whatever looked at a loss or an index of it would raise."""
    sampler = HardBatchSampler(8, 2, 0.5, mode="sample")
    losses = torch.empty(2, device="meta", requires_grad=True)
    sampler.update(losses, torch.empty(2, dtype=torch.int64, device="meta"))
    sampler.update(losses.mean(), torch.empty(5, dtype=torch.int32, device="meta"))
    batchwise = HardBatchSampler(8, 2, 0.5)
    next(iter(batchwise))
    batchwise.update(losses.sum())


@pytest.mark.parametrize("kinds", [{}, {"rank": 1, "world_size": 2}, {"temperature": 0.5}])
def test_mean_losses_of_whole_batches_are_those_of_their_examples_to_the_bit(kinds):
    """Two ways to the same scores: by batch, and by example once a batch is said by its indices."""

    def train(by_example):
        sampler = HardBatchSampler(23, 4, 0.5, drop_last="temperature" in kinds, **kinds)
        for turn in range(6):
            for step, batch in enumerate(sampler):
                loss = math.nan if turn and step == 1 else pseudo(batch[0], turn + 1) / 3
                sampler.update(torch.tensor(loss, dtype=torch.float64))
                if by_example:
                    sampler.update(loss, batch)
        return sampler.scores.tolist(), sampler.selected.tolist(), sampler.not_finite

    with pytest.warns(UserWarning, match="not finite"):
        by_batch, by_example = train(False), train(True)
    assert by_batch[:2] == by_example[:2]
    assert by_example[2] == 2 * by_batch[2]


@pytest.mark.gpu
def test_reports_from_a_gpu_wait_until_the_round_ends():
    sampler = HardBatchSampler(8, 2, 0.5, mode="sample")
    losses = torch.arange(8.0, device="cuda")
    where = torch.arange(8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in range(4):
            sampler.update(losses[2 * part : 2 * part + 2], where[2 * part : 2 * part + 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses.zero_()  # a report is a copy: captured graphs write over their outputs
    list(sampler)
    assert set(flat(sampler)) == {4, 5, 6, 7}


# --- selection


@pytest.mark.parametrize("seed", range(5))
def test_the_highest_are_those_of_a_stable_sort(seed):
    draw = np.random.default_rng(seed)
    values = np.array([-np.inf, -3.5, -1e-30, -0.0, 0.0, 1e-40, 2.0, 7e30, np.inf], np.float32)
    scores = np.concatenate([draw.choice(values, 60), draw.normal(size=40)]).astype(np.float32)
    draw.shuffle(scores)
    stable = np.argsort(-scores, kind="stable")
    assert np.array_equal(falling(scores), stable)
    for count in (0, 1, 17, 50, 99, 100):
        assert np.array_equal(highest(scores, count), np.sort(stable[:count]))


def test_exploration_swaps_a_share_of_the_slots_evenly():
    generator = torch.Generator().manual_seed(0)
    chosen, taken, kept = np.arange(10, 30), Counter(), 0
    for _ in range(2000):
        explored = explore(chosen, 60, 0.25, generator)
        assert len(set(explored.tolist())) == 20
        taken.update(explored.tolist())
        kept += int(np.isin(explored, chosen).sum())
    # 40,000 slots: four standard deviations are 0.0087
    assert kept / 40_000 == pytest.approx(0.75, abs=0.0087)
    others = [taken[i] for i in range(60) if not 10 <= i < 30]
    # each of 40 is drawn 250 times in the mean; sd 15.5, four of them allowed
    assert all(188 < count < 312 for count in others)
    assert not np.isin(explore(chosen, 60, 1.0, generator), chosen).any()
    assert sorted(explore(np.arange(8), 10, 1.0, generator).tolist())[-2:] == [8, 9]


def test_age_forces_the_oldest_first_and_drops_the_easiest():
    scores = np.array([9, 8, 7, 6, 1, 2], np.float32)
    chosen = np.array([0, 1, 2])
    assert set(force(chosen, scores, np.array([0, 0, 0, 0, 3, 1]), 3)) == {0, 1, 4}
    assert set(force(chosen, scores, np.array([0, 0, 0, 2, 3, 4]), 2)) == {3, 4, 5}
    assert set(force(chosen, scores, np.array([0, 0, 5, 2, 3, 4]), 2)) == {2, 4, 5}
    assert set(force(chosen, scores, np.zeros(6), 1)) == {0, 1, 2}


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


def test_a_temperature_goes_from_the_hardest_to_all_alike():
    scores = np.array([1.0, 3.0, 2.0, np.inf, -np.inf], np.float32)
    assert chances(scores, 1e-3).tolist() == pytest.approx([0, 0.5, 0, 0.5, 0])
    assert chances(scores, 1e6).tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25, 0], rel=1e-5)
    for same in (np.inf, -np.inf):  # never trained, and without any finite loss
        assert chances(np.full(3, same, np.float32), 1.0).tolist() == pytest.approx([1 / 3] * 3)
    wanted = np.exp(scores[:3]) / (np.exp(scores[:3]).sum() + np.exp(3))
    assert chances(scores, 1.0)[:3].tolist() == pytest.approx(wanted.tolist(), rel=1e-6)


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


def test_moving_scores_keeps_ages_of_the_oldest():
    hardness = Hardness(6, 3, keep=0.0)
    hardness.scores = torch.tensor([1.0, torch.nan, 4.0])
    hardness.last_seen = torch.tensor([5, -1, 3], dtype=torch.int32)
    hardness.move(np.array([0, 0, 1, 1, 2, -1]), np.array([0, 1, 1, 2, 0, 2]))
    assert hardness.scores[:2].tolist() == [2.5, 1.0]
    assert hardness.scores[2].isnan()
    assert hardness.last_seen.tolist() == [3, -1, -1]


# --- resume

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


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


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


def test_bad_reports_are_named():
    sampler = HardBatchSampler(8, 2, mode="sample")
    next(iter(sampler))
    with pytest.raises(TypeError, match="HardBatchSampler: update needs indices in mode 'sample'"):
        sampler.update(1.0)
    for index in (8, -1):
        with pytest.raises(IndexError, match=f"indices must be >= 0 and < 8, got {index}"):
            sampler.update([1.0, 2.0], [0, index])
    with pytest.raises(ValueError, match="loss must be 1 number or 3, got 2"):
        sampler.update([1.0, 2.0], [0, 1, 2])
    batchwise = HardBatchSampler(8, 2)
    with pytest.raises(RuntimeError, match="update came for a batch that was not yielded"):
        batchwise.update(1.0)
    next(iter(batchwise))
    batchwise.update(1.0)
    with pytest.raises(RuntimeError, match="update came for a batch that was not yielded"):
        batchwise.update(1.0)
    with pytest.raises(ValueError, match="batch_size is fixed in mode 'batch', got 4"):
        batchwise.set_batch_size(4)


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

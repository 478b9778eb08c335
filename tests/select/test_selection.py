# SPDX-License-Identifier: Apache-2.0
"""Oracles of the selection as pure functions."""

from collections import Counter

import numpy as np
import pytest
import torch

from batchery.select.selection import (
    chances,
    deal,
    draw,
    examples_of,
    explore,
    falling,
    force,
    highest,
    regrouped,
    visits,
)


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


def test_a_temperature_goes_from_the_hardest_to_all_alike():
    scores = np.array([1.0, 3.0, 2.0, np.inf, -np.inf], np.float32)
    assert chances(scores, 1e-3).tolist() == pytest.approx([0, 0.5, 0, 0.5, 0])
    assert chances(scores, 1e6).tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25, 0], rel=1e-5)
    for same in (np.inf, -np.inf):  # never trained, and without any finite loss
        assert chances(np.full(3, same, np.float32), 1.0).tolist() == pytest.approx([1 / 3] * 3)
    wanted = np.exp(scores[:3]) / (np.exp(scores[:3]).sum() + np.exp(3))
    assert chances(scores, 1.0)[:3].tolist() == pytest.approx(wanted.tolist(), rel=1e-6)


def test_the_weights_of_what_is_drawn_make_up_for_its_chances():
    scores = np.array([1.0, 3.0, 2.0, np.inf], np.float32)
    drawn, weights = draw(scores, 200, 1.0, torch.Generator().manual_seed(0))
    assert len(drawn) == 200
    assert set(drawn.tolist()) == {0, 1, 2, 3}  # the rarest is missed once in 67,000 times
    assert (chances(scores, 1.0) * weights).tolist() == pytest.approx([1 / 4] * 4, rel=1e-6)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_dealt_batches_are_cut_from_an_order_of_all(drop_last, shuffle):
    generator = torch.Generator().manual_seed(0) if shuffle else None
    partition, batch_of = deal(11, 4, drop_last, generator)
    assert len(set(partition.tolist())) == len(partition) == (8 if drop_last else 11)
    assert (partition.tolist() == sorted(partition.tolist())) == (not shuffle)
    for batch, start in enumerate(range(0, len(partition), 4)):
        members = partition[start : start + 4].tolist()
        assert sorted(members) == np.flatnonzero(batch_of == batch).tolist()
        assert set(examples_of(np.array([batch]), partition, 4).tolist()) == set(members)
    assert (batch_of < 0).sum() == 11 - len(partition)


def test_batches_are_visited_in_order_with_a_short_one_last():
    ranking = np.array([4, 2, 0, 3, 1])
    for full, last in ((5, []), (4, [4])):  # batch 4 is full, or short
        generator = torch.Generator().manual_seed(0)
        chosen, orders = np.array([3, 4, 0, 2]), set()
        by_index, by_rank = [0, 2, 3, 4], [4, 2, 0, 3]
        assert visits(chosen, ranking, full, "index", generator).tolist() == by_index
        found = visits(chosen, ranking, full, "hardest", generator).tolist()
        assert found == [i for i in by_rank if i not in last] + last
        for _ in range(300):
            orders.add(tuple(visits(chosen, ranking, full, "shuffle", generator).tolist()))
        assert {tuple(sorted(order)) for order in orders} == {tuple(by_index)}
        assert len(orders) == (6 if last else 24)
        assert all(list(order[len(order) - len(last) :]) == last for order in orders)
    assert visits(np.array([1, 2, 1]), ranking, 5, "hardest", generator).tolist() == [2, 1, 1]


def test_regrouped_examples_are_shuffled_or_sorted_or_both():
    scores = np.array([5, 1, 9, 3, 7, 3, 8], np.float32)
    chosen, generator = np.array([0, 2, 3, 4, 5]), torch.Generator().manual_seed(0)

    def orders(regroup, order):
        found = [regrouped(chosen, scores, 2, regroup, order, generator) for _ in range(1500)]
        return {tuple(examples.tolist()) for examples in found}

    assert len(orders("random", "index")) == len(orders("random", "shuffle")) == 120
    ties = {(2, 4, 0, 3, 5), (2, 4, 0, 5, 3)}
    assert orders("sorted", "index") == orders("sorted", "hardest") == ties
    swapped = {(0, 3, 2, 4, 5), (0, 5, 2, 4, 3)}
    assert orders("sorted", "shuffle") == ties | swapped


def test_a_unit_that_is_never_drawn_has_a_finite_weight():
    scores = np.array([1.0, -np.inf, 0.5], np.float32)
    with np.errstate(all="raise"):
        drawn, weights = draw(scores, 50, 0.1, torch.Generator().manual_seed(0))
    assert 1 not in drawn
    assert np.isfinite(weights).all()

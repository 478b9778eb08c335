# SPDX-License-Identifier: Apache-2.0
"""Oracles of the selection as pure functions, and of scores without a sampler."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from batchery.select.hardness import Hardness, chances, explore, falling, force, highest


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


def test_moving_scores_keeps_ages_of_the_oldest():
    hardness = Hardness(6, 3, keep=0.0)
    hardness.scores = torch.tensor([1.0, torch.nan, 4.0])
    hardness.last_seen = torch.tensor([5, -1, 3], dtype=torch.int32)
    hardness.move(np.array([0, 0, 1, 1, 2, -1]), np.array([0, 1, 1, 2, 0, 2]))
    assert hardness.scores[:2].tolist() == [2.5, 1.0]
    assert hardness.scores[2].isnan()
    assert hardness.last_seen.tolist() == [3, -1, -1]


@pytest.mark.parametrize("keep", [0.0, 0.7])
def test_examples_that_are_units_need_no_tally(keep):
    """The short way gives the scores of the long one to the bit, repeats and NaN included."""
    short, tallied = Hardness(40, 40, keep), Hardness(40, 40, keep)
    generator = torch.Generator().manual_seed(0)
    for turn in range(5):
        for part in range(4):
            examples = torch.randint(40, (9,), generator=generator)
            losses = torch.randn(9, generator=generator)
            losses[turn] = [torch.nan, torch.inf, 1.0, -0.5][part]
            for hardness in (short, tallied):
                hardness.report(examples, losses[:1] if part == 2 else losses)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            short.absorb(None, None)
            tallied.absorb(lambda known: known, None)
        assert torch.equal(short.scores.nan_to_num(99), tallied.scores.nan_to_num(99))
    assert short.not_finite == tallied.not_finite > 0

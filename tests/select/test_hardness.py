# SPDX-License-Identifier: Apache-2.0
"""Oracles of scores without a sampler."""

import warnings

import numpy as np
import pytest
import torch

from batchery.select.hardness import Hardness


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

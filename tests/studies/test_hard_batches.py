# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch

from batchery.studies.hard_batches import (
    BALANCED_ONLY,
    FEEDS,
    RARE,
    SIZES,
    STUDY,
    Balanced,
    Pruned,
    _arrays,
    _task,
)
from batchery.studies.study import SCALES

CPU = torch.device("cpu")


@pytest.mark.parametrize("arm", FEEDS)
def test_every_arm_gives_as_many_full_batches_as_it_is_asked_for(arm):
    labels = torch.arange(103) % 10
    feed = FEEDS[arm](labels, 8, 60, 0)
    stream = itertools.islice(itertools.chain.from_iterable(itertools.repeat(feed)), 60)
    batches = []
    for batch in stream:
        batches.append(batch)
        if hasattr(feed, "update"):
            feed.update(torch.tensor([float(i % 7) for i in batch]), batch)
    assert [len(batch) for batch in batches] == [8] * 60
    again = FEEDS[arm](labels, 8, 60, 0)
    assert next(iter(again)) == batches[0]


def test_pruning_keeps_the_expected_gradient_and_ends_on_everything():
    feed = Pruned(100, 5, updates=100_000, seed=0)
    assert len(list(feed)) == 20
    feed.update(torch.arange(100.0), list(range(100)))
    weight = torch.zeros(100)
    passes = 2000
    for _ in range(passes):
        for batch in feed:
            weight[batch] += feed.weights(batch)
    # below the mean: weight 2 with chance 1/2, less the examples that do not fill a batch
    lost = 1 - weight[50:].mean() / passes
    assert 0 <= lost < 0.04
    assert weight[:50].mean() / passes == pytest.approx(1 - lost.item(), abs=0.01)
    ending = Pruned(100, 5, updates=40, seed=0)
    list(ending)
    ending.update(torch.arange(100.0), list(range(100)))
    assert len(list(ending)) < 20
    ending.left = 5
    assert len(list(ending)) == 20


def test_balanced_draws_show_every_class_as_often():
    labels = torch.cat([torch.zeros(990), torch.ones(10)]).long()
    drawn = torch.tensor([batch for _ in range(4) for batch in Balanced(labels, 10, 0)]).flatten()
    share = labels[drawn].float().mean().item()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(drawn)))


def test_the_rare_class_is_cut_in_training_only_and_tuning_sees_no_test_data():
    whole = _arrays("digits", CPU)
    cut = _task(SIZES["cpu"], "imbalanced", 3, CPU, tuning=False)
    assert int((cut.y_train == RARE).sum()) == SIZES["cpu"].rare
    assert int((cut.y_train != RARE).sum()) == int((whole.y_train != RARE).sum())
    assert torch.equal(cut.x_test, whole.x_test)
    other = _task(SIZES["cpu"], "imbalanced", 4, CPU, tuning=False)
    assert not torch.equal(other.x_train, cut.x_train)
    tuning = _task(SIZES["cpu"], "balanced", 3, CPU, tuning=True)
    assert torch.equal(torch.cat([tuning.x_train, tuning.x_test]), whole.x_train)


def test_the_claims_are_the_papers_method_against_ordinary_training():
    claims = [(c.arm, c.baseline, c.metric) for c in STUDY.comparisons if c.claim]
    assert claims == [("batch 0.5", "shuffled", m) for m in ("accuracy", "recall_rare")]
    rare = [c for c in STUDY.comparisons if "rare" in c.metric]
    assert not {name for c in rare for name in (c.arm, c.baseline)} & set(BALANCED_ONLY)
    assert set(STUDY.seeds) == set(SCALES)
    assert STUDY.seeds["cpu"] >= 5

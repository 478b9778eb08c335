# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batchery.studies.hard_batches import (
    FEEDS,
    SHIFT,
    STUDY,
    Balanced,
    Pruned,
    _augmented,
    _padded,
    versions,
)
from batchery.studies.hard_batches_tasks import (
    RARE,
    SIZES,
    SPOKEN,
    arrays_of,
    spectrograms,
    task_of,
    untrained,
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
    feed = Pruned(torch.zeros(100), 5, updates=100_000, seed=0)
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
    ending = Pruned(torch.zeros(100), 5, updates=40, seed=0)
    list(ending)
    ending.update(torch.arange(100.0), list(range(100)))
    assert len(list(ending)) < 20
    ending.left = 5
    assert len(list(ending)) == 20


def test_augmented_images_are_the_images_moved_and_half_of_them_mirrored():
    images = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(39, -1, -1)
    generator = torch.Generator().manual_seed(1)
    share = []
    for _ in range(20):
        found = _augmented(_padded(images), rows, generator)
        ways = []
        for mirrored in (images, images.flip(3)):
            room = F.pad(mirrored[rows], (SHIFT,) * 4).unfold(2, 6, 1).unfold(3, 6, 1)
            ways.append((room.permute(2, 3, 0, 1, 4, 5) == found).flatten(3).all(3))
        plain, mirrored = ways
        assert ((plain | mirrored).all(2)).any()  # one shift for all
        share.append(mirrored.flatten(0, 1).any(0).float().mean())
    assert torch.stack(share).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(800))


def test_balanced_draws_show_every_class_as_often():
    labels = torch.cat([torch.zeros(990), torch.ones(10)]).long()
    drawn = torch.tensor([batch for _ in range(4) for batch in Balanced(labels, 10, 0)]).flatten()
    share = labels[drawn].float().mean().item()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(drawn)))


def test_the_rare_class_is_cut_in_training_only_and_tuning_sees_no_test_data():
    size, whole = SIZES["cpu"][""], arrays_of("digits", CPU)
    cut = task_of(size, "imbalanced", 3, CPU, tuning=False)
    assert int((cut.y_train == RARE).sum()) == size.rare
    assert int((cut.y_train != RARE).sum()) == int((whole.y_train != RARE).sum())
    assert torch.equal(cut.x_test, whole.x_test)
    other = task_of(size, "imbalanced", 4, CPU, tuning=False)
    assert not torch.equal(other.x_train, cut.x_train)
    tuning = task_of(size, "balanced", 3, CPU, tuning=True)
    assert torch.equal(torch.cat([tuning.x_train, tuning.x_test]), whole.x_train)


def test_spectrograms_show_a_tone_where_it_sounds_and_know_nothing_of_the_test_part():
    """Band b holds 250 b to 250 (b + 1) Hz, moment m the samples from 256 m on."""
    time = np.arange(5000) / 8000
    noise = np.random.default_rng(0).normal(0, 300, (8, 5000))
    waves = [*noise.astype(np.int16), (noise[0] / 10 + 9000 * np.sin(2 * np.pi * 1625 * time))]
    waves[-1][1024:] = 0
    waves[-1] = waves[-1].astype(np.int16)
    test = np.arange(9) == 8
    found = spectrograms(waves, np.arange(9), test)
    assert found["x_train"].shape == (8, 1, 16, 16)
    assert found["y_test"].tolist() == [8]
    tone = found["x_test"][0, 0]
    assert tone[:, :4].mean(1).argmax() == 6
    assert (tone[6, :4] > tone[6, 4:].max() + 5).all()
    assert found["x_train"].mean((0, 1, 3)).abs().max() < 1e-5
    assert (found["x_train"].std((0, 1, 3)) - 1).abs().max() < 1e-5
    short = spectrograms([wave[:1500] for wave in waves], np.arange(9), test)
    assert torch.equal(short["x_test"][..., 6:], short["x_test"][..., 6:7].expand(1, 1, 16, 10))


@pytest.mark.parametrize(("net", "side"), [("perceptron", 8), ("cnn", 8), ("cnn", 16)])
def test_networks_take_their_images_and_a_seed_decides_their_weights(net, side):
    one, same, other = (untrained(net, side, seed) for seed in (3, 3, 4))
    x = torch.randn(5, 1, side, side, generator=torch.Generator().manual_seed(0))
    assert one(x).shape == (5, 10)
    assert torch.equal(one(x), same(x))
    assert not torch.equal(one(x), other(x))


def test_the_claims_are_the_papers_method_against_ordinary_training_in_both_tasks():
    claims = [(c.arm, c.baseline, c.metric) for c in STUDY.comparisons if c.claim]
    metrics = ("accuracy", "recall_rare", "spoken_accuracy", "spoken_recall_rare")
    assert claims == [("batch 0.5", "shuffled", metric) for metric in metrics]
    assert set(STUDY.seeds) == set(SCALES)
    assert STUDY.seeds["cpu"] >= 5


def test_comparisons_name_arms_that_are_trained_on_their_task_at_every_scale():
    for comparison in STUDY.comparisons:
        task = SPOKEN if comparison.metric.startswith(SPOKEN) else ""
        version = "imbalanced" if comparison.metric.endswith("rare") else "balanced"
        for scale in SCALES:
            assert task in SIZES[scale]
            for arm in (comparison.arm, comparison.baseline):
                assert version in versions(arm, task, scale)

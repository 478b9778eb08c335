# SPDX-License-Identifier: Apache-2.0
"""Oracles of reported losses and the scores that they make."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from hard_rounds import flat, pseudo, rounds

from batchery.select import HardBatchSampler


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


@pytest.mark.parametrize(("size", "kinds"), [(6, {}), (1, {}), (6, {"rank": 1, "world_size": 2})])
def test_reports_without_indices_are_those_of_the_batches_in_order(kinds, size):
    """In mode "sample" too: losses of examples, in the order of the batch, or its mean."""
    silent, named = (HardBatchSampler(30, size, mode="sample", **kinds) for _ in range(2))
    for epoch in range(3):
        batches = list(silent)  # read ahead, as a loader does
        for turn, (one, other) in enumerate(zip(batches, named, strict=True)):
            assert one == other
            losses = torch.tensor([pseudo(i, 1 + epoch) for i in one])
            losses = losses.mean() if turn % 2 else losses
            silent.update(losses)
            named.update(losses, other)
        iter(silent), iter(named)  # scores are made at the start of a round
        assert torch.equal(silent.scores.nan_to_num(-1), named.scores.nan_to_num(-1))
        assert silent.scores.isfinite().any()


def test_a_report_that_is_refused_takes_no_turn():
    sampler = HardBatchSampler(12, 4, mode="sample")
    batch = next(iter(sampler))
    with pytest.raises(ValueError, match="loss must be 1 number or 4, got 3"):
        sampler.update(torch.ones(3))
    sampler.update(torch.arange(4.0))
    sampler.set_epoch(1)
    assert sampler.scores[batch].tolist() == [0.0, 1.0, 2.0, 3.0]


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


def test_bad_reports_are_named():
    sampler = HardBatchSampler(8, 2, mode="sample")
    next(iter(sampler))
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
    ("loss", "indices", "message"),
    [
        ("x", [0], "loss must be a number or a tensor, got 'x'"),
        (None, [0], "loss must be a number or a tensor, got None"),
        ([[1.0], [2.0, 3.0]], [0], "loss must be a number or a tensor, got "),
        (1.0, "x", "indices must be whole numbers, got 'x'"),
        (1.0, [0.5], "indices must be whole numbers, got .0.5."),
        (1.0, [2**70], "indices must be whole numbers, got "),
        (1.0, np.array([0.5]), "indices must be whole numbers, got array"),
        (1.0, np.array(["x"]), "indices must be whole numbers, got array"),
        (1.0, torch.tensor([True]), "indices must be whole numbers, got tensor"),
    ],
)
def test_what_is_no_number_is_named(loss, indices, message):
    """Indices of 0.5 used to be taken for 0."""
    sampler = HardBatchSampler(8, 2, mode="sample")
    with pytest.raises(TypeError, match=f"HardBatchSampler: {message}"):
        sampler.update(loss, indices)


@pytest.mark.parametrize(
    "indices",
    [
        [1, 3],
        (1, 3),
        range(1, 4, 2),
        np.array([1, 3], np.uint8),
        np.array([[3, 1]])[:, ::-1],
        torch.tensor([[1], [3]]),
    ],
)
def test_indices_come_in_every_form_and_are_copied(indices):
    sampler = HardBatchSampler(8, 2, mode="sample")
    list(sampler)
    sampler.update([5.0, 6.0], indices)
    if isinstance(indices, torch.Tensor | np.ndarray):
        indices[:] = 0
    list(sampler)
    assert sampler.scores.nan_to_num(-1).tolist() == [-1, 5, -1, 6, -1, -1, -1, -1]
    assert sampler.importance_weights([]).tolist() == []


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_batches_with_a_shape_are_reported_as_they_came(mode):
    plain, shaped = (HardBatchSampler(16, 4, mode=mode, temperature=1.0) for _ in range(2))
    shaped.set_batch_size(4, shape=(3, 5))
    for one, two in zip(plain, shaped, strict=True):
        assert two == [(index, (3, 5)) for index in one]
        losses = torch.tensor(one, dtype=torch.float32)
        if mode == "sample":
            plain.update(losses, one)
            shaped.update(losses, two)
            assert torch.equal(shaped.importance_weights(two), plain.importance_weights(one))
        else:
            plain.update(losses.mean())
            shaped.update(losses.mean())
    next(iter(plain))
    next(iter(shaped))
    assert torch.equal(shaped.scores, plain.scores)
    assert not shaped.scores.isnan().any()

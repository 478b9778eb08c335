# SPDX-License-Identifier: Apache-2.0
"""Oracles of the hard stream: written out, against explicit sums, and as an attack that works."""

import pytest
import torch
from recorded_noise import Zero

from batchery.privacy import (
    Budget,
    DiscreteNoise,
    HardStream,
    MaxSum,
    hard_shape,
    hard_stream,
)
from batchery.privacy.bounds import recompute_max

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)
SHAPES = [(3, 1, 1), (20, 2, 3), (9, 4, 1), (45, 2, 9), (200, 6, 13), (15, 1, 5), (60, 9, 3)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def whole(stream):
    return torch.cat([row.expand(repeats, -1) for row, repeats in stream.runs()])


def test_the_stream_written_out():
    secret = torch.tensor([[1, 0], [1, 1]]).bool()
    rows = [[1, 0], [1, 1], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1], [1, 0], [1, 0], [0, 0]]
    stream = HardStream(secret, 11)
    assert whole(stream).int().tolist() == rows
    assert stream.maxima().tolist() == [1, 2, 3, 4, 4, 4, 4, 5, 5, 6, 6]
    assert stream.reads().tolist() == [4, 8]
    # c = (2, 1): the reads see 2 + 2 and 1 + 2 + 2.
    assert stream.read_out(stream.maxima()).tolist() == stream.counts().tolist() == [2, 1]


@pytest.mark.parametrize(("horizon", "columns", "n"), SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_maxima_are_those_of_the_rows_and_reads_are_exact(horizon, columns, n, seed):
    stream = hard_stream(horizon, columns, n, generator(seed))
    rows = whole(stream)
    assert rows.shape == (horizon, columns)
    sums = rows.cumsum(0)
    assert torch.equal(stream.maxima(), sums.amax(1))
    assert torch.equal(stream.read_out(stream.maxima()).long(), stream.counts())
    # At a read the column leads, and after a block all columns stand as after the secret.
    for j, t in enumerate(stream.reads().tolist()):
        assert sums[t - 1, j] == sums[t - 1].max()
        assert torch.equal(sums[t + n - 1], stream.counts() + (j + 1) * n)


@pytest.mark.parametrize(("horizon", "columns", "n"), SHAPES)
@pytest.mark.parametrize("cells", [1, 7, 40, 1 << 22])
def test_chunks_are_the_rows_and_no_larger_than_asked_for(horizon, columns, n, cells):
    stream = hard_stream(horizon, columns, n)
    chunks = list(stream.chunks(cells))
    assert torch.equal(torch.cat(chunks), whole(stream))
    assert max(chunk.numel() for chunk in chunks) <= max(cells, columns)
    assert all(chunk.dtype == torch.bool for chunk in chunks)


def test_shapes_are_in_the_hard_regime():
    assert hard_shape(2**20, 0.5) == (3251, 161)
    for horizon in (3, 4, 10, 2**10, 12345, 2**20):
        for rho in (1e-6, 0.5, 1e4):
            columns, n = hard_shape(horizon, rho)
            assert n >= 1
            assert columns >= 1
            assert n * (2 * columns + 1) <= horizon
            hard_stream(min(horizon, 3), 1, 1)


def test_the_generator_decides_and_none_is_always_the_same():
    def secret(g):
        return hard_stream(40, 3, 5, g).secret

    assert torch.equal(secret(None), secret(None))
    assert torch.equal(secret(generator(1)), secret(generator(1)))
    assert not torch.equal(secret(generator(1)), secret(generator(2)))


def test_a_mechanism_without_noise_is_read_out_and_a_private_one_is_not():
    columns, n = hard_shape(2**12, RHO.rho)
    stream = hard_stream(2**12, columns, n, generator(3))
    truth = stream.counts()

    def off(**kinds):
        mechanism = MaxSum(stream.horizon, columns, budget=RHO, mechanism="recompute", **kinds)
        releases = torch.cat([mechanism.update_many(chunk) for chunk in stream.chunks()])
        return float((stream.read_out(releases) - truth).abs().mean()) / n

    assert off(interval=1, noise=Zero(), consistent=False) == 0
    guess = float((n / 2 - truth).abs().mean()) / n
    assert off(noise=DiscreteNoise(insecure_seed=1)) > guess
    # The noise of one release on every release: the budget says 0.5 and the reads are exact to 1.
    one = DiscreteNoise(insecure_seed=1).sample("gaussian", 1, (stream.horizon,))
    leaked = stream.read_out(stream.maxima() + torch.from_numpy(one))
    assert (leaked - truth).abs().mean() < 1
    assert recompute_max(2**12, RHO, 0.05, interval=1).scale == 2**12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hard_stream(10, 2, 3), "horizon must be >= n .2 num_columns . 1. = 15, got 10"),
        (lambda: hard_stream(10, 0, 3), "hard_stream: num_columns must be >= 1, got 0"),
        (lambda: hard_stream(10, 2, 0), "hard_stream: n must be >= 1, got 0"),
        (lambda: hard_shape(2, 0.5), "hard_shape: horizon must be >= 3, got 2"),
        (lambda: hard_shape(9, 0.0), "hard_shape: rho must be > 0, got 0.0"),
        (lambda: next(hard_stream(9, 1, 3).chunks(0)), "HardStream: cells must be >= 1, got 0"),
        (
            lambda: hard_stream(9, 1, 3).read_out(torch.zeros(3)),
            r"HardStream: releases must have shape \[9\], got \[3\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

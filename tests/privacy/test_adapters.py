# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from dist_ranks import run_on_ranks
from recorded_noise import Zero

from batchery.privacy import (
    Budget,
    DiscreteNoise,
    MaxSum,
    OnOneRank,
    PrivateAccuracy,
    TreeCounter,
)

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)


def counter():
    return TreeCounter(5, 3, budget=RHO, noise=DiscreteNoise(insecure_seed=1))


def row(rank, t):
    return torch.arange(3) * (rank + 1) + t


def _on_rank(rank, size):
    private = OnOneRank(counter() if rank == 0 else None)
    written = []
    found = [private.update(row(rank, t), commit=written.append) for t in range(5)]
    try:
        private.update(row(rank, 5))
    except Exception as error:
        return torch.stack(found), len(written), f"{type(error).__name__}: {error}"
    raise AssertionError("beyond the horizon")


@pytest.mark.dist
def test_all_ranks_learn_the_release_of_the_first():
    wanted = counter().update_many(torch.stack([row(0, t) + row(1, t) for t in range(5)]))
    (one, written, here), (two, silent, there) = run_on_ranks(_on_rank)
    assert torch.equal(one, wanted)
    assert torch.equal(two, wanted)
    assert (written, silent) == (5, 0)
    assert here.startswith("HorizonExceeded: TreeCounter: 1 more after 5")
    assert there == "RuntimeError: OnOneRank: HorizonExceeded on the first rank"


def test_one_process_is_the_mechanism_itself():
    private = OnOneRank(counter())
    found = torch.stack([private.update(row(0, t)) for t in range(5)])
    assert torch.equal(found, counter().update_many(torch.stack([row(0, t) for t in range(5)])))
    assert (
        OnOneRank(MaxSum(3, 2, budget=RHO, mechanism="constant")).update(torch.zeros(2).long()) == 0
    )
    with pytest.raises(ValueError, match="OnOneRank: mechanism must be given on the first rank"):
        OnOneRank(None)


def test_accuracy_without_noise_is_the_accuracy():
    accuracy = PrivateAccuracy(4, budget=RHO, noise=Zero())
    assert math.isnan(accuracy.compute())
    accuracy.update(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 0]))
    accuracy.update(torch.tensor([[4]]), torch.tensor([[0]]))
    assert accuracy.compute() == 0.5
    with pytest.raises(ValueError, match="predicted must have the shape of target"):
        accuracy.update(torch.zeros(3), torch.zeros(2))


def test_accuracy_pays_for_both_counts():
    # Both counts move by one: squared sensitivity 2 in 3 levels; L1 sensitivity 2.
    assert PrivateAccuracy(4, budget=RHO).counter.design.scale == pytest.approx(6, rel=1e-6)
    assert PrivateAccuracy(4, budget=Budget.pure(1.0)).counter.design.scale == 6

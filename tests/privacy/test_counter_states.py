# SPDX-License-Identifier: Apache-2.0
"""Oracles of what counters keep: resumed runs, crashes, copies and forks."""

import copy
import io
import os

import numpy as np
import pytest
import torch
from recorded_noise import Given

from batchery.privacy import (
    Budget,
    DiscreteNoise,
    FloatNoise,
    HorizonExceeded,
    MaxSum,
    TreeCounter,
)

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)


def bits(n, *shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 2, (n, *shape)))


def seeded(horizon, shape, **kinds):
    return TreeCounter(
        horizon,
        shape,
        budget=RHO,
        noise=kinds.pop("noise", DiscreteNoise(insecure_seed=1)),
        **kinds,
    )


def reload(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("horizon", [70, None])
@pytest.mark.parametrize("at", [1, 2, 3, 31, 64])
@pytest.mark.parametrize("kinds", [{}, {"estimator": "honaker"}, {"sampler": "float"}], ids=str)
def test_resumes_bit_for_bit(horizon, at, kinds):
    rows = bits(70, 3)

    def build():
        given = dict(kinds)
        if "sampler" in kinds:
            given["noise"] = FloatNoise(torch.Generator().manual_seed(1))
        return seeded(horizon, 3, **given)

    whole = build()
    wanted = whole.update_many(rows)
    first = build()
    first.update_many(rows[:at])
    state = reload(first.state_dict())
    again = build()
    again.load_state_dict(state)
    assert torch.equal(again.last(), wanted[at - 1])
    assert torch.equal(again.update_many(rows[at:]), wanted[at:])


@pytest.mark.parametrize("estimator", ["prefix", "honaker"])
def test_a_resume_draws_no_noise_again(estimator):
    z = np.random.default_rng(0).integers(-50, 50, 100)
    rows = bits(40)
    whole = TreeCounter(40, budget=RHO, estimator=estimator, noise=Given(z))
    wanted = whole.update_many(rows)
    noise = Given(z)
    counter = TreeCounter(40, budget=RHO, estimator=estimator, noise=noise)
    counter.update_many(rows[:23])
    state = counter.state_dict()
    rest = Given(z[noise.used :])  # a noise that has never seen the first 23 steps
    again = TreeCounter(40, budget=RHO, estimator=estimator, noise=rest)
    again.load_state_dict(state)
    assert torch.equal(again.last(), wanted[22])
    assert rest.used == 0
    assert torch.equal(again.update_many(rows[23:]), wanted[23:])


def test_state_is_written_before_a_release_is_seen():
    counter = TreeCounter(8, budget=RHO)
    written = []

    def commit(state):
        written.append(reload(state))

    releases = [counter.update(1, commit=commit) for _ in range(3)]
    releases += list(counter.update_many([1, 1], commit=commit))
    assert [state["t"] for state in written] == [1, 2, 3, 5]
    for state in written:
        again = TreeCounter(8, budget=RHO)
        again.resume(state, published=state["t"])
        assert torch.equal(again.last(), releases[state["t"] - 1])

    def fail(state):
        written.append(reload(state))
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        counter.update(1, commit=fail)
    assert counter.t == 5
    assert torch.equal(counter.last(), releases[-1])
    # Had it been written all the same: what was released and not seen needs no new noise.
    again = TreeCounter(8, budget=RHO)
    again.resume(written[-1], published=5)
    assert again.t == 6


def test_a_state_behind_what_was_published_is_refused_or_paid_for():
    counter = TreeCounter(8, budget=RHO)
    counter.update(1)
    state = counter.state_dict()
    counter.update(1)
    again = TreeCounter(8, budget=RHO)
    with pytest.raises(ValueError, match="published must be <= 1, where the state is.* got 2"):
        again.resume(state, published=2)
    assert again.t == 0
    again.resume(state, published=2, strict=False)
    assert again.spent.rho == pytest.approx(0.5 + 0.5 / 4)  # a whole budget, and one level of four
    again.update_many([1] * 7)
    assert again.spent == Budget(rho=1.0)
    third = TreeCounter(8, budget=RHO)
    third.resume(again.state_dict(), published=8)
    assert third.spent == Budget(rho=1.0)


@pytest.mark.parametrize("budget", [Budget(rho=50.0), Budget.pure(10.0)], ids=repr)
def test_redrawing_from_the_start_costs_a_whole_budget_at_once(budget):
    def sparse():
        return MaxSum(100, 3, budget=budget, mechanism="sparse", expected_max=100)

    for build in (sparse, lambda: TreeCounter(100, budget=budget)):
        start = build().state_dict()
        again = build()
        for times in (1, 2):
            again.resume({**start, "redraws": times - 1}, published=100, strict=False)
            assert again.spent == budget.share(times)
    again = sparse()
    again.resume(sparse().state_dict(), published=100, strict=False)
    again.update([1, 0, 0])
    assert budget.rho < again.spent.rho < budget.share(2).rho


def test_a_state_of_another_dtype_is_refused():
    float32 = TreeCounter(8, 2, budget=RHO, sampler="float", dtype=torch.float32)
    float64 = TreeCounter(8, 2, budget=RHO, sampler="float")
    with pytest.raises(ValueError, match="TreeCounter.* dtype='float32', this .* dtype='float64'"):
        float64.load_state_dict(float32.state_dict())


def test_past_the_horizon_nothing_changes():
    counter = seeded(5, 2)
    counter.update_many(bits(4, 2))
    before = counter.state_dict()
    with pytest.raises(HorizonExceeded, match="TreeCounter: 2 more after 4 .* horizon of 5"):
        counter.update_many(bits(2, 2))
    assert repr(counter.state_dict()) == repr(before)
    counter.update(bits(1, 2)[0])
    before = counter.state_dict()
    with pytest.raises(HorizonExceeded):
        counter.update(bits(1, 2)[0])
    assert repr(counter.state_dict()) == repr(before)
    assert issubclass(HorizonExceeded, ValueError)


def test_copies_and_forks_share_no_future_noise():
    counter = TreeCounter(100, 50, budget=RHO)
    counter.update(torch.zeros(50).long())
    twin = copy.deepcopy(counter)
    row = torch.zeros(50).long()
    assert torch.equal(counter.last(), twin.last())
    assert not torch.equal(counter.update(row), twin.update(row))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, counter.update(row).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reading, 1 << 16), np.int64)
    assert not np.array_equal(counter.update(row).numpy(), theirs)
    # Nor is noise that nobody has used yet written down.
    assert counter.state_dict()["inner"]["noise"]["rows"] == {}


def test_a_state_of_other_settings_is_refused():
    state = seeded(8, 2).state_dict()
    for other in (seeded(9, 2), seeded(8, 3), seeded(8, 2, estimator="honaker")):
        with pytest.raises(ValueError, match="TreeCounter: the saved state has"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="must hold 'inner'"):
        seeded(8, 2).load_state_dict({k: v for k, v in state.items() if k != "inner"})

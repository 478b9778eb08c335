# SPDX-License-Identifier: Apache-2.0
"""Oracles of MaxSum and SumSelect: what is released, the choice, errors, crashes."""

import io
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from recorded_noise import Given, Recording, Zero
from rounded_scales import CHOSEN, ROUNDED
from scipy import stats

from batchery.privacy import (
    Budget,
    DiscreteNoise,
    FloatNoise,
    HorizonExceeded,
    MaxSum,
    SumSelect,
    TreeCounter,
)
from batchery.privacy.bounds import Sparse, recompute_max
from batchery.privacy.raw_release import Fired

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)
MAX = ["recompute", "tree", "sqrt", "sparse", "constant"]
SELECT = ["recompute", "tree", "sqrt", "constant"]


def bits(n, d, seed=0, p=0.5):
    return torch.from_numpy((np.random.default_rng(seed).random((n, d)) < p).astype(np.int64))


def seeded(kind, horizon, d, mechanism="auto", seed=1, **kinds):
    if mechanism == "sqrt":
        kinds |= {"sampler": "float", "noise": FloatNoise(torch.Generator().manual_seed(seed))}
    kinds = {"budget": RHO, "noise": DiscreteNoise(insecure_seed=seed)} | kinds
    return kind(horizon, d, mechanism=mechanism, **kinds)


# What is released


@pytest.mark.parametrize("horizon", [1, 40, None])
def test_without_noise_releases_are_exact(horizon):
    rows = bits(40 if horizon is None else horizon, 5, p=0.3)
    tops = rows.cumsum(0).amax(1)
    for mechanism in ("recompute", "tree"):
        kinds = {"interval": 1} if mechanism == "recompute" else {}
        for consistent in (True, False):
            found = MaxSum(
                horizon,
                5,
                budget=RHO,
                mechanism=mechanism,
                consistent=consistent,
                noise=Zero(),
                **kinds,
            )
            assert torch.equal(found.update_many(rows), tops)
        select = SumSelect(
            horizon, 5, budget=RHO, mechanism=mechanism, noise=Zero(), **kinds
        ).update_many(rows)
        assert torch.equal(select, rows.cumsum(0).argmax(1))


def test_sparse_without_noise_is_exact_while_releases_last():
    rows = bits(60, 4, p=0.2)
    tops = rows.cumsum(0).amax(1).tolist()
    law = (Fraction(1), Fraction(1), Fraction(1))
    enough = Fired(Sparse(1, tops[-1], "gaussian", *law), Zero(), torch.zeros(4).long())
    assert enough.answers(rows) == tops
    assert enough.stats() == {"releases": tops[-1], "exhausted": True}
    few = Fired(Sparse(1, 3, "gaussian", *law), Zero(), torch.zeros(4).long())
    assert few.answers(rows) == [min(top, 3) for top in tops]
    steps = Fired(Sparse(4, 99, "gaussian", *law), Zero(), torch.zeros(4).long())
    assert steps.answers(rows) == [top - top % 4 for top in tops]
    assert steps.stats()["exhausted"] is False


def test_the_threshold_gets_new_noise_once_a_release_and_never_between():
    recording = Recording(Zero())
    plan = Sparse(2, 3, "gaussian", Fraction(5), Fraction(7), Fraction(9))
    fired = Fired(plan, recording, torch.zeros(1).long())
    fired.answers(torch.ones(10, 1, dtype=torch.int64))
    kinds = {Fraction(5): "value", Fraction(7): "threshold", Fraction(9): "query"}
    drawn = [kinds[scale] for _, scale, _ in recording.drawn]
    assert drawn == ["threshold", "query", "query", "value"] * 3  # then nothing is asked


def test_held_values_are_the_last_or_the_middle():
    rows = torch.ones(20, 1, dtype=torch.int64)
    kinds = {"budget": RHO, "mechanism": "recompute", "interval": 5, "noise": Zero()}
    last = MaxSum(20, 1, hold="last", consistent=False, **kinds).update_many(rows)
    assert last.tolist() == [1] * 5 + [6] * 5 + [11] * 5 + [16] * 5
    middle = MaxSum(20, 1, consistent=False, **kinds).update_many(rows)
    assert middle.tolist() == [3] * 5 + [8] * 5 + [13] * 5 + [18] * 5
    assert (middle - torch.arange(1, 21)).abs().max() <= 5 / 2
    smooth = MaxSum(20, 1, **kinds).update_many(rows)
    assert smooth.tolist() == [1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]


def test_consistent_releases_rise_by_at_most_one():
    raw = [5, -3, 2, 9, 9, 1]
    rows = torch.zeros(6, 1, dtype=torch.int64)
    kinds = {"budget": RHO, "mechanism": "recompute", "interval": 1}
    found = MaxSum(6, 1, noise=Given(raw), **kinds).update_many(rows)
    assert found.tolist() == [1, 1, 2, 3, 4, 4]
    assert MaxSum(6, 1, noise=Given(raw), consistent=False, **kinds).update_many(
        rows
    ).tolist() == list(raw)


@pytest.mark.parametrize("noise", [DiscreteNoise, FloatNoise])
def test_a_choice_has_the_probabilities_of_the_exponential_mechanism(noise):
    source = (
        DiscreteNoise(insecure_seed=4)
        if noise is DiscreteNoise
        else FloatNoise(torch.Generator().manual_seed(4))
    )
    sampler = "discrete" if noise is DiscreteNoise else "float"
    select = SumSelect(
        100, 5, budget=RHO, mechanism="recompute", interval=10, sampler=sampler, noise=source
    )
    plan = select._recompute(0)
    assert float(plan.scale) == pytest.approx(math.sqrt(8 * 0.5 / 10) / 2, rel=CHOSEN)
    sums = torch.tensor([9, 4, 9, 0, 7])
    draws = [select._answer(sums, plan) for _ in range(4000)]
    weights = np.exp(float(plan.scale) * sums.numpy())
    expected = 4000 * weights / weights.sum()
    assert stats.chisquare(np.bincount(draws, minlength=5), expected).pvalue > 1e-4


def test_of_equal_counts_the_lowest_index_is_released():
    select = SumSelect(4, 3, budget=RHO, mechanism="tree", noise=Zero())
    rows = [[0, 1, 1], [0, 0, 1], [1, 1, 0], [1, 0, 0]]
    assert [select.update(row) for row in rows] == [1, 2, 1, 0]


def test_a_margin_keeps_the_last_index():
    rows = [[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
    kinds = {"budget": RHO, "mechanism": "tree", "noise": Zero()}
    select = SumSelect(4, 3, margin=1, **kinds)
    assert [select.update(row) for row in rows] == [0, 0, 2, 2]
    one, two = SumSelect(4, 3, margin=1, **kinds), SumSelect(4, 3, margin=1, **kinds)
    assert one.update_many(rows).tolist() == [two.update(row) for row in rows]
    with pytest.raises(ValueError, match="margin must be 0 with mechanism 'recompute', got 2"):
        SumSelect(4, 3, budget=RHO, mechanism="recompute", margin=2)


# The choice


def test_auto_takes_the_least_bound_and_looks_at_no_row():
    for kind, names in ((MaxSum, MAX), (SumSelect, SELECT)):
        for d in (1, 35, 2000):
            for sampler in ("discrete", "float"):
                m = kind(2**14, d, budget=RHO, sampler=sampler)
                bounds = m.plan["bounds"]
                allowed = [name for name in names if sampler == "float" or name != "sqrt"]
                assert list(bounds) == allowed
                assert m.mechanism == min(bounds, key=bounds.get)
                for name in allowed:
                    told = kind(2**14, d, budget=RHO, sampler=sampler, mechanism=name)
                    wanted = pytest.approx(bounds[name], rel=ROUNDED, abs=1)  # rounded up
                    assert told.error_bound(0.05) == wanted


def test_what_auto_takes():
    assert MaxSum(2**19, 35, budget=RHO, sampler="float").mechanism == "sqrt"
    assert MaxSum(2**19, 2000, budget=RHO, sampler="float").mechanism == "recompute"
    assert MaxSum(2**19, 2, budget=RHO).mechanism == "tree"
    assert MaxSum(50, 2000, budget=Budget(1e-4)).mechanism == "constant"
    # Hardly any records count, and more than can be kept silent about at the same error.
    rare = MaxSum(2**24, 2000, budget=Budget(4.0), expected_max=512)
    assert rare.mechanism == "sparse"
    assert rare.bounds["sparse"] < rare.expected_max
    assert MaxSum(None, 3, budget=RHO).mechanism == "recompute"


def test_auto_does_not_pay_for_what_silence_does_as_well():
    rare = MaxSum(2**20, 35, budget=RHO, expected_max=50)
    assert min(rare.bounds, key=rare.bounds.get) == "sparse"
    assert rare.bounds["sparse"] > 50  # which 0 is never off by, if the guess is right
    assert rare.mechanism == "recompute"  # whose bound needs no guess
    told = MaxSum(2**20, 35, budget=RHO, expected_max=50, mechanism="sparse")
    assert told.plan["bounds"] == rare.plan["bounds"]


def test_a_budget_for_which_noise_lacks_digits_is_refused_and_silence_is_not():
    small = Budget(1e-25)
    for mechanism in ("recompute", "tree", "sparse"):
        with pytest.raises(ValueError, match="budget must ask for .* 61 bits, got Budget"):
            MaxSum(50, 3, budget=small, mechanism=mechanism)
    assert MaxSum(50, 3, budget=small).mechanism == "constant"
    # The first epochs of a stream without end may be within it, and the next not.
    m = MaxSum(None, 3, budget=Budget(4 / 2**61), noise=Zero())
    m.update_many(bits(3, 3))  # σ² of the third epoch's one release is (3π)² / 6 of 2^58
    before = repr(m.state_dict())
    for call, rows in ((m.update, bits(1, 3)[0]), (m.update_many, bits(9, 3))):
        with pytest.raises(ValueError, match="MaxSum: budget must ask for .* 61 bits, got Budget"):
            call(rows)
        assert repr(m.state_dict()) == before


def test_the_squared_error_that_noise_makes():
    m = MaxSum(100, 3, budget=RHO, mechanism="recompute", interval=10)
    assert m.expected_squared_error() == pytest.approx(10, rel=1e-12)  # k / (2ρ)
    copies = 4000
    zeros = torch.zeros(10, 1, dtype=torch.int64)
    kinds = {"interval": 1, "hold": "last", "consistent": False}
    found = [
        seeded(MaxSum, 10, 1, "recompute", seed, **kinds).update_many(zeros)
        for seed in range(copies // 10)
    ]
    measured = float(torch.cat(found).double().square().mean())
    # Five standard errors, √(2/4000) each.
    assert measured == pytest.approx(10, rel=5 * math.sqrt(2 / copies))
    counted = MaxSum(64, 4, budget=RHO, mechanism="tree")
    inside = TreeCounter(64, 4, budget=RHO, row_sensitivity=2.0)
    assert counted.expected_squared_error() == inside.expected_squared_error()
    endless = MaxSum(None, 3, budget=RHO)
    endless.update_many(bits(6, 3))  # in the third epoch
    plans = [endless._recompute(e) for e in range(3)]
    wanted = sum(2**e * float(plan.scale) for e, plan in enumerate(plans)) / 7
    assert endless.expected_squared_error() == pytest.approx(wanted, rel=1e-12)
    assert SumSelect(64, 4, budget=RHO, mechanism="recompute").expected_squared_error() is None
    for name in ("sparse", "constant"):
        assert MaxSum(64, 4, budget=RHO, mechanism=name).expected_squared_error() is None


def test_where_a_counter_stops_to_be_the_better_choice():
    recompute = recompute_max(2**20, RHO, 0.05, midpoint=False).bound(0.05)

    def last_better(name):
        low, high = 1, 1000
        while high - low > 1:
            d = (low + high) // 2
            m = MaxSum(2**20, d, budget=RHO, sampler="float", mechanism="constant")
            low, high = (d, high) if m.bounds[name] < recompute else (low, d)
        return low

    assert last_better("tree") == pytest.approx(16, abs=1)
    assert last_better("sqrt") == pytest.approx(220, rel=0.1)


# Error


@pytest.mark.parametrize("mechanism", MAX)
def test_bounds_of_the_maximum_hold_in_simulation(mechanism):
    horizon, d = 1000, 4
    kinds = {"expected_max": 950} if mechanism == "sparse" else {}
    failed, worst = 0, 0
    for seed in range(12):
        rows = bits(horizon, d, seed, p=0.9)
        tops = rows.cumsum(0).amax(1)
        kinds |= {"budget": Budget(rho=2.0), "consistent": seed % 2 == 0}
        m = seeded(MaxSum, horizon, d, mechanism, seed, **kinds)
        error = (m.update_many(rows) - tops).abs().max()
        failed += error > m.error_bound(0.05)
        worst = max(worst, error / m.error_bound(0.05))
    assert failed <= 2
    assert worst > 0.3  # the bound is of the right size


@pytest.mark.parametrize("mechanism", SELECT)
def test_bounds_of_the_index_hold_in_simulation(mechanism):
    horizon, d = 500, 4
    for seed in range(5):
        rows = bits(horizon, d, seed)
        sums = rows.cumsum(0)
        m = seeded(SumSelect, horizon, d, mechanism, seed, budget=Budget(rho=2.0))
        chosen = m.update_many(rows)
        behind = sums.amax(1) - sums.gather(1, chosen[:, None])[:, 0]
        assert behind.max() <= m.error_bound(0.05)


def test_the_middle_is_a_better_guess_than_the_last():
    rows = torch.ones(4096, 1, dtype=torch.int64)
    truth = torch.arange(1, 4097)
    errors = {}
    for hold in ("last", "midpoint"):
        found = [
            seeded(MaxSum, 4096, 1, "recompute", seed, hold=hold).update_many(rows)
            for seed in range(20)
        ]
        errors[hold] = float(np.mean([(f - truth).abs().max() for f in found]))
    assert errors["midpoint"] < 0.9 * errors["last"]
    assert errors["last"] == pytest.approx(51, rel=0.15)  # as simulated independently
    assert errors["midpoint"] == pytest.approx(44, rel=0.15)


# State


@pytest.mark.parametrize(
    ("kind", "mechanism", "horizon"),
    [
        (kind, mechanism, horizon)
        for kind, names in ((MaxSum, MAX), (SumSelect, SELECT))
        for mechanism in names
        for horizon in (60, None)
        if horizon is not None or mechanism not in ("sparse", "constant")
    ],
)
def test_many_at_once_are_single_steps_and_resumes_are_exact(kind, mechanism, horizon):
    rows = bits(60, 3)
    kinds = {"expected_max": 40, "budget": Budget(rho=5000.0)} if mechanism == "sparse" else {}
    single = seeded(kind, horizon, 3, mechanism, **kinds)
    wanted = torch.tensor([single.update(row) for row in rows])
    many = seeded(kind, horizon, 3, mechanism, **kinds)
    found = torch.cat([many.update_many(part) for part in rows.split([1, 22, 30, 7])])
    assert torch.equal(found, wanted)
    if mechanism == "sparse":
        assert single.stats["releases"] > 1
    for at in (1, 2, 17, 40):
        first = seeded(kind, horizon, 3, mechanism, **kinds)
        first.update_many(rows[:at])
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
        buffer.seek(0)
        again = seeded(kind, horizon, 3, mechanism, **kinds)
        again.resume(torch.load(buffer, weights_only=True), published=at)
        assert again.last() == wanted[at - 1]
        assert torch.equal(again.update_many(rows[at:]), wanted[at:])


def test_a_resume_draws_nothing_again():
    rows = bits(40, 3)
    z = np.random.default_rng(0).integers(-5, 5, 40)
    kinds = {"budget": RHO, "mechanism": "recompute", "interval": 4}
    whole = MaxSum(40, 3, noise=Given(z), **kinds)
    wanted = whole.update_many(rows)
    noise = Given(z)
    first = MaxSum(40, 3, noise=noise, **kinds)
    first.update_many(rows[:18])
    rest = Given(z[noise.used :])
    again = MaxSum(40, 3, noise=rest, **kinds)
    again.load_state_dict(first.state_dict())
    assert again.last() == wanted[17]
    again.update_many(rows[18:20])  # still held
    assert rest.used == 0
    assert torch.equal(again.update_many(rows[20:]), wanted[20:])


def test_bits_of_every_dtype_and_bounds_on_horizon():
    rows = bits(10, 3)
    wanted = seeded(MaxSum, 10, 3, "tree").update_many(rows)
    for dtype in (torch.bool, torch.uint8, torch.int32):
        assert torch.equal(seeded(MaxSum, 10, 3, "tree").update_many(rows.to(dtype)), wanted)
    m = seeded(MaxSum, 10, 3, "recompute")
    m.update_many(rows)
    before = repr(m.state_dict())
    with pytest.raises(HorizonExceeded, match="MaxSum: 1 more after 10 is beyond"):
        m.update(rows[0])
    assert repr(m.state_dict()) == before


def test_forbidden_rows_are_counted_not_shown():
    m = seeded(MaxSum, 10, 3, "recompute")
    m.update([1, 0, 1])
    before = repr(m.state_dict())
    with pytest.raises(ValueError, match="MaxSum: row 3 must hold only 0 and 1; 2 of its 3") as e:
        m.update_many([[0, 0, 1], [0, 777, -777]])
    assert "777" not in str(e.value)
    with pytest.raises(ValueError, match=r"row must have shape \[3\], got \[2\]"):
        m.update([1, 0])
    with pytest.raises(TypeError, match="row must hold integers"):
        m.update([0.5, 0.0, 1.0])
    assert repr(m.state_dict()) == before


@pytest.mark.parametrize(
    ("kind", "kinds", "message"),
    [
        (MaxSum, {"horizon": 0}, "MaxSum: horizon must be >= 1, got 0"),
        (MaxSum, {"num_columns": 0}, "num_columns must be >= 1, got 0"),
        (MaxSum, {"beta": 1.0}, "beta must be > 0 and < 1, got 1.0"),
        (MaxSum, {"mechanism": "x"}, "mechanism must be one of 'auto', 'recompute'"),
        (MaxSum, {"mechanism": "sqrt"}, "mechanism must not be 'sqrt' without sampler='float'"),
        (
            MaxSum,
            {"mechanism": "sqrt", "sampler": "float", "budget": Budget.pure(1.0)},
            "mechanism must not be 'sqrt' without sampler='float', or with a pure budget",
        ),
        (MaxSum, {"hold": "x"}, "hold must be one of"),
        (MaxSum, {"interval": 0}, "interval must be >= 1"),
        (MaxSum, {"expected_max": 0}, "expected_max must be >= 1"),
        (MaxSum, {"max_ones": 0}, "max_ones must be >= 1, got 0"),
        (MaxSum, {"adjacency": "x"}, "adjacency must be one of"),
        (MaxSum, {"budget": Budget(0.0)}, "budget must be > 0"),
        (MaxSum, {"horizon": None, "mechanism": "sparse"}, "horizon must be given for 'sparse'"),
        (SumSelect, {"mechanism": "sparse"}, "SumSelect: mechanism must be one of"),
        (SumSelect, {"margin": -1}, "SumSelect: margin must be >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(kind, kinds, message):
    with pytest.raises(ValueError, match=message):
        kind(**({"horizon": 4, "num_columns": 2, "budget": RHO} | kinds))


def test_plan_and_repr():
    m = MaxSum(10_000, 500, budget=RHO, mechanism="recompute")
    plan = m.plan
    assert (plan["mechanism"], plan["r"], plan["k"]) == ("recompute", 61, 164)
    assert plan["sigma"] == pytest.approx(math.sqrt(164), rel=ROUNDED)
    assert m.error_bound(0.05) == pytest.approx(plan["bounds"]["recompute"], abs=1)
    assert SumSelect(10_000, 500, budget=RHO, mechanism="recompute").plan["sigma"] is None
    assert MaxSum(10, 2, budget=RHO, mechanism="sparse").plan["k"] >= 1
    tree = MaxSum(64, 4, budget=RHO, mechanism="tree").plan
    assert tree["sigma"] == pytest.approx(math.sqrt(42 * 4), rel=ROUNDED)
    text = repr(m)
    assert text.startswith("MaxSum(10000, num_columns=500, mechanism='recompute', beta=0.05, ")
    assert "WARNING" in repr(MaxSum(10, 2, budget=RHO, noise=Zero()))
    state = m.state_dict()
    with pytest.raises(ValueError, match="the saved state has num_columns=500, this object num_"):
        MaxSum(10_000, 501, budget=RHO, mechanism="recompute").load_state_dict(state)


def test_a_counter_inside_is_the_counter():
    rows = bits(64, 4)
    counter = TreeCounter(
        64, 4, budget=RHO, row_sensitivity=2.0, noise=DiscreteNoise(insecure_seed=1)
    )
    wanted = counter.update_many(rows).amax(1)
    found = seeded(MaxSum, 64, 4, "tree", consistent=False).update_many(rows)
    assert torch.equal(found, wanted)

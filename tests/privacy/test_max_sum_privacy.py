# SPDX-License-Identifier: Apache-2.0
"""Oracles of what MaxSum and SumSelect cost: coupled runs, sensitivities, exact laws."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from recorded_noise import Recording, Replay, Zero
from rounded_scales import ROUNDED, SLACK

from batchery.privacy import (
    Budget,
    Challenge,
    ContinualGame,
    DiscreteNoise,
    FloatNoise,
    MaxSum,
    SumSelect,
    TreeCounter,
    zcdp_epsilon,
)
from batchery.privacy.bounds import recompute_index, sparse_max

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)


def bits(n, d):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 2, (n, d)))


def moving(releases, rng, d):
    seen = int(sum(releases)) if releases else 0
    return torch.from_numpy((rng.integers(0, 2, d) + seen) % 2)


# Trees without a horizon are coupled in the tests of the counter.
@pytest.mark.parametrize(
    ("mechanism", "horizon"),
    [("recompute", t) for t in (*range(1, 71), None)] + [("tree", t) for t in range(1, 71)],
)
def test_coupled_runs_on_neighbours_are_the_same_and_cost_what_was_declared(horizon, mechanism):
    n = horizon or 70
    check_coupling(horizon, mechanism, int(np.random.default_rng(n).integers(1, n + 1)))


@pytest.mark.parametrize("mechanism", ["recompute", "tree"])
@pytest.mark.parametrize("horizon", range(1, 21))
def test_coupled_runs_agree_whichever_row_is_the_other(horizon, mechanism):
    for at in range(1, horizon + 1):
        check_coupling(horizon, mechanism, at)


def check_coupling(horizon, mechanism, at):
    n, d = horizon or 70, 3
    coins = np.random.default_rng((n, at))
    pair = torch.from_numpy(coins.integers(0, 2, (2, d)))
    budget = Budget(rho=0.01)

    def run(noise, b):
        m = MaxSum(horizon, d, budget=budget, mechanism=mechanism, noise=noise)
        rng, releases, rows = np.random.default_rng(n), [], []
        for t in range(1, n + 1):
            rows.append(moving(releases, rng, d))
            if t == at:
                rows[-1] = pair[b]
            releases.append(m.update(rows[-1]))
        return releases, torch.stack(rows).cumsum(0)

    recording = Recording(DiscreteNoise(insecure_seed=n))
    first, sums = run(recording, 0)
    other = sums.clone()
    other[at - 1 :] += pair[1] - pair[0]
    shifts, cost = {}, Fraction(0)
    if mechanism == "recompute":
        probe = MaxSum(horizon, d, budget=budget, mechanism=mechanism, noise=Zero())
        due, seen = [], 0
        for t in range(1, n + 1):  # the steps that draw noise
            probe.update(sums[0] * 0)
            due += [t] * (probe.stats["releases"] - seen)
            seen = probe.stats["releases"]
        assert len(due) == len(recording.drawn)
        changes = [int(sums[t - 1].max() - other[t - 1].max()) for t in due]
        assert max(map(abs, changes)) <= 1
        shifts = {index: np.array([change]) for index, change in enumerate(changes)}
    else:
        change = (pair[0] - pair[1]).numpy()
        for t in range(1, n + 1):
            shifts[t - 1] = (change * (t - (t & -t) < at <= t))[None]
    for index, (_, scale, _) in enumerate(recording.drawn):
        cost += Fraction(int((shifts[index] ** 2).sum())) / (2 * scale)
    second, _ = run(Replay(recording.drawn, shifts), 1)
    assert first == second
    assert cost <= Fraction(budget.rho)


@pytest.mark.parametrize("adjacency", ["replace", "add_remove"])
@pytest.mark.parametrize(("d", "ones"), [(d, k) for d in (1, 2, 3, 5) for k in (1, 2, 4, None)])
def test_few_ones_in_a_row_are_a_small_sensitivity(d, ones, adjacency):
    every = np.array([*itertools.product((0, 1), repeat=d)])
    every = every[every.sum(1) <= (ones or d)]
    others = every if adjacency == "replace" else every[:1]  # all zeros
    changes = int(np.abs(every[:, None] - others).sum(-1).max())  # of bits: L1, and L2 squared
    kinds = {"mechanism": "tree", "adjacency": adjacency, "max_ones": ones}
    counter = MaxSum(64, d, budget=RHO, **kinds)._raw.counter
    assert counter.row_sensitivity == math.sqrt(changes)
    assert counter.design.scale == pytest.approx(7 * changes, rel=ROUNDED)  # H Δ² / (2ρ)
    assert counter.design.scale >= 7 * changes
    counter = SumSelect(64, d, budget=Budget.pure(0.5), **kinds)._raw.counter
    assert counter.design.scale == 7 * changes * 2  # H Δ₁ / ε


@pytest.mark.parametrize("kinds", [{}, {"adjacency": "add_remove"}], ids=str)
@pytest.mark.parametrize("mechanism", ["tree", "sqrt"])
def test_coupled_runs_on_rows_of_one_bit_cost_all_that_was_declared(mechanism, kinds):
    """Their records change two entries, or one: no less noise would do, and no more is paid."""
    one_hot = torch.eye(4, dtype=torch.int64)
    other = one_hot[0] * 0 if kinds else one_hot[1]

    def adversary(releases):
        seen = int(sum(releases)) if releases else 0
        return Challenge(one_hot[0], other) if not releases else one_hot[seen % 4]

    def build(noise):
        real = {"sampler": "float"} if mechanism == "sqrt" else {}
        return MaxSum(
            63, 4, budget=RHO, mechanism=mechanism, max_ones=1, noise=noise, **kinds, **real
        )

    noise = FloatNoise(torch.Generator().manual_seed(1))
    noise = noise if mechanism == "sqrt" else DiscreteNoise(insecure_seed=1)
    coupling = ContinualGame(build, adversary).couple(noise)
    assert coupling.holds
    assert coupling.cost == pytest.approx(coupling.declared, rel=ROUNDED)
    assert coupling.declared == pytest.approx(RHO.rho)


def test_few_ones_lower_the_bounds_of_counters_alone_and_move_the_choice():
    kinds = {"budget": RHO, "sampler": "float"}
    for kind in (MaxSum, SumSelect):
        wide, few = kind(2**20, 2000, **kinds), kind(2**20, 2000, max_ones=1, **kinds)
        for name, bound in wide.bounds.items():
            ratio = math.sqrt(2 / 2000) if name in ("tree", "sqrt") else 1
            assert few.bounds[name] == pytest.approx(bound * ratio, rel=ROUNDED)
        assert (wide.mechanism, few.mechanism) == ("recompute", "sqrt")
        told = kind(2**20, 2000, max_ones=1, mechanism="tree", **kinds)
        # Of the maximum it is rounded up to an integer.
        assert told.error_bound(0.05) == pytest.approx(few.bounds["tree"], rel=ROUNDED, abs=1)
    assert SumSelect(2**14, 2000, budget=RHO, max_ones=1).mechanism == "tree"


def test_more_ones_than_declared_are_refused():
    kinds = {"budget": RHO, "mechanism": "recompute"}
    m = MaxSum(10, 4, max_ones=2, **kinds)
    m.update([1, 0, 1, 0])
    before = repr(m.state_dict())
    rows = [[0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]]
    for given in (rows, torch.tensor(rows).bool()):
        with pytest.raises(ValueError, match="MaxSum: row 4 must hold at most 2 ones, by max_ones"):
            m.update_many(given)
    assert repr(m.state_dict()) == before
    with pytest.raises(ValueError, match="the saved state has max_ones=2, this object max_ones=4"):
        MaxSum(10, 4, **kinds).load_state_dict(m.state_dict())


def test_a_choice_among_neighbours_has_the_range_that_rho_is_made_of():
    plan = recompute_index(1000, 3, RHO, 0.05)
    epsilon = 2 * float(plan.scale)
    worst = 0.0
    for shift in itertools.product((-1, 0, 1), repeat=3):  # a replaced row moves scores both ways
        scores = np.array([4.0, 2.0, 3.0])
        logs = [
            np.log(p / p.sum()) for p in (np.exp(epsilon / 2 * s) for s in (scores, scores + shift))
        ]
        ratio = logs[0] - logs[1]
        worst = max(worst, ratio.max() - ratio.min())
        order = 7.0  # Rényi divergence of a bounded range ε: at most α ε² / 8
        divergence = np.log(np.sum(np.exp(order * logs[0] - (order - 1) * logs[1]))) / (order - 1)
        assert divergence <= order * epsilon**2 / 8 * (1 + 1e-12)
    assert worst == pytest.approx(epsilon)


@pytest.mark.parametrize("monotone", [False, True])
def test_comparisons_are_as_private_as_their_share(monotone):
    """Exact probabilities of "not, …, not, yes" for streams of maxima that differ by one record."""
    plan = sparse_max(50, 50, Budget(rho=2.0), 0.05, monotone=monotone)
    half = float(1 / plan.threshold_scale)
    one = 2 * half
    z = np.arange(-400, 401)

    def law(scale):
        p = np.exp(-np.abs(z) / float(scale))
        return p / p.sum()

    on_threshold, on_query = law(plan.threshold_scale), law(plan.query_scale)
    above = np.cumsum(on_query[::-1])[::-1]  # P(noise >= z)

    def yes(gap):  # P(query noise >= θ + ζ - top) by ζ
        return above[np.clip(z + gap + 400, 0, 800)]

    def transcript(tops, fires):
        found = on_threshold.copy()
        for top in tops[: fires - 1]:
            found = found * (1 - yes(5 - top))
        return float((found * yes(5 - tops[fires - 1])).sum())

    worst = 0.0
    moves = (0, 1) if monotone else (-1, 0, 1)
    for tops in ([0, 0, 1, 1], [1, 2, 3, 4], [4, 4, 4, 4]):
        for change in itertools.product(moves, repeat=4):
            other = [a + b for a, b in zip(tops, change, strict=True)]
            for fires in range(1, 5):
                ratio = math.log(transcript(tops, fires) / transcript(other, fires))
                worst = max(worst, abs(ratio))
    assert worst <= one * (1 + 1e-9)
    assert worst > 0.6 * one  # and the share is not far from what it costs
    assert plan.firings * one**2 / 2 <= 2.0 / 2


def test_epochs_without_a_horizon_share_the_budget():
    m = MaxSum(None, 3, budget=RHO)
    plans = [m._recompute(e) for e in range(40)]
    assert sum(plan.releases / (2 * plan.scale) for plan in plans[:25]) <= Fraction(RHO.rho)
    pure = MaxSum(None, 3, budget=Budget.pure(1.0))
    assert sum(p.releases / p.scale for p in map(pure._recompute, range(25))) <= 1


def test_what_was_spent():
    m = MaxSum(100, 3, budget=RHO, mechanism="recompute", interval=10)
    assert m.spent.rho == 0
    m.update([1, 0, 1])
    assert m.spent.rho == pytest.approx(0.05)
    m.update_many(bits(9, 3))
    assert m.spent.rho == pytest.approx(0.05)
    m.update_many(bits(90, 3))
    assert m.spent.rho == pytest.approx(0.5)
    assert m.stats == {"releases": 10}
    endless = MaxSum(None, 3, budget=RHO, mechanism="recompute")
    spent = []
    for row in bits(300, 3):
        endless.update(row)
        spent.append(endless.spent.rho)
    assert spent == sorted(spent)
    assert spent[0] == pytest.approx(0.5 * 6 / math.pi**2)
    assert spent[-1] < 0.5
    constant = MaxSum(100, 3, budget=RHO, mechanism="constant")
    constant.update_many(bits(100, 3))
    assert constant.spent.rho == 0
    tree = MaxSum(100, 3, budget=Budget.approx(1.0, 1e-6), mechanism="tree", sampler="float")
    tree.update_many(bits(100, 3))
    assert tree.spent.epsilon(1e-6) == pytest.approx(1.0, rel=SLACK)
    select = SumSelect(100, 3, budget=Budget.approx(1.0, 1e-6), mechanism="recompute")
    select.update_many(bits(100, 3))
    assert select.spent.epsilon(1e-6) <= 1.0


@pytest.mark.parametrize(
    "build",
    [
        lambda budget: SumSelect(1000, 5, budget=budget, mechanism="recompute"),
        lambda budget: MaxSum(1000, 5, budget=budget, mechanism="sparse"),
        lambda budget: MaxSum(1000, 5, budget=budget, mechanism="sparse", sampler="float"),
        lambda budget: MaxSum(1000, 5, budget=budget, mechanism="recompute"),
        lambda budget: TreeCounter(1000, budget=budget),
        lambda budget: TreeCounter(1000, budget=budget, estimator="honaker"),
    ],
)
def test_noise_that_is_not_continuous_gaussian_never_says_it_is(build):
    budget = Budget.approx(1.0, 1e-6).for_gaussian()
    cost = build(budget).cost
    assert cost == Budget(budget.rho)
    assert cost.epsilon(1e-6) == zcdp_epsilon(budget.rho, 1e-6) > 1
    for float_tree in (TreeCounter(9, budget=b, sampler="float") for b in (budget, cost)):
        assert float_tree.cost == budget

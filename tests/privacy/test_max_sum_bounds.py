# SPDX-License-Identifier: Apache-2.0
"""Oracles of the bounds of MaxSum and SumSelect: tables, optima, budgets, exact tails."""

import math
from fractions import Fraction

import numpy as np
import pytest
from rounded_scales import ROUNDED

from batchery.privacy import Budget
from batchery.privacy.bounds import recompute_index, recompute_max, sparse_max

RHO = Budget(rho=0.5)


@pytest.mark.parametrize(
    ("horizon", "interval", "bound"),
    [(10**3, 17, 45.9), (10**4, 36, 105.2), (10**5, 86, 238.9), (10**6, 191, 538.9)],
)
def test_the_table_of_bounds(horizon, interval, bound):
    plan = recompute_max(horizon, RHO, 0.05, midpoint=False)
    assert plan.interval == interval
    assert plan.bound(0.05) == pytest.approx(bound, abs=0.06)
    k = -(-horizon // interval)
    formula = interval + math.sqrt(2 * math.log(k / 0.05) * k / (2 * 0.5))
    assert plan.bound(0.05) == pytest.approx(formula, rel=ROUNDED)


def test_bounds_at_powers_of_two():
    found = [recompute_max(2**e, RHO, 0.05, midpoint=False).bound(0.05) for e in range(10, 21, 2)]
    assert [round(bound) for bound in found] == [46, 76, 126, 206, 336, 548]


def test_optima_in_closed_form():
    horizon, rho, epsilon, beta, d = 10**8, 0.3, 0.7, 0.05, 50
    plan = recompute_max(horizon, Budget(rho=rho), beta, midpoint=False)
    log = math.log(plan.releases / beta)
    best = (horizon * log / (4 * rho)) ** (1 / 3)
    assert plan.interval == pytest.approx(best, rel=0.1)
    assert plan.bound(beta) == pytest.approx(3 * best, rel=0.01)
    middle = recompute_max(horizon, Budget(rho=rho), beta)
    best = (horizon * math.log(middle.releases / beta) / rho) ** (1 / 3)
    assert middle.bound(beta) == pytest.approx(1.5 * best, rel=0.01)
    assert middle.bound(beta) / plan.bound(beta) == pytest.approx(0.79, abs=0.01)
    pure = recompute_max(horizon, Budget.pure(epsilon), beta, midpoint=False)
    best = math.sqrt(horizon * math.log(pure.releases / beta) / epsilon)
    assert pure.bound(beta) == pytest.approx(2 * best, rel=0.01)
    index = recompute_index(horizon, d, Budget(rho=rho), beta)
    log = math.log(d * index.releases / beta)
    best = (horizon * log**2 / (8 * rho)) ** (1 / 3)
    assert index.bound(beta) == pytest.approx(3 * best, rel=0.01)
    pure = recompute_index(horizon, d, Budget.pure(epsilon), beta)
    best = math.sqrt(horizon * 2 * math.log(d * pure.releases / beta) / epsilon)
    assert pure.bound(beta) == pytest.approx(2 * best, rel=0.01)


@pytest.mark.parametrize("budget", [Budget(0.01), RHO, Budget(30.0), Budget.pure(0.5)], ids=repr)
@pytest.mark.parametrize("horizon", [1, 2, 10, 77, 400])
def test_no_other_interval_is_better(budget, horizon):
    for build in (
        lambda **k: recompute_max(horizon, budget, 0.1, **k),
        lambda **k: recompute_max(horizon, budget, 0.1, midpoint=False, **k),
        lambda **k: recompute_index(horizon, 7, budget, 0.1, **k),
    ):
        best = min(build(interval=r).bound(0.1) for r in range(1, horizon + 1))
        # The search is around the best real interval: whole numbers of releases may favour others.
        assert build().bound(0.1) <= best * 1.03


@pytest.mark.parametrize("budget", [RHO, Budget(7.7), Budget.pure(0.3)], ids=repr)
def test_plans_spend_no_more_than_the_budget(budget):
    for horizon in (1, 50, 3000):
        plan = recompute_max(horizon, budget, 0.05)
        index = recompute_index(horizon, 9, budget, 0.05)
        epsilon = 2 * index.scale  # of one choice: exp(ε S / 2)
        sparse = sparse_max(horizon, horizon, budget, 0.05)
        # θ has half of ε₁ for a shift by 1; each comparison half of it for a shift by 2.
        one = 1 / sparse.threshold_scale + 2 / sparse.query_scale
        assert 1 / sparse.threshold_scale == pytest.approx(2 / sparse.query_scale, rel=ROUNDED)
        if budget.pure_epsilon is not None:
            limit = Fraction(budget.pure_epsilon)
            assert plan.releases / plan.scale <= limit
            assert index.releases * epsilon <= limit
            assert sparse.firings * (one + 1 / sparse.scale) <= limit
        else:
            limit = Fraction(budget.rho)
            assert plan.releases / (2 * plan.scale) <= limit
            assert index.releases * epsilon**2 / 8 <= limit
            assert index.releases * epsilon**2 / 8 > limit * Fraction(999, 1000)
            assert sparse.firings * (one**2 / 2 + 1 / (2 * sparse.scale)) <= limit


def test_a_removed_record_moves_scores_one_way():
    one = recompute_index(1000, 9, RHO, 0.05, interval=10)
    two = recompute_index(1000, 9, RHO, 0.05, interval=10, monotone=True)
    assert two.scale == 2 * one.scale
    one = sparse_max(1000, 100, RHO, 0.05)
    two = sparse_max(1000, 100, RHO, 0.05, monotone=True)
    assert two.query_scale * one.firings < one.query_scale * two.firings * Fraction(51, 100)


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_misses_rounded_up_hold_for_discrete_noise(kind, scale):
    x = np.arange(-3000, 3001)
    law = np.exp(-(x**2.0) / (2 * scale) if kind == "gaussian" else -np.abs(x) / scale)
    law /= law.sum()
    for miss in range(40):
        # What `miss` solves for: exp(-miss² / (2σ²)), or exp(-miss / b).
        allowed = math.exp(-(miss**2) / (2 * scale) if kind == "gaussian" else -miss / scale)
        assert law[np.abs(x) > miss].sum() <= allowed * (1 + 1e-12)

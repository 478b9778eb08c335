# SPDX-License-Identifier: Apache-2.0
"""Oracles of the conversions: published numbers, exact sums over discrete laws, inverses."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from rounded_scales import SLACK

from batchery.privacy import (
    Budget,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    gaussian_scale,
    zcdp_epsilon,
    zcdp_rho,
)


def test_the_numbers_of_the_literature():
    assert zcdp_epsilon(0.5, 1e-6) == pytest.approx(5.2215, abs=5e-5)
    folklore = 0.5 + 2 * math.sqrt(0.5 * math.log(1e6))
    assert folklore == pytest.approx(5.7565, abs=5e-5)
    assert gaussian_scale(1.0, 1e-5) == pytest.approx(3.73063, abs=5e-6)
    assert gaussian_scale(1.0, 1e-5, sensitivity=3.0) == pytest.approx(3 * 3.73063, abs=2e-5)


@pytest.mark.parametrize("rho", [1e-6, 1e-3, 0.05, 0.5, 4.0, 60.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-6, 0.01])
def test_the_best_order_is_found(rho, delta):
    def epsilon(order):
        gain = math.log(1 / (order * delta)) + (order - 1) * math.log1p(-1 / order)
        return rho * order + gain / (order - 1)

    dense = min(epsilon(1 + math.exp(x)) for x in np.linspace(-12, 20, 40_001))
    # The grid misses the best order by 4e-4 of it at most: the valley is flat there.
    assert zcdp_epsilon(rho, delta) == pytest.approx(max(0, dense), rel=1e-6, abs=1e-9)
    assert zcdp_epsilon(rho, delta) <= rho + 2 * math.sqrt(rho * math.log(1 / delta))


@pytest.mark.parametrize("sigma", [0.7, 2.0, 15.0])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_conversion_of_rho_covers_discrete_gaussian_noise(sigma, shift):
    x = np.arange(-400, 401)
    one = np.exp(-(x**2) / (2 * sigma**2))
    one /= one.sum()
    two = np.roll(one, shift)
    rho = shift**2 / (2 * sigma**2)
    for delta in (1e-8, 1e-4, 1e-2):
        epsilon = zcdp_epsilon(rho, delta)
        assert np.maximum(one - math.exp(epsilon) * two, 0).sum() <= delta


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 30.0])
def test_the_gaussian_line_agrees_with_many_digits(mu, epsilon):
    with mpmath.workdps(60):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        exact = mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)
    if exact < 1e-300:
        assert gaussian_delta(mu, epsilon) < 1e-290
    else:
        assert gaussian_delta(mu, epsilon) == pytest.approx(float(exact), rel=1e-9)


def test_far_tails_do_not_vanish():
    with mpmath.workdps(60):
        exact = mpmath.log(mpmath.ncdf(-37)), mpmath.log(mpmath.ncdf(-35.5))
    from batchery.privacy.accounting import _log_normal_cdf

    assert _log_normal_cdf(-37) == pytest.approx(float(exact[0]), rel=1e-12)
    assert _log_normal_cdf(-35.5) == pytest.approx(float(exact[1]), rel=1e-12)


@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.02])
@pytest.mark.parametrize("epsilon", [0.05, 1.0, 8.0])
def test_inverses_return_and_never_exceed(epsilon, delta):
    rho, mu = zcdp_rho(epsilon, delta), gaussian_mu(epsilon, delta)
    assert epsilon * (1 - SLACK) <= zcdp_epsilon(rho, delta) <= epsilon
    assert delta * (1 - SLACK) <= gaussian_delta(mu, epsilon) <= delta
    assert gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=SLACK)
    # The exact line allows more than the detour over ρ: that is what it is for.
    assert mu * mu / 2 > rho


def test_a_delta_that_covers_everything_needs_no_epsilon():
    assert gaussian_epsilon(0.01, 0.1) == 0.0
    assert zcdp_epsilon(0.0, 1e-9) == 0.0


def test_budgets_of_the_three_kinds():
    rho = Budget(rho=0.5)
    assert rho.epsilon(1e-6) == zcdp_epsilon(0.5, 1e-6)
    assert rho.epsilon() == math.inf
    approx = Budget.approx(epsilon=1.0, delta=1e-6)
    assert approx.rho == zcdp_rho(1.0, 1e-6)
    assert approx.epsilon(1e-6) == approx.epsilon(1e-3) == 1.0
    assert approx.epsilon(1e-9) == math.inf
    pure = Budget.pure(epsilon=1.0)
    assert pure.rho == 0.5
    assert pure.epsilon() == 1.0
    assert Budget.pure(0.01).epsilon(1e-6) <= 0.01
    assert pure.epsilon(0.9) < 1.0  # by way of ρ
    for budget in (rho, approx, pure, approx.for_gaussian()):
        assert eval(repr(budget)) == budget


def test_a_budget_may_be_less_than_its_target_allows():
    for rho in (0.0, zcdp_rho(1.0, 1e-6) / 2, zcdp_rho(1.0, 1e-6)):
        assert Budget(rho, target=(1.0, 1e-6)).epsilon(1e-6) == (1.0 if rho else 0.0)
    assert Budget.pure(1.0).share(0) == Budget(0.0, pure_epsilon=0.0)  # nothing was spent


def test_numbers_of_any_kind_make_the_budget_of_their_float():
    for third in (Fraction(1, 3), np.float32(1 / 3), np.float64(1 / 3)):
        assert Budget.pure(third) == Budget.pure(float(third))
        assert Budget.approx(third, np.float32(1e-6)) == Budget.approx(
            float(third), float(np.float32(1e-6))
        )


def test_one_gaussian_mechanism_spends_an_approximate_budget_exactly():
    budget = Budget.approx(1.0, 1e-5).for_gaussian()
    assert 1 / math.sqrt(2 * budget.rho) == pytest.approx(3.73063, abs=5e-6)
    assert budget.epsilon(1e-5) == pytest.approx(1.0, rel=SLACK)
    assert budget.epsilon(1e-8) > 1.0
    assert Budget(rho=0.5).for_gaussian().epsilon(1e-6) < zcdp_epsilon(0.5, 1e-6)


def test_shares_groups_and_users():
    assert Budget(rho=0.5).share(0.25) == Budget(rho=0.125)
    assert Budget.pure(1.0).share(0.25) == Budget.pure(0.25)
    assert Budget(rho=0.5).share(0).epsilon(1e-9) == 0
    assert Budget(rho=0.5).group(3) == Budget(rho=4.5)
    assert Budget.pure(0.5).group(3) == Budget.pure(1.5)
    for budget in (Budget(rho=0.5), Budget.pure(0.5), Budget(rho=2.0, gaussian=True)):
        assert budget.per_record(4).group(4) == budget
    user = Budget.approx(1.0, 1e-6).per_record(5).group(5)
    assert user.epsilon(1e-6) <= 1.0
    group = Budget.approx(0.5, 1e-6).group(3)
    assert group.target == pytest.approx(
        (1.5, 1e-6 * (math.exp(1.5) - 1) / (math.exp(0.5) - 1)), rel=1e-12
    )
    with pytest.raises(ValueError, match="size leaves no δ below 1, got 40"):
        Budget.approx(0.5, 1e-6).group(40)


@pytest.mark.parametrize("mu", [1e-8, 1e-6, 1e-4, 0.01])
@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 1e-7, 1e-6, 1e-4, 0.01])
def test_tiny_losses_are_rounded_to_the_private_side(mu, epsilon):
    with mpmath.workdps(60):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        exact = mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)
        if exact > 1e-290:
            found = gaussian_delta(mu, epsilon)
            assert exact <= found * (1 + 1e-12)
            assert found <= exact * (1 + 1e-3)  # 10⁻⁴ where δ is 10⁻³², far less where it matters


def test_mu_at_a_tiny_epsilon_is_private():
    for epsilon, delta in ((1e-6, 1e-9), (1e-6, 1e-6), (1e-6, 1e-5), (1e-3, 1e-6)):
        mu = gaussian_mu(epsilon, delta)
        with mpmath.workdps(60):
            m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
            exact = mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)
            assert exact <= mpmath.mpf(delta)


def test_group_privacy_holds_for_gaussian_noise():
    # k records move a Gaussian mechanism by at most k Δ.
    assert Budget(rho=0.5, gaussian=True).group(3).epsilon(1e-6) == pytest.approx(
        gaussian_epsilon(3.0, 1e-6), rel=1e-12
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(rho=-0.1), "Budget: rho must be >= 0, got -0.1"),
        (lambda: Budget(rho=math.inf), "Budget: rho must be finite, got inf"),
        (lambda: Budget(rho=math.nan), "Budget: rho must be >= 0, got nan"),
        (lambda: Budget(0.5, pure_epsilon=-1.0), "Budget: pure_epsilon must be >= 0, got -1.0"),
        (lambda: Budget(0.5, pure_epsilon=math.nan), "Budget: pure_epsilon must be >= 0, got nan"),
        (lambda: Budget(0.5, pure_epsilon=math.inf), "rho must be ε²/2 = inf, got 0.5"),
        (lambda: Budget(1e-9, pure_epsilon=5.0), "Budget: rho must be ε²/2 = 12.5, got 1e-09"),
        (lambda: Budget(13.0, pure_epsilon=5.0), "Budget: rho must be ε²/2 = 12.5, got 13.0"),
        (lambda: Budget(0.5, target=(0.001, 1e-9)), "Budget: rho must be within .*, got 0.5"),
        (
            lambda: Budget(zcdp_rho(1.0, 1e-6) * (1 + 1e-10), target=(1.0, 1e-6)),
            "Budget: rho must be within .*, its",
        ),
        (lambda: Budget(0.0, target=(-1.0, 1e-9)), "Budget: target must be > 0, got -1.0"),
        (lambda: Budget(0.0, target=(math.nan, 0.1)), "Budget: target must be > 0, got nan"),
        (lambda: Budget(0.0, target=(1.0, 1.0)), "target must be > 0 and < 1, got 1.0"),
        (lambda: Budget(0.5, 1.0, (9.0, 0.1)), "target must not be given with pure_epsilon, got"),
        (lambda: Budget(0.5, 1.0, gaussian=True), "gaussian must be False with pure_epsilon or"),
        (
            lambda: Budget(0.01, target=(1.0, 1e-6), gaussian=True),
            "gaussian must be False with pure_epsilon or target, got True",
        ),
        (lambda: Budget.pure(1.0).for_gaussian(), "gaussian must be False with pure_epsilon or"),
        (lambda: Budget.pure(0), "Budget.pure: epsilon must be > 0, got 0"),
        (lambda: Budget.approx(1.0, 0.0), "delta must be > 0 and < 1, got 0.0"),
        (lambda: Budget.approx(-1.0, 0.1), "epsilon must be > 0, got -1.0"),
        (
            lambda: Budget.approx(1e-12, 1e-30),
            "zcdp_rho: epsilon must be within reach of a ρ with delta=1e-30, got 1e-12",
        ),
        (lambda: Budget(rho=1.0).group(0), "size must be >= 1, got 0"),
        (lambda: zcdp_epsilon(-1.0, 0.1), "rho must be >= 0"),
        (lambda: gaussian_scale(1.0, 0.1, 0.0), "sensitivity must be > 0, got 0.0"),
        (lambda: gaussian_scale(1.0, 0.1, math.inf), "sensitivity must be finite, got inf"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

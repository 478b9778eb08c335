# SPDX-License-Identifier: Apache-2.0
"""Oracles of the data-model law: planted parameters, and the optimum by brute force."""

import sys

import numpy as np
import pytest
import torch

from batchery.optim.wind_tunnel import ScalingLaw, fit_scaling_law

CHINCHILLA = ScalingLaw(C_N=406.4, alpha=0.34, C_D=410.7, beta=0.28, L0=1.69)
LAWS = [
    CHINCHILLA,
    ScalingLaw(C_N=60.0, alpha=0.29, C_D=150.0, beta=0.23, L0=0.25),
    ScalingLaw(C_N=5000.0, alpha=0.5, C_D=30.0, beta=0.15, L0=0.8),
]
NAMES = ["C_N", "alpha", "C_D", "beta", "L0"]


def grid(sizes=(5e6, 1e7, 2e7, 4e7, 8e7), tokens=(1e8, 2e8, 4e8, 8e8, 1.6e9, 3.2e9)):
    return [array.ravel() for array in np.meshgrid(sizes, tokens)]


def noisy(law, seed, scale=0.01):
    size, data = grid()
    noise = np.random.default_rng(seed).standard_normal(len(size))
    return size, data, law.predict(size, data) * np.exp(scale * noise)


@pytest.mark.parametrize("loss", ["huber", "lsq"])
@pytest.mark.parametrize("law", LAWS)
def test_planted_parameters_are_recovered(law, loss):
    size, data = grid()
    found = fit_scaling_law(size, data, law.predict(size, data), loss=loss)
    for name in NAMES:
        assert found.params[name] == pytest.approx(law.params[name], rel=1e-8)


def test_intervals_hold_the_planted_parameters_under_noise():
    # 8 data sets, 7 numbers each: at 95 % a mean of 53 of 56 inside, but the 7 go together
    def numbers(law):
        return [*law.params.values(), np.log(law.optimal(1e21).N), law.predict(1e9, 2e10)]

    inside = []
    for seed in range(8):
        law = fit_scaling_law(*noisy(CHINCHILLA, seed), loss="lsq", bootstrap=60)
        for k, truth in enumerate(numbers(CHINCHILLA)):
            low, high = law.interval(lambda draw, k=k: numbers(draw)[k])
            inside.append(low <= truth <= high)
            assert high > low
    assert np.mean(inside) > 0.85


def test_the_robust_fit_finds_planted_parameters_under_noise():
    law = fit_scaling_law(*noisy(CHINCHILLA, 0), bootstrap=60)
    for name, (low, high) in law.ci.items():
        assert low <= CHINCHILLA.params[name] <= high
        assert low < law.params[name] < high


@pytest.mark.filterwarnings("ignore:fit_scaling_law")
def test_a_failed_run_hardly_moves_the_robust_fit():
    size, data = grid()
    loss = CHINCHILLA.predict(size, data)
    loss[7] *= 1.5
    robust = fit_scaling_law(size, data, loss)
    squares = fit_scaling_law(size, data, loss, loss="lsq")
    # the failed run still pulls like one that is off by δ = 1e-3
    assert robust.alpha == pytest.approx(CHINCHILLA.alpha, rel=5e-3)
    assert squares.alpha != pytest.approx(CHINCHILLA.alpha, rel=0.1)


def test_the_fit_is_stationary_for_the_robust_objective():
    size, data, loss = noisy(CHINCHILLA, 3)
    law = fit_scaling_law(size, data, loss)

    def objective(**changed):
        predicted = ScalingLaw(**(law.params | changed)).predict(size, data)
        r = np.abs(np.log(predicted) - np.log(loss))
        return np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum()

    for name, value in law.params.items():
        for factor in (1 - 1e-4, 1 + 1e-4):
            assert objective(**{name: value * factor}) > objective()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("budget", [1e18, 1e21, 6.2e24])
def test_the_optimum_spends_the_budget_and_no_neighbour_is_better(law, budget):
    best = law.optimal(budget)
    assert 6 * best.N * best.D == pytest.approx(budget, rel=1e-15)
    assert best.loss == law.predict(best.N, best.D)
    assert law.ratio(budget) == pytest.approx(best.D / best.N, rel=1e-15)

    def excess(shift):  # of the loss along the budget, by log N
        size = best.N * np.exp(shift)
        return law.predict(size, budget / 6 / size) - best.loss

    slope = (excess(1e-4) - excess(-1e-4)) / 2e-4
    bend = (excess(1e-2) + excess(-1e-2)) / 1e-4
    assert bend > 0
    assert abs(slope) < 1e-6 * bend  # central difference: error of order 1e-8
    steps = np.linspace(-3, 3, 601)
    assert np.argmin(excess(steps)) == 300


def test_the_share_of_the_data_follows_the_exponents():
    even = ScalingLaw(C_N=100.0, alpha=0.3, C_D=200.0, beta=0.3, L0=1.0)
    assert even.ratio(1e24) == pytest.approx(even.ratio(1e18), rel=1e-12)
    # D/N = (1/G²) (C/6)^((α-β)/(α+β))
    power = (0.34 - 0.28) / 0.62
    assert CHINCHILLA.ratio(6e24) / CHINCHILLA.ratio(6e18) == pytest.approx(1e6**power)


def test_predict_spans_arrays_and_gives_floats_for_numbers():
    table = CHINCHILLA.predict(np.array([[1e8], [1e9]]), np.array([1e9, 1e10, 1e11]))
    assert table.shape == (2, 3)
    assert isinstance(CHINCHILLA.predict(1e8, 1e9), float)
    assert table[0, 0] == CHINCHILLA.predict(1e8, 1e9)
    tensor = torch.tensor([1e8, 1e9], dtype=torch.float64)
    np.testing.assert_array_equal(CHINCHILLA.predict(tensor, 1e9), table[:, 0])


def test_the_seed_decides_the_draws_and_nothing_else():
    data = noisy(CHINCHILLA, 1)
    kinds = {"loss": "lsq", "bootstrap": 5}
    before = torch.get_rng_state()
    one = fit_scaling_law(*data, **kinds, generator=torch.Generator().manual_seed(1))
    same = fit_scaling_law(*data, **kinds, generator=torch.Generator().manual_seed(1))
    other = fit_scaling_law(*data, **kinds, generator=torch.Generator().manual_seed(2))
    assert one.draws == same.draws != other.draws
    assert len(one.draws) == 5
    assert torch.equal(before, torch.get_rng_state())


def test_given_starts_are_used():
    size, data = grid()
    loss = CHINCHILLA.predict(size, data)
    near = [tuple(1.1 * value for value in CHINCHILLA.params.values())]
    found = fit_scaling_law(size, data, loss, starts=near)
    assert found.alpha == pytest.approx(0.34, rel=1e-6)
    with pytest.raises(ValueError, match="starts must hold five numbers each"):
        fit_scaling_law(size, data, loss, starts=[(1.0, 2.0)])


def test_a_loss_that_rises_with_data_is_a_warning():
    size, data = grid()
    loss = CHINCHILLA.predict(size, data)
    loss[-1] = loss[-6] * 1.01  # the largest model, on twice the tokens
    with pytest.warns(UserWarning, match=r"in \d+ of \d+ pairs .* N=8e\+07, D=3.2e\+09"):
        fit_scaling_law(size, data, loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d, x: (n[:5], d[:5], x[:5]), "L must hold 6 runs or more, got 5"),
        (lambda n, d, x: (n[:-1], d, x), "shapes must agree"),
        (lambda n, d, x: (n.reshape(5, 6), d.reshape(5, 6), x.reshape(5, 6)), "shapes must agree"),
        (lambda n, d, x: (n, d - 1e8, x), "D must be positive"),
        (lambda n, d, x: (n, d, x * np.nan), "L must be positive"),
        (lambda n, d, x: (n * 0 + 1e7, d, x), "N must hold 3 different values or more, got 1"),
    ],
)
def test_data_that_cannot_be_fitted_are_named(change, message):
    size, data = grid()
    loss = CHINCHILLA.predict(size, data)
    with pytest.raises(ValueError, match=f"fit_scaling_law: {message}"):
        fit_scaling_law(*change(size, data, loss))


def test_bad_arguments_are_named():
    size, data = grid()
    loss = CHINCHILLA.predict(size, data)
    with pytest.raises(TypeError, match="fit_scaling_law: N must be numbers, got 'abc'"):
        fit_scaling_law("abc", data, loss)
    with pytest.raises(TypeError, match="fit_scaling_law: starts must be numbers"):
        fit_scaling_law(size, data, loss, starts=[[1.0, 2.0], [3.0]])
    with pytest.raises(TypeError, match="ScalingLaw: N must be numbers, got 'abc'"):
        CHINCHILLA.predict("abc", data)
    with pytest.raises(ValueError, match="loss must be one of 'huber', 'lsq', got 'l1'"):
        fit_scaling_law(size, data, loss, loss="l1")
    with pytest.raises(ValueError, match="bootstrap must be >= 0, got -1"):
        fit_scaling_law(size, data, loss, bootstrap=-1)
    with pytest.raises(ValueError, match="ScalingLaw: C must be > 0, got -1"):
        CHINCHILLA.optimal(-1)
    with pytest.raises(ValueError, match="ScalingLaw: draws must come from a bootstrap"):
        _ = CHINCHILLA.ci
    with pytest.raises(ValueError, match="ScalingLaw: alpha must be > 0, got 0"):
        ScalingLaw(1.0, 0.0, 1.0, 0.3, 1.0)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    size, data = grid()
    with pytest.raises(ImportError, match=r"fit_scaling_law needs .*batchery\[laws\]"):
        fit_scaling_law(size, data, CHINCHILLA.predict(size, data))

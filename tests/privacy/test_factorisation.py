# SPDX-License-Identifier: Apache-2.0
"""Oracles of the factorisations: matrices read off by impulses, published factors, coupled runs."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from recorded_noise import Given, Recording, Replay, Zero
from rounded_scales import ROUNDED

from batchery.privacy import Budget, FactorizationCounter, FloatNoise, TreeCounter, noise_stream
from batchery.privacy.toeplitz import (
    Banded,
    SquareRoot,
    fit_buffers,
    recovery_coefficients,
    sqrt_coefficients,
    squared_sensitivity,
)

RHO = Budget(rho=0.5)
STRATEGIES = [
    {"strategy": "sqrt"},
    {"strategy": "banded", "bands": 1},
    {"strategy": "banded", "bands": 5},
    {"strategy": "blt"},
    {"strategy": "blt", "buffers": 2},
]
each = pytest.mark.parametrize("kinds", STRATEGIES, ids=str)


def matrix(column):
    n = len(column)
    lags = np.subtract.outer(np.arange(n), np.arange(n))
    return np.where(lags >= 0, column[np.maximum(lags, 0)], 0.0)


def impulses(horizon, **kinds):
    """B: what every release makes of the noise of every step, in units of one noise."""
    counter = FactorizationCounter(
        horizon, horizon, budget=RHO, noise=Given(np.eye(horizon)), **kinds
    )
    return counter.update_many(torch.zeros(horizon, horizon)).numpy()


def strategy_of(horizon, **kinds):
    return FactorizationCounter(horizon, budget=RHO, **kinds).design.strategy


def test_coefficients_of_the_square_root():
    f = sqrt_coefficients(60)
    assert f == pytest.approx([math.comb(2 * k, k) / 4**k for k in range(60)], rel=1e-13)
    np.testing.assert_allclose(matrix(f) @ matrix(f), np.tri(60), rtol=0, atol=1e-12)


@pytest.mark.parametrize("horizon", [64, 1024, 65536])
def test_the_norm_of_the_square_root_is_the_logarithm(horizon):
    norm = float((sqrt_coefficients(horizon) ** 2).sum())
    wanted = (np.euler_gamma + 4 * math.log(2) + math.log(horizon)) / math.pi
    assert norm == pytest.approx(wanted - 1 / (4 * math.pi * horizon), abs=0.1 / horizon**2)


@each
@pytest.mark.parametrize("horizon", [1, 2, 3, 8, 63, 70, 150, 260, 1024])
def test_sums_are_the_product_of_the_factors(kinds, horizon):
    strategy = strategy_of(horizon, **kinds)
    b, c = impulses(horizon, **kinds), matrix(strategy.column(horizon))
    np.testing.assert_allclose(b @ c, np.tri(horizon), rtol=0, atol=1e-12)
    np.testing.assert_allclose(b, matrix(strategy.recovery(horizon)), rtol=0, atol=1e-12)
    counter = FactorizationCounter(horizon, budget=RHO, **kinds)
    # σ² = (largest column of C)² Δ² / (2ρ), and the variances are those of B.
    assert float(counter.design.scale) == pytest.approx((c**2).sum(0).max(), rel=ROUNDED)
    variances = float(counter.design.scale) * (b**2).sum(1)
    told = [counter.variance(t) for t in range(1, horizon + 1)]
    np.testing.assert_allclose(told, variances, rtol=1e-10)
    assert counter.design.worst(horizon) == pytest.approx(variances.max(), rel=1e-10)
    assert counter.expected_squared_error() == pytest.approx(variances.mean(), rel=1e-10)


@pytest.mark.parametrize(
    ("horizon", "worst", "mean"),
    [(64, 5.707, 4.971), (1024, 10.710, 9.671), (4096, 13.793, 12.612), (65536, 21.127, 19.664)],
)
def test_the_table_of_variances(horizon, worst, mean):
    counter = FactorizationCounter(horizon, budget=RHO, strategy="sqrt")
    assert counter.design.worst(horizon) == pytest.approx(worst, abs=6e-4)
    assert counter.expected_squared_error() == pytest.approx(mean, abs=6e-4)
    tree = TreeCounter(horizon, budget=RHO)
    if horizon == 1024:
        assert tree.expected_squared_error() / counter.expected_squared_error() > 5.6
        assert tree.design.worst(horizon) / counter.design.worst(horizon) > 10.2


@pytest.mark.parametrize(
    ("horizon", "loss"), [(16, 1.0001), (64, 1.0001), (1024, 1.001), (65536, 1.01), (10**6, 1.04)]
)
def test_four_buffers_come_close_to_the_square_root(horizon, loss):
    root = float((sqrt_coefficients(horizon) ** 2).sum()) ** 2
    fitted = fit_buffers(horizon, 4)
    column = fitted.column(horizon)
    worst = float((column**2).sum()) * float((fitted.recovery(horizon) ** 2).sum())
    assert root * (1 - 1e-6) < worst < root * loss
    assert np.all(np.diff(column) <= 0)


def test_buffers_are_fitted_where_gradients_are_off():
    with torch.inference_mode():
        assert fit_buffers.__wrapped__(100, 3) == fit_buffers(100, 3)


def test_an_epoch_that_does_not_fit_is_refused_before_it_begins():
    counter = FactorizationCounter(None, strategy="sqrt", budget=RHO, memory_budget=2 * 8 * 64)
    counter.update_many([0.0] * 126)
    before = repr(counter.state_dict())
    for rows in ([0.0] * 2, [0.0] * 400):
        with pytest.raises(ValueError, match="strategy must be 'blt' within memory_budget"):
            counter.update_many(rows)
        assert repr(counter.state_dict()) == before
    counter.update(0.0)
    with pytest.raises(ValueError, match="strategy must be 'blt' within memory_budget"):
        counter.update(0.0)
    assert counter.t == 127


@pytest.mark.parametrize("bands", [1, 2, 7, 100])
def test_recovery_by_newton_is_that_by_recursion(bands):
    column, n = sqrt_coefficients(bands), 300
    y = np.zeros(n)
    for t in range(n):
        lags = range(1, min(t, bands - 1) + 1)
        y[t] = (t == 0) - sum(column[k] * y[t - k] for k in lags)
    np.testing.assert_allclose(recovery_coefficients(column, n), np.cumsum(y), rtol=1e-12)


@pytest.mark.parametrize("column", [sqrt_coefficients(9), Banded(3).column(9)], ids=["sqrt", "3"])
@pytest.mark.parametrize(("participations", "separation"), [(1, 1), (2, 1), (2, 3), (3, 3), (4, 2)])
def test_sensitivity_is_the_worst_of_all_patterns_and_directions(
    column, participations, separation
):
    c = matrix(column)
    worst = 0.0
    for count in range(1, participations + 1):
        for steps in itertools.combinations(range(9), count):
            if all(b - a >= separation for a, b in itertools.pairwise(steps)):
                # Entries are not negative: rows that all point one way are the worst.
                worst = max(worst, float((c[:, steps].sum(1) ** 2).sum()))
    found = squared_sensitivity(column, participations, separation)
    assert found == pytest.approx(worst, rel=1e-12)
    if separation >= 3 and column[3] == 0:  # bands no wider than the separation
        assert found == pytest.approx(participations * float(column @ column), rel=1e-12)


def test_a_column_that_rises_takes_the_triangle_inequality():
    column = np.array([1.0, 2.0, 0.5])
    assert squared_sensitivity(column, 3, 1) == 9 * float(column @ column)
    assert squared_sensitivity(column) == float(column @ column)


def test_more_participations_make_more_noise():
    kinds = {"budget": RHO, "strategy": "banded", "min_separation": 16}
    once = FactorizationCounter(64, **kinds)
    thrice = FactorizationCounter(64, max_participations=3, **kinds)
    assert once.bands == 16
    assert float(thrice.design.scale) == pytest.approx(3 * float(once.design.scale), rel=ROUNDED)


def test_auto_takes_the_root_while_its_noise_fits():
    assert strategy_of(1000, strategy="auto") == SquareRoot()
    assert strategy_of(1000, strategy="auto", memory_budget=15_999) == fit_buffers(1000, 4)
    assert FactorizationCounter(1000, budget=RHO).plan["mechanism"] == "sqrt"
    assert FactorizationCounter(1000, budget=RHO, strategy="banded").plan["mechanism"] == "banded"
    endless = FactorizationCounter(None, budget=RHO, memory_budget=1000)
    chosen = [endless.plan["mechanism"]]
    endless.update_many(torch.zeros(100))
    chosen.append(endless.plan["mechanism"])
    assert chosen == ["sqrt", "blt"]
    with pytest.raises(ValueError, match="strategy must be 'blt' within .* noise of 0.0 GB .*sqrt"):
        strategy_of(1000, strategy="sqrt", memory_budget=15_999)
    with pytest.raises(ValueError, match="noise of 160.0 GB does not fit"):
        FactorizationCounter(10**6, 10**4, budget=RHO, strategy="sqrt")


@each
@pytest.mark.parametrize("horizon", [1, 5, 64, 200, None])
def test_many_at_once_are_single_steps(kinds, horizon):
    n = horizon or 150
    rows = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def build():
        noise = FloatNoise(torch.Generator().manual_seed(1))
        return FactorizationCounter(horizon, 3, budget=RHO, noise=noise, **kinds)

    single, many = build(), build()
    wanted = torch.stack([single.update(row) for row in rows])
    found = torch.cat([many.update_many(part) for part in rows.split(47)])
    # Not to the last bit: a product with one row and with many may add in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(many.last(), found[-1], rtol=0, atol=0)


@each
@pytest.mark.parametrize("horizon", [130, None])
@pytest.mark.parametrize("at", [1, 63, 64, 100, 128])
def test_resumes_bit_for_bit(kinds, horizon, at):
    rows = torch.randn(130, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def build(seed=1):
        noise = FloatNoise(torch.Generator().manual_seed(seed))
        return FactorizationCounter(horizon, 2, budget=RHO, noise=noise, **kinds)

    whole = build()
    whole.update_many(rows[:at])
    before = whole.last()
    buffer = io.BytesIO()
    torch.save(whole.state_dict(), buffer)
    wanted = whole.update_many(rows[at:])
    buffer.seek(0)
    again = build(seed=2)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(again.last(), before)
    assert torch.equal(again.update_many(rows[at:]), wanted)


@each
@pytest.mark.parametrize("horizon", [1, 2, 7, 33, 64, 70])
def test_coupled_runs_on_neighbours_are_the_same_and_cost_what_was_declared(kinds, horizon):
    check_coupling(kinds, horizon, int(np.random.default_rng(horizon).integers(0, horizon)))


@each
@pytest.mark.parametrize("horizon", range(1, 21))
def test_coupled_runs_agree_whichever_row_is_the_other(kinds, horizon):
    for at in range(horizon):
        check_coupling(kinds, horizon, at)


def check_coupling(kinds, horizon, at):
    """As for the tree: noise shifted by C(x - x') makes the other's releases the same."""
    coins = np.random.default_rng((horizon, at))
    pair = coins.integers(0, 2, 2).astype(float)

    def run(noise, b):
        counter = FactorizationCounter(horizon, budget=RHO, noise=noise, **kinds)
        rng, releases = np.random.default_rng(horizon), []
        for t in range(horizon):
            # Rounded, so that the adversary's choice does not hang on the last bits.
            seen = int(np.round(sum(releases), 6) * 1e3) if releases else 0
            row = float((rng.integers(0, 2) + seen) % 2)
            releases.append(float(counter.update(pair[b] if t == at else row)))
        return releases

    recording = Recording(FloatNoise(torch.Generator().manual_seed(horizon)))
    first = run(recording, 0)
    column = strategy_of(horizon, **kinds).column(horizon)
    shift = np.zeros(horizon)
    shift[at:] = column[: horizon - at] * (pair[0] - pair[1])
    second = run(Replay(recording.drawn, dict(enumerate(shift))), 1)
    np.testing.assert_allclose(second, first, rtol=0, atol=1e-9)
    scale = float(recording.drawn[0][1])
    assert (shift**2).sum() / (2 * scale) <= RHO.rho


def test_the_mean_squared_error_is_a_fifth_of_the_trees():
    horizon, copies = 1024, 300
    zeros = torch.zeros(horizon, copies)
    errors = []
    for build in (TreeCounter, FactorizationCounter):
        noise = FloatNoise(torch.Generator().manual_seed(3))
        counter = build(horizon, copies, budget=RHO, sampler="float", noise=noise)
        errors.append(counter.update_many(zeros).square().mean().item())
        assert errors[-1] == pytest.approx(counter.expected_squared_error(), rel=0.05)
    assert errors[0] / errors[1] > 5.3  # 5.69 but for the draw


def test_without_noise_sums_are_exact():
    rows = torch.randint(0, 9, (200, 4), generator=torch.Generator().manual_seed(0))
    for horizon in (200, None):
        counter = FactorizationCounter(horizon, 4, budget=RHO, noise=Zero())
        assert torch.equal(counter.update_many(rows).long(), rows.cumsum(0))


def test_what_was_spent():
    counter = FactorizationCounter(64, budget=RHO, strategy="banded", bands=4)
    counter.update(1.0)
    norms = (Banded(4).column(64) ** 2).cumsum()
    assert counter.spent.rho == pytest.approx(0.5 / norms[-1])
    counter.update_many(torch.ones(3))
    assert counter.spent.rho == pytest.approx(0.5)
    assert counter.spent.gaussian


def test_bounds_in_closed_form_and_in_simulation():
    counter = FactorizationCounter(500, 200, budget=RHO, strategy="blt")
    wanted = math.sqrt(counter.design.worst(500) * 2 * math.log(2 * 500 * 200 / 0.05))
    assert counter.error_bound(0.05) == pytest.approx(wanted, rel=1e-12)
    noise = counter.update_many(torch.zeros(500, 200))
    assert 0.5 * wanted < noise.abs().max() < wanted * 1.2  # unseeded: fails once in 10⁴


@each
def test_the_stream_of_noise_adds_up_to_what_the_counter_releases(kinds):
    def build():
        noise = FloatNoise(torch.Generator().manual_seed(1))
        return FactorizationCounter(40, (2, 3), budget=RHO, noise=noise, **kinds)

    steps = torch.stack(list(noise_stream(build())))
    assert steps.shape == (40, 2, 3)
    sums = build().update_many(torch.zeros(40, 2, 3))
    torch.testing.assert_close(steps.cumsum(0), sums, rtol=1e-10, atol=1e-10)
    # Correlated so that much of it cancels: independent noise adds up to more.
    used = build()
    used.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="counter must be new"):
        noise_stream(used)
    with pytest.raises(ValueError, match="counter must have a horizon"):
        noise_stream(FactorizationCounter(None, budget=RHO))


def test_only_a_counter_has_a_stream_of_noise():
    for given in (3, None, "counter"):
        with pytest.raises(TypeError, match="noise_stream: counter must be a counter, got"):
            noise_stream(given)


@each
def test_weights_trained_with_the_stream_of_noise_are_the_releases_of_the_counter(kinds):
    """Plain SGD on clipped gradients with this noise: its weights tell what the counter would."""
    steps, lr = 40, 0.1

    def build():
        noise = FloatNoise(torch.Generator().manual_seed(1))
        return FactorizationCounter(steps, 3, budget=RHO, noise=noise, **kinds)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, 5, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(steps, 5, dtype=torch.float64, generator=generator)
    weights = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([weights], lr=lr)
    rows, trained = [], []
    for batch, target, noise in zip(x, y, noise_stream(build()), strict=True):
        records = []
        for features, wanted in zip(batch, target, strict=True):
            loss = (features @ weights - wanted) ** 2 / 2
            gradient = torch.autograd.grad(loss, weights)[0]
            records.append(gradient / gradient.norm().clamp(min=1.0))  # of norm 1 at most
        rows.append(torch.stack(records).sum(0))
        weights.grad = rows[-1] + noise
        optimizer.step()
        trained.append((1 - weights.detach()) / lr)
    releases = build().update_many(torch.stack(rows))
    torch.testing.assert_close(torch.stack(trained), releases, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each
def test_dtype_is_followed(kinds, dtype):
    noise = FloatNoise(torch.Generator().manual_seed(1), dtype=dtype)
    counter = FactorizationCounter(100, 2, budget=RHO, noise=noise, dtype=dtype, **kinds)
    found = counter.update_many(torch.zeros(100, 2, dtype=dtype))
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    noise = FloatNoise(torch.Generator().manual_seed(1), dtype=dtype)
    z = noise.sample("gaussian", counter.design.scale, (8192, 2))[:100].double().numpy()
    b = matrix(counter.design.strategy.recovery(100))
    np.testing.assert_allclose(found.double().numpy(), b @ z, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"sampler": "discrete"}, "sampler must be 'float': real coefficients leave the lattice"),
        ({"budget": Budget.pure(1.0)}, "budget must not be pure: Laplace noise is not safe"),
        ({"strategy": "x"}, "strategy must be one of"),
        ({"bands": 0}, "bands must be >= 1, got 0"),
        ({"buffers": 0}, "buffers must be >= 1, got 0"),
        ({"max_participations": 2}, "min_separation must be given with max_participations > 1"),
        (
            {"max_participations": 2, "min_separation": 3, "horizon": None},
            "horizon must be given with max_participations > 1",
        ),
    ],
)
def test_bad_arguments_are_named(kinds, message):
    with pytest.raises(ValueError, match="FactorizationCounter: " + message):
        FactorizationCounter(**({"horizon": 8, "budget": RHO} | kinds))

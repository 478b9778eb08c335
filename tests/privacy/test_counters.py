# SPDX-License-Identifier: Apache-2.0
"""Oracles of the counters: exact sums, matrices read off by impulses, coupled runs, bounds."""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from recorded_noise import Given, Recording, Replay, Zero
from rounded_scales import ROUNDED, SLACK

from batchery.privacy import (
    Budget,
    DiscreteNoise,
    FactorizationCounter,
    FloatNoise,
    TreeCounter,
    gaussian_scale,
)
from batchery.privacy.mechanism import calibrate, exact, tail
from batchery.privacy.tree import levels, tree_mean, tree_variance, tree_worst

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)
HORIZONS = [*range(1, 71), None]


def bits(n, *shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (n, *shape)))


def seeded(horizon, shape=(), **kinds):
    return TreeCounter(
        horizon,
        shape,
        budget=RHO,
        noise=kinds.pop("noise", DiscreteNoise(insecure_seed=1)),
        **kinds,
    )


def impulses(horizon, estimator="prefix", nodes=None):
    """B: what every release makes of the noise of every node, in units of one noise."""
    nodes = horizon if nodes is None else nodes
    noise = Given(np.eye(nodes, dtype=np.int64))
    counter = TreeCounter(horizon, nodes, budget=RHO, estimator=estimator, noise=noise)
    zeros = torch.zeros(horizon, nodes, dtype=torch.int64)
    return counter.update_many(zeros).double().numpy()


def fenwick_nodes(horizon):
    """C: which rows every node covers."""
    t, s = np.arange(1, horizon + 1)[:, None], np.arange(1, horizon + 1)
    return ((s <= t) & (s > t - (t & -t))).astype(float)


def all_nodes(horizon):
    """C of the tree with right children, in the order in which nodes are completed."""
    found = []
    for t in range(1, horizon + 1):
        size = 1
        while t % size == 0:
            found.append([t - size < s <= t for s in range(1, horizon + 1)])
            size *= 2
    return np.array(found, float)


@pytest.mark.parametrize("estimator", ["prefix", "honaker"])
@pytest.mark.parametrize("horizon", [1, 2, 63, 64, 100, None])
def test_without_noise_sums_are_exact_integers(horizon, estimator):
    rows = bits(horizon or 100, 3) * 5 - 1
    counter = TreeCounter(horizon, 3, budget=RHO, estimator=estimator, noise=Zero())
    assert torch.equal(counter.update_many(rows).long(), rows.cumsum(0))


def test_prefix_noise_of_eight_steps_written_out():
    z = [1 << t for t in range(9)]  # of node t; sums tell which nodes are in them
    counter = TreeCounter(8, budget=RHO, noise=Given(z[1:]))
    found = [int(counter.update(0)) for _ in range(8)]
    assert found == [
        z[1],
        z[2],
        z[3] + z[2],
        z[4],
        z[5] + z[4],
        z[6] + z[4],
        z[7] + z[6] + z[4],
        z[8],
    ]


@pytest.mark.parametrize("horizon", [*range(1, 71), 1024])
def test_sums_are_a_product_of_what_is_noised_and_what_is_made_of_it(horizon):
    a = np.tri(horizon)
    b, c = impulses(horizon), fenwick_nodes(horizon)
    assert np.array_equal(b @ c, a)
    assert (c**2).sum(0).max() <= levels(horizon)
    assert np.array_equal(np.diag(b @ b.T), [t.bit_count() for t in range(1, horizon + 1)])
    c = all_nodes(horizon)
    b = impulses(horizon, "honaker", len(c))
    np.testing.assert_allclose(b @ c, a, rtol=0, atol=1e-12)
    assert (c**2).sum(0).max() == levels(horizon)  # no row is in more
    wanted = [tree_variance(t, "honaker") for t in range(1, horizon + 1)]
    np.testing.assert_allclose(np.diag(b @ b.T), wanted, rtol=1e-12)
    # Averaging with children never loses, and wins once there are any.
    assert all(v <= t.bit_count() for t, v in enumerate(wanted, 1))


TABLE = {  # worst and mean variance for one bit at ρ = 1/2
    ("prefix", 64): (42, 21.11),
    ("prefix", 1024): (110, 55.01),
    ("prefix", 4096): (156, 78.00),
    ("prefix", 65536): (272, 136.0),
    ("honaker", 64): (26.57, 13.34),
    ("honaker", 1024): (63.83, 31.92),
    ("honaker", 4096): (88.44, 44.22),
    ("honaker", 65536): (149.66, 74.83),
}


@pytest.mark.parametrize(("estimator", "horizon"), TABLE)
def test_the_table_of_variances(estimator, horizon):
    counter = TreeCounter(horizon, budget=RHO, estimator=estimator)
    worst, mean = TABLE[estimator, horizon]
    assert counter.design.worst(horizon) == pytest.approx(worst, abs=0.006)
    assert counter.expected_squared_error() == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize("estimator", ["prefix", "honaker"])
def test_formulas_of_worst_and_mean_are_those_of_all_steps(estimator):
    variances = [tree_variance(t, estimator) for t in range(1, 300)]
    for horizon in range(1, 300):
        assert tree_worst(horizon, estimator) == pytest.approx(max(variances[:horizon]), rel=1e-12)
        mean = sum(variances[:horizon]) / horizon
        assert tree_mean(horizon, estimator) == pytest.approx(mean, rel=1e-12)


def test_the_worst_and_mean_without_a_horizon_are_those_of_all_steps():
    counter = TreeCounter(None, budget=RHO)
    variances = [counter.variance(t) for t in range(1, 80)]
    # Half of ρ on the tree of the epoch, half on the totals: each of variance 1/ρ = 2.
    assert variances[:4] == [2.0, 2 + 4, 2 + 4, 4 + 6]
    for t in range(1, 80):
        assert counter.design.worst(t) == pytest.approx(max(variances[:t]), rel=1e-12)
        assert counter.design.mean(t) == pytest.approx(sum(variances[:t]) / t, rel=1e-12)


def test_the_bound_without_a_horizon_covers_the_largest_laplace_noise():
    counter = TreeCounter(None, budget=Budget.pure(1.0))
    counter.update_many([0] * 200)  # in the epoch of 128 rows, whose tree has 8 levels
    totals, nodes = 7 * [2.0], 7 * [2.0 * 8]  # b of all noise in release 127 + 127
    for beta in (0.5, 1e-3, 1e-30):
        log = math.log(2 * 255 / (beta * 6 / (math.pi * 8) ** 2))
        chernoff = [
            (log - sum(math.log1p(-((b * s) ** 2)) for b in totals + nodes)) / s
            for s in np.linspace(0, 1 / 16, 2000)[1:-1]
        ]
        assert counter.error_bound(beta) > min(chernoff) * 0.999


def test_scales_follow_levels_budget_and_sensitivity():
    law = TreeCounter(64, budget=RHO).design
    assert (law.kind, law.scale) == ("gaussian", 7)  # H = 7, not 6
    assert TreeCounter(63, budget=RHO).design.scale == 6
    assert TreeCounter(64, budget=Budget(rho=2.0), row_sensitivity=3.0).design.scale == Fraction(
        7 * 9, 4
    )
    law = TreeCounter(64, budget=Budget.pure(0.5), row_sensitivity=3.0).design
    assert (law.kind, law.scale) == ("laplace", 7 * 3 * 2)
    # A square root given as a float is not taken for less than it is.
    assert exact(math.sqrt(3)) ** 2 >= 3
    wide = TreeCounter(1, 3, budget=RHO, row_sensitivity=math.sqrt(3)).design
    assert 3 <= wide.scale <= 3 + Fraction(1, 2**20)
    # An (ε, δ) budget: exact noise by way of ρ, continuous noise by the exact line.
    budget = Budget.approx(1.0, 1e-5)
    scale = TreeCounter(1, budget=budget).design.scale
    assert scale == pytest.approx(1 / (2 * budget.rho), rel=ROUNDED)
    exactly = TreeCounter(1, budget=budget, sampler="float").design.scale
    assert float(exactly) == pytest.approx(gaussian_scale(1.0, 1e-5) ** 2, rel=ROUNDED)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("kinds", [{}, {"estimator": "honaker"}, {"sampler": "float"}], ids=str)
def test_many_at_once_are_single_steps_bit_for_bit(horizon, kinds):
    def build():
        given = dict(kinds)
        if "sampler" in kinds:
            given["noise"] = FloatNoise(torch.Generator().manual_seed(1))
        return seeded(horizon, 2, **given)

    n = horizon or 70
    rows = bits(n, 2)
    single = build()
    wanted = torch.stack([single.update(row) for row in rows])
    for sizes in ([n], [n // 2, n - n // 2], [n // 3] * 3 + [n % 3]):
        counter, found = build(), []
        for part in rows.split([size for size in sizes if size]):
            found.append(counter.update_many(part))
            assert torch.equal(counter.last(), found[-1][-1])
        assert torch.equal(torch.cat(found), wanted)
        assert torch.equal(single.last(), counter.last())


def test_real_rows_add_up_in_one_order():
    rows = torch.randn(50, 3, dtype=torch.float32, generator=torch.Generator().manual_seed(0))

    def build():
        noise = FloatNoise(torch.Generator().manual_seed(1), dtype=torch.float32)
        kinds = {"sampler": "float", "dtype": torch.float32, "noise": noise}
        return TreeCounter(50, 3, budget=RHO, **kinds)

    one, two = build(), build()
    assert torch.equal(one.update_many(rows), torch.stack([two.update(row) for row in rows]))
    assert one.last().dtype == torch.float32


@pytest.mark.parametrize(
    "kinds", [{}, {"estimator": "honaker"}, {"budget": Budget.pure(1.0)}], ids=str
)
def test_releases_have_the_variance_that_is_told(kinds):
    n, copies = 13, 40_000
    kinds = {"budget": RHO, "noise": DiscreteNoise(insecure_seed=5)} | kinds
    counter = TreeCounter(n, copies, **kinds)
    found = counter.update_many(torch.zeros(n, copies, dtype=torch.int64)).double().var(1)
    wanted = [counter.variance(t) for t in range(1, n + 1)]
    # Five standard errors: √(2/40000), more for Laplace noise; the discrete law has a little less.
    np.testing.assert_allclose(found, wanted, rtol=0.06)


def adversary(releases, rng, size):
    """A row that depends on everything released, and on coins that both runs share."""
    seen = int(np.sum([np.sum(np.asarray(r)) for r in releases])) if releases else 0
    return torch.from_numpy((rng.integers(0, 2, size) + seen) % 2)


@pytest.mark.parametrize("estimator", ["prefix", "honaker"])
@pytest.mark.parametrize("horizon", HORIZONS)
def test_coupled_runs_on_neighbours_are_the_same_and_cost_what_was_declared(horizon, estimator):
    n = horizon or 70
    check_coupling(horizon, estimator, int(np.random.default_rng(n).integers(1, n + 1)))


@pytest.mark.parametrize("estimator", ["prefix", "honaker"])
@pytest.mark.parametrize("horizon", range(1, 21))
def test_coupled_runs_agree_whichever_row_is_the_other(horizon, estimator):
    for at in range(1, horizon + 1):
        check_coupling(horizon, estimator, at)


def check_coupling(horizon, estimator, at):
    """Shift the noise by what the other record changes: if releases agree, the shift is the cost.

    The releases are equal for every outcome of the noise, so that the loss is that of telling
    noise from shifted noise: ‖shift‖² / (2σ²) = ρ at most.
    """
    n = horizon or 70
    size = 2
    coins = np.random.default_rng((n, at))
    pair = torch.from_numpy(coins.integers(0, 2, (2, size)))

    def run(noise, b):
        kinds = {"budget": RHO, "row_sensitivity": math.sqrt(size), "estimator": estimator}
        counter = TreeCounter(horizon, size, noise=noise, **kinds)
        rng, releases = np.random.default_rng(n), []
        for t in range(1, n + 1):
            row = adversary(releases, rng, size)
            releases.append(counter.update(pair[b] if t == at else row))
        return releases

    recording = Recording(DiscreteNoise(insecure_seed=n))
    first = run(recording, 0)
    change = (pair[0] - pair[1]).numpy()
    shifts, cost, epoch, t = {}, Fraction(0), 0, 0
    for index, (_, scale, drawn) in enumerate(recording.drawn):
        shift = np.zeros_like(drawn)
        begin = (1 << epoch) - 1 if horizon is None else 0
        if horizon is None and t and (t + 1) & t == 0 and begin != t:
            shift[0] = change * (begin < at <= t)  # the total of the epoch that is over
            epoch += 1
        else:
            t += 1
            local = t - begin
            for j, width in enumerate([local & -local] if estimator == "prefix" else sizes(local)):
                shift[j] = change * (t - width < at <= t)
        shifts[index] = shift
        cost += Fraction(int((shift**2).sum())) / (2 * scale)
    second = run(Replay(recording.drawn, shifts), 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert cost <= Fraction(RHO.rho)


def sizes(t):
    """Sizes of the nodes that end at step t, smallest first."""
    return [1 << j for j in range((t & -t).bit_length())]


def test_a_power_of_two_has_one_level_more_than_its_logarithm():
    # With ⌈log2 T⌉ levels in place of ⌊log2 T⌋ + 1 the first row of 64 costs more than declared.
    nodes = fenwick_nodes(64)[:, 0].sum()
    assert nodes / (2 * 6) > RHO.rho
    assert nodes / (2 * TreeCounter(64, budget=RHO).design.scale) == RHO.rho


def test_what_was_spent():
    counter = TreeCounter(64, budget=RHO)
    assert counter.spent.rho == 0
    assert counter.last() is None
    counter.update(1)
    assert counter.spent.rho == pytest.approx(0.5 / 7)
    counter.update_many([1] * 6)
    assert counter.spent.rho == pytest.approx(0.5 * 3 / 7)
    counter.update_many([1] * 57)
    assert counter.spent == RHO
    pure = TreeCounter(3, budget=Budget.pure(1.0))
    pure.update_many([1, 0, 1])
    assert pure.spent == Budget.pure(1.0)
    approx = TreeCounter(3, budget=Budget.approx(1.0, 1e-6), sampler="float")
    approx.update_many([1, 0, 1])
    assert approx.spent.epsilon(1e-6) == pytest.approx(1.0, rel=SLACK)
    endless = TreeCounter(None, budget=RHO)
    endless.update(1)
    assert endless.spent == Budget(rho=0.25)
    endless.update(1)
    assert endless.spent == RHO


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
def test_a_dtype_that_noise_is_not_drawn_in_is_refused(dtype):
    for build in (FactorizationCounter, partial(TreeCounter, sampler="float")):
        with pytest.raises(ValueError, match=f"dtype must be .* or float64, got {dtype}"):
            build(5, budget=RHO, dtype=dtype)
        with pytest.raises(TypeError, match="Counter: dtype must be a torch.dtype, got str"):
            build(5, budget=RHO, dtype="float32")


def test_neither_stream_nor_global_randomness_is_touched():
    before = torch.get_rng_state()
    counter = TreeCounter(10, budget=RHO, sampler="float")
    counter.update_many(torch.ones(10))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("adjacency", ["replace", "add_remove"])
@pytest.mark.parametrize("clip", ["l2", "linf"])
def test_clipping_keeps_the_promise(adjacency, clip):
    kinds = {"sampler": "float", "noise": Zero(), "clip": clip, "adjacency": adjacency}
    generator = torch.Generator().manual_seed(0)
    rows = 5 * torch.randn(20, 3, dtype=torch.float64, generator=generator)
    counter = TreeCounter(20, 3, budget=RHO, row_sensitivity=2.0, **kinds)
    kept = torch.diff(counter.update_many(rows), dim=0, prepend=torch.zeros(1, 3).double())
    others = kept if adjacency == "replace" else torch.zeros(1, 3).double()
    assert torch.cdist(kept, others).max() <= 2.0 + 1e-12
    assert kept.norm(dim=1).max() >= 0.99 * (1.0 if adjacency == "replace" else 2.0)
    small = torch.full((3,), 0.1, dtype=torch.float64)
    counter = TreeCounter(20, 3, budget=RHO, row_sensitivity=2.0, **kinds)
    assert torch.equal(counter.update(small), small)


def test_clipping_integers():
    kinds = {"clip": "linf", "noise": Zero()}
    counter = TreeCounter(3, 4, budget=RHO, row_sensitivity=8.0, **kinds)
    # A ball of radius 4 in 4 dimensions holds the cube of half-width 2.
    assert counter.update([9, -9, 1, 0]).tolist() == [2, -2, 1, 0]
    counter = TreeCounter(3, 4, budget=Budget.pure(1.0), row_sensitivity=8.0, **kinds)
    assert counter.update([9, -9, 1, 0]).tolist() == [1, -1, 1, 0]
    scalar = TreeCounter(3, budget=RHO, row_sensitivity=2.0, sampler="float", clip="l2")
    assert scalar._checked(torch.tensor([3.0, -0.5, 0.0]), many=True).tolist() == [1.0, -0.5, 0.0]


def test_bounds_in_closed_form():
    counter = TreeCounter(1024, 35, budget=RHO, row_sensitivity=math.sqrt(35))
    wanted = math.sqrt(35) * math.sqrt(110) * math.sqrt(2 * math.log(2 * 35 * 1024 / 0.05))
    assert counter.error_bound(0.05) == pytest.approx(wanted, rel=ROUNDED)
    with pytest.raises(ValueError, match="TreeCounter: beta must be > 0 and < 1, got 1"):
        counter.error_bound(1)


@pytest.mark.parametrize("terms", [1, 3, 10])
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_tails_hold_for_exact_sums_of_discrete_noise(kind, terms):
    scale = 1.5
    x = np.arange(-400, 401)
    one = np.exp(-(x**2) / (2 * scale) if kind == "gaussian" else -np.abs(x) / scale)
    one /= one.sum()
    law = one
    for _ in range(terms - 1):
        law = np.convolve(law, one)
    far = np.abs(np.arange(law.size) - law.size // 2)
    for beta in (0.05, 1e-3, 1e-6):
        bound = tail(kind, scale, terms, 1, beta)
        exact_tail = law[far > bound].sum()
        assert exact_tail <= beta
        assert law[far > 0.4 * bound].sum() > beta  # and is of the right size


@pytest.mark.parametrize("horizon", [200, None])
def test_bounds_hold_in_simulation(horizon):
    counter = TreeCounter(
        horizon, 500, budget=RHO, noise=DiscreteNoise(insecure_seed=2), row_sensitivity=1.0
    )
    noise = counter.update_many(torch.zeros(200, 500).long())
    assert noise.abs().max() < counter.error_bound(0.05)
    assert noise.abs().max() > 0.5 * counter.error_bound(0.05)


def test_calibration_never_gives_less_noise_than_the_budget_asks_for():
    for rho in (0.1, 0.3, 1 / 3, 7.7):
        kind, scale = calibrate(Budget(rho=rho), Fraction(5), Fraction(3))
        assert kind == "gaussian"
        assert Fraction(5) / (2 * scale) <= Fraction(rho)
    kind, scale = calibrate(Budget.pure(0.3), Fraction(5), Fraction(3))
    assert kind == "laplace"
    assert Fraction(3) / scale <= Fraction(0.3)


@pytest.mark.parametrize(
    ("kinds", "error", "message"),
    [
        ({"horizon": 0}, ValueError, "TreeCounter: horizon must be >= 1, got 0"),
        ({"horizon": 2.5}, TypeError, "TreeCounter: horizon must be an integer, got float"),
        ({"shape": (0,)}, ValueError, "TreeCounter: shape must be >= 1, got 0"),
        ({"budget": 0.5}, TypeError, "TreeCounter: budget must be a Budget, got float"),
        ({"budget": Budget(0.0)}, ValueError, "TreeCounter: budget must be > 0"),
        ({"row_sensitivity": 0}, ValueError, "row_sensitivity must be > 0, got 0"),
        ({"row_sensitivity": math.inf}, ValueError, "row_sensitivity must be finite"),
        ({"estimator": "x"}, ValueError, "estimator must be one of 'prefix', 'honaker', got 'x'"),
        ({"sampler": "x"}, ValueError, "sampler must be one of 'discrete', 'float', got 'x'"),
        ({"clip": "l2"}, ValueError, "clip must not be 'l2' with sampler='discrete'"),
        ({"clip": "linf"}, ValueError, r"row_sensitivity must let integers of \(\) be more"),
        ({"adjacency": "x"}, ValueError, "adjacency must be one of"),
    ],
)
def test_bad_arguments_are_named(kinds, error, message):
    with pytest.raises(error, match=message):
        TreeCounter(**({"horizon": 4, "budget": RHO} | kinds))


def test_bad_rows_are_refused_without_showing_them_and_nothing_changes():
    counter = seeded(5, 2)
    before = repr(counter.state_dict())
    with pytest.raises(ValueError, match=r"TreeCounter: row must have shape \[2\], got \[3\]"):
        counter.update([1, 2, 3])
    with pytest.raises(ValueError, match=r"rows must have shape \['n >= 1', 2\], got \[2\]"):
        counter.update_many([1, 2])
    with pytest.raises(ValueError, match="rows must have shape"):
        counter.update_many(torch.zeros(0, 2).long())
    with pytest.raises(TypeError, match="row must hold integers .* got float64") as caught:
        counter.update(np.array([0.123, 4.567]))
    assert "0.123" not in str(caught.value)
    assert repr(counter.state_dict()) == before


def test_sums_beyond_sixty_three_bits_wrap_as_is_said():
    counter = TreeCounter(2, budget=RHO, noise=Zero())
    assert counter.update_many([1 << 62, 1 << 62]).tolist() == [1 << 62, -(1 << 63)]


def test_an_epoch_whose_noise_has_too_many_digits_is_refused_before_it_begins():
    rho = 1.5 / 2**60  # σ² is H / (2ρ) in each half: below 2^61 up to two levels
    counter = TreeCounter(None, budget=Budget(rho), noise=Zero())
    counter.update_many([1] * 3)
    before = repr(counter.state_dict())
    for call, row in ((counter.update, 1), (counter.update_many, [1, 1])):
        with pytest.raises(ValueError, match="TreeCounter: budget must .* 61 bits, got Budget"):
            call(row)
        assert repr(counter.state_dict()) == before
    # Real noise has the digits.
    assert TreeCounter(10, budget=Budget(1e-25), sampler="float").update(1.0).isfinite()


@pytest.mark.parametrize("clip", [None, "l2", "linf"])
def test_real_rows_that_are_no_numbers_are_refused(clip):
    counter = TreeCounter(5, 2, budget=RHO, sampler="float", clip=clip, noise=Zero())
    for bad in ([math.nan, 0.0], [0.0, -math.inf]):
        with pytest.raises(ValueError, match="row must hold finite numbers; 1 of its entries"):
            counter.update(bad)
    assert counter.t == 0
    largest = torch.full((2,), torch.finfo(torch.float64).max, dtype=torch.float64)
    if clip is not None:  # finite, unlike their sum
        assert counter.update(largest).isfinite().all()


def test_the_plan_says_what_it_is():
    plan = TreeCounter(64, budget=RHO).plan
    assert plan == {"mechanism": "tree", "sigma": pytest.approx(math.sqrt(42), rel=ROUNDED)}
    assert TreeCounter(64, budget=RHO, estimator="honaker").plan["mechanism"] == "honaker"
    assert TreeCounter(None, budget=RHO).plan["sigma"] == pytest.approx(math.sqrt(2))


def test_repr_names_what_matters_and_warns_of_injected_noise():
    text = repr(TreeCounter(8, 2, budget=RHO))
    assert text.startswith("TreeCounter(8, shape=[2], ")
    assert "budget=Budget(rho=0.5)" in text
    assert "WARNING" not in text
    assert "WARNING: injected noise, not private" in repr(seeded(8))

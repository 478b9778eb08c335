# SPDX-License-Identifier: Apache-2.0
"""The game, the coupling and the audit: what is right passes, and every planted bug is found."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from rounded_scales import ROUNDED
from scipy import stats

from batchery.privacy import (
    Audit,
    Budget,
    Challenge,
    ContinualGame,
    DiscreteNoise,
    FactorizationCounter,
    FloatNoise,
    MaxSum,
    SumSelect,
    TreeCounter,
    off_lattice,
)
from batchery.privacy.audit import _renyi, _upper_rate
from batchery.privacy.bounds import Recompute, recompute_max
from batchery.privacy.running_sum import DoublingDesign
from batchery.privacy.tree import TreeDesign

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)  # μ = 1
D = 2


def adaptive(steps, seed, size=D, real=False):
    """Rows that depend on all that was released, and a challenge at a step of their choice."""
    coins = np.random.default_rng(seed).integers(0, 2, (steps, size))
    first = np.random.default_rng(seed + 1).integers(0, 2, size)
    pair = np.stack([first, 1 - first])
    latest = int(np.random.default_rng(seed + 2).integers(0, steps))
    done = -1  # where the challenge fell; a function of the releases

    def next_row(releases):
        nonlocal done
        t = len(releases)
        done = -1 if t == 0 else done
        seen = sum(
            int(torch.as_tensor(r).double().mul(1000 if real else 1).sum()) for r in releases
        )
        if done < 0 and (t == latest or (t > 2 and seen % 7 == 0)):
            done = t
            return Challenge(*torch.from_numpy(pair))
        return torch.from_numpy((coins[t] + seen) % 2)

    return next_row


# The game


def test_both_sides_are_given_the_same_but_for_one_record():
    game = ContinualGame(lambda z: TreeCounter(40, D, budget=RHO, noise=z), adaptive(40, 3))
    kinds = {"insecure_seed": 5}
    one, two = (game.view(b, DiscreteNoise(**kinds)) for b in (0, 1))
    assert torch.equal(one.rows[one.at - 1], one.pair.first)
    assert torch.equal(two.rows[two.at - 1], two.pair.second)
    assert one.at == two.at
    assert all(map(torch.equal, one.rows[: one.at - 1], two.rows[: two.at - 1]))
    assert len(one.releases) == len(one.rows) == one.mechanism.t == 40
    # What is seen differs afterwards, and with it what an adversary that adapts goes on with.
    assert not all(map(torch.equal, one.releases[one.at :], two.releases[two.at :]))


def test_rules_of_the_game_are_kept():
    def game(adversary, horizon=4, **kinds):
        return ContinualGame(
            lambda z: TreeCounter(horizon, budget=RHO, noise=z), adversary, **kinds
        )

    with pytest.raises(ValueError, match="ContinualGame: adversary must challenge once, got no"):
        game(lambda releases: 0).view(0)
    with pytest.raises(ValueError, match="adversary must challenge once, got 2"):
        game(lambda releases: Challenge(0, 1)).view(0)
    with pytest.raises(ValueError, match="steps must be given without a horizon"):
        game(lambda releases: 0, horizon=None).view(0)
    with pytest.raises(ValueError, match="b must be one of 0, 1, got 2"):
        game(lambda releases: 0).view(2)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        game(lambda releases: 0, steps=0)
    select = ContinualGame(
        lambda z: SumSelect(4, D, budget=RHO, mechanism="recompute", sampler="float", noise=z),
        adaptive(4, 0),
    )
    with pytest.raises(ValueError, match="must make a counter, or a MaxSum .* got 'SumSelect'"):
        select.couple(FloatNoise(torch.Generator().manual_seed(0)))


# Couplings of what is right


EXACT = {
    "tree": lambda t, z: TreeCounter(t, D, budget=RHO, row_sensitivity=math.sqrt(D), noise=z),
    "honaker": lambda t, z: TreeCounter(
        t, D, budget=RHO, row_sensitivity=math.sqrt(D), estimator="honaker", noise=z
    ),
    "laplace": lambda t, z: TreeCounter(
        t, D, budget=Budget.pure(0.7), row_sensitivity=float(D), noise=z
    ),
    "max by recompute": lambda t, z: MaxSum(t, D, budget=RHO, mechanism="recompute", noise=z),
    "max by tree": lambda t, z: MaxSum(t, D, budget=RHO, mechanism="tree", noise=z),
    "argmax by tree": lambda t, z: SumSelect(t, D, budget=RHO, mechanism="tree", noise=z),
}


@pytest.mark.parametrize(
    ("name", "horizon"),
    [(name, t) for name in EXACT for t in range(1, 71, 6 if " by tree" in name else 1)],
)
def test_a_replay_with_shifted_noise_shows_the_same_and_costs_what_was_declared(name, horizon):
    game = ContinualGame(lambda z: EXACT[name](horizon, z), adaptive(horizon, horizon))
    found = game.couple(DiscreteNoise(insecure_seed=horizon))
    assert found.differs_at is None
    assert found.cost <= found.declared * (1 + 1e-9)
    assert found.holds


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 40, 70])
@pytest.mark.parametrize("estimator", ["prefix", "honaker"])
def test_the_same_without_a_horizon(steps, estimator):
    def build(z):
        kinds = {"row_sensitivity": math.sqrt(D), "estimator": estimator, "noise": z}
        return TreeCounter(None, D, budget=RHO, **kinds)

    for seed in range(5):
        game = ContinualGame(build, adaptive(steps, seed), steps)
        assert game.couple(DiscreteNoise(insecure_seed=seed)).holds


@pytest.mark.parametrize("horizon", [1, 2, 5, 33, 64, 70])
@pytest.mark.parametrize("strategy", ["sqrt", "banded", "blt"])
def test_the_same_of_factorisations_up_to_rounding(horizon, strategy):
    def build(z):
        kinds = {"strategy": strategy, "bands": 5, "row_sensitivity": math.sqrt(D), "noise": z}
        return FactorizationCounter(horizon, D, budget=RHO, **kinds)

    for seed in range(3):
        game = ContinualGame(build, adaptive(horizon, seed, real=True))
        noise = FloatNoise(torch.Generator().manual_seed(seed))
        assert game.couple(noise, tolerance=1e-9).holds


def always_first(length, pair=(0, 1)):
    """The record that is in most nodes, and nothing else."""
    rows = [Challenge(*pair)] + [torch.zeros_like(torch.as_tensor(pair[0]))] * (length - 1)
    return lambda releases: rows[len(releases)]


def test_the_worst_record_costs_the_whole_budget():
    for horizon in (1, 3, 64, 65):
        game = ContinualGame(
            lambda z, t=horizon: TreeCounter(t, budget=RHO, noise=z), always_first(horizon)
        )
        assert game.couple(DiscreteNoise()).cost == pytest.approx(0.5, rel=ROUNDED)
    game = ContinualGame(
        lambda z: MaxSum(50, 1, budget=RHO, mechanism="recompute", noise=z),
        always_first(50, ([0], [1])),
    )
    assert game.couple(DiscreteNoise()).cost == pytest.approx(0.5, rel=ROUNDED)


# Limits of the audit


def test_limits_of_rates_are_those_of_clopper_and_pearson():
    for trials, miss in ((7, 0.05), (400, 0.01)):
        counts = np.array([0, 1, trials // 2, trials - 1, trials])
        for count, limit in zip(counts, _upper_rate(counts, trials, miss), strict=True):
            if count == trials:
                assert limit == 1
            else:  # so few only with this probability
                assert stats.binom.cdf(count, trials, limit) == pytest.approx(miss, rel=1e-9)


def test_the_limit_of_rho_is_the_renyi_divergence_of_a_decision():
    a, b = 0.1, 0.3
    worst = 0.0
    for order in np.linspace(1.0005, 40, 40_000):
        for p, q in ((1 - b, a), (a, 1 - b)):
            total = p**order * q ** (1 - order) + (1 - p) ** order * (1 - q) ** (1 - order)
            worst = max(worst, math.log(total) / (order - 1) / order)
    # The orders are a grid, 12 % apart: its best is below the best of all.
    assert float(_renyi(np.array([a]), np.array([b]))[0]) == pytest.approx(worst, rel=2e-3)
    assert float(_renyi(np.array([a]), np.array([b]))[0]) <= worst * (1 + 1e-3)
    assert _renyi(np.array([0.6]), np.array([0.5]))[0] == 0  # worse than a coin


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
def test_limits_of_gaussian_noise_are_below_its_loss_and_near(mu):
    z = np.random.default_rng(1).normal(size=(2, 400_000))
    found = Audit(z[0], z[1] + mu)
    assert 0.95 * mu - 0.01 < found.mu <= mu
    assert 0.4 * mu**2 / 2 < found.rho <= mu**2 / 2
    assert found.epsilon(1e-5) <= Budget(mu**2 / 2, gaussian=True).epsilon(1e-5)
    assert not found.exceeds(Budget(mu**2 / 2, gaussian=True))
    assert found.exceeds(Budget((0.9 * mu) ** 2 / 2, gaussian=True))
    assert not found.exceeds(Budget(mu**2 / 2))
    assert found.exceeds(Budget(0.4 * mu**2 / 2))
    # The attack may point the other way.
    assert Audit(-z[0], -z[1] - mu).mu == pytest.approx(found.mu, rel=0.02)


def test_limits_of_laplace_noise():
    z = np.random.default_rng(2).laplace(size=(2, 200_000))
    found = Audit(z[0], z[1] + 0.5)
    assert 0.45 < found.epsilon() <= 0.5
    assert not found.exceeds(Budget.pure(0.5))
    assert found.exceeds(Budget.pure(0.44))


def test_limits_are_wrong_as_seldom_as_told():
    rng = np.random.default_rng(3)
    wrong = sum(Audit(*(rng.normal(size=(2, 400)) + [[0], [1]])).mu > 1 for _ in range(300))
    assert wrong <= 15  # 5 % of them; Bonferroni's inequality leaves room
    for few in (Audit(range(4), range(4)), Audit([0.0] * 9, [0.0] * 9)):
        assert (few.mu, few.rho, few.epsilon()) == (0, 0, 0)
    apart = Audit(np.zeros(1000), np.ones(1000))
    assert 4.5 < apart.mu < 7  # all that a thousand runs can tell
    assert apart.exceeds(Budget.approx(4.0, 1e-6))
    assert repr(apart).startswith("Audit(mu>=4.")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Audit([1, 2, 3], [0] * 9), "Audit: first must hold at least 4 scores, got 3"),
        (lambda: Audit([1] * 4, [math.nan] * 4), "Audit: second must hold numbers, got 'nan'"),
        (lambda: Audit([1] * 4, [1] * 4, confidence=1.0), "confidence must be > 0 and < 1"),
        (lambda: off_lattice([1.0], 0.3), "off_lattice: spacing must be 2.k, got 0.3"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Planted bugs


def counters(kind, horizon, runs, budget=RHO, **kinds):
    """A game on `runs` columns, each an independent counter: row 1 is all zeros or all ones."""
    seeds = itertools.count(1)

    def build(noise):
        own = FloatNoise if kinds.get("sampler") == "float" else None
        if noise is None and own is None:
            noise = DiscreteNoise(insecure_seed=next(seeds))
        elif noise is None:
            noise = FloatNoise(torch.Generator().manual_seed(next(seeds)))
        return kind(horizon, runs, budget=budget, noise=noise, **kinds)

    zeros, ones = torch.zeros(runs, dtype=torch.int64), torch.ones(runs, dtype=torch.int64)
    length = horizon or 7
    return ContinualGame(build, always_first(length, (zeros, ones)), steps=length)


def nodes_of_first(view):
    """The best score of row 1: the noisy sums of all nodes it is in, which end at powers of 2."""
    ends = [1 << k for k in range(len(view.releases).bit_length())]
    return sum(view.releases[t - 1].double() for t in ends)


class Quiet(TreeCounter):
    """Half the noise."""

    def _design(self, horizon, budget):
        design = super()._design(horizon, budget)
        return TreeDesign(horizon, design.kind, design.scale / 4, design.estimator)


class OneLevelShort(TreeCounter):
    """⌈log2 T⌉ levels."""

    def _design(self, horizon, budget):
        design = super()._design(horizon, budget)
        levels = max(1, (horizon - 1).bit_length())
        scale = design.scale * levels / horizon.bit_length()
        return TreeDesign(horizon, design.kind, scale, design.estimator)


class Reread(TreeCounter):
    """New noise for every look at the last release."""

    def last(self):
        fresh = self._sum.noise.rows.take(1)[0]
        return self._sum.total + fresh


class Twice(TreeCounter):
    """Crashes after two rows, and resumes with the noise stream back at its beginning."""

    def _step(self, row):
        release = super()._step(row)
        if self.t == 1:  # the second row
            self._sum.noise.rows.noise = DiscreteNoise(
                insecure_seed=self.noise.source.insecure_seed
            )
            self._sum.noise.rows.load({})
        return release


class Whole(TreeCounter):
    """Without a horizon: the whole budget for each half."""

    def _begin(self):
        super()._begin()
        whole = DoublingDesign(
            lambda horizon: self._design(horizon, self._cost),
            self.design.kind,
            self.design.total_scale / 2,
        )
        self.design = whole
        self._sum = whole.begin(self._sum.place)


def test_half_the_noise_is_found():
    assert counters(Quiet, 8, 20_000).audit(nodes_of_first).exceeds(RHO)
    right = counters(TreeCounter, 8, 20_000).audit(nodes_of_first)
    assert right.mu == pytest.approx(1, abs=0.1)
    assert not right.exceeds(RHO)
    found = counters(Quiet, 8, 3).couple(DiscreteNoise())
    assert (found.differs_at, found.holds) == (None, False)
    assert found.cost == pytest.approx(4 * 3 * 0.5, rel=ROUNDED)  # 3 columns, each with its own row


def test_a_level_short_is_found_at_a_power_of_two():
    # σ² of 6 levels in place of 7: μ = √(7/6) = 1.08. Float noise is exactly of μ.
    mu = Budget(rho=0.5, gaussian=True)
    short = counters(OneLevelShort, 64, 150_000, sampler="float", dtype=torch.float32)
    found = short.audit(nodes_of_first)
    assert 1.04 < found.mu <= math.sqrt(7 / 6)
    assert found.exceeds(mu)
    whole = counters(TreeCounter, 64, 150_000, sampler="float", dtype=torch.float32)
    right = whole.audit(nodes_of_first)
    assert 0.95 < right.mu <= 1
    assert not right.exceeds(mu)
    found = counters(OneLevelShort, 64, 1).couple(DiscreteNoise())
    assert found.cost == pytest.approx(0.5 * 7 / 6, rel=ROUNDED)
    assert not found.holds
    assert counters(OneLevelShort, 63, 1).couple(DiscreteNoise()).holds  # no power of two


def test_noise_drawn_again_at_every_look_is_found():
    def looks(view):
        return sum(view.mechanism.last().double() for _ in range(30))

    assert counters(Reread, 1, 3000).audit(looks).exceeds(RHO)
    assert not counters(TreeCounter, 1, 3000).audit(looks).exceeds(RHO)


def test_noise_used_again_after_a_resume_is_found():
    def difference(view):
        # z1 + z2 - z1 - z2 if node 3 has the noise of node 1: minus row 1, without any noise.
        one, two, three = view.releases[:3]
        return one - (three - two)

    assert counters(Twice, 3, 3000).audit(difference).exceeds(RHO)
    right = counters(TreeCounter, 3, 3000).audit(difference)
    assert not right.exceeds(RHO)
    assert right.mu < 1


def test_a_budget_spent_twice_is_found():
    def epochs(view):
        # Row 1 as released in its epoch, and in the total of that epoch: μ² = 1 + 1/2.
        return 4 * view.releases[0] + view.releases[1] + view.releases[2]

    mu = Budget(rho=0.5, gaussian=True)
    kinds = {"sampler": "float", "dtype": torch.float32}
    found = counters(Whole, None, 100_000, **kinds).audit(epochs)
    assert found.mu > 1.15
    assert found.exceeds(mu)
    assert not counters(TreeCounter, None, 100_000, **kinds).audit(epochs).exceeds(mu)
    assert not counters(Whole, None, 1).couple(DiscreteNoise()).holds


def test_a_row_of_bits_that_is_taken_for_one_bit_is_found():
    d, runs = 25, 4000
    for sensitivity, wrong in ((1.0, True), (math.sqrt(d), False)):
        seeds = itertools.count(1)

        def build(noise, s=sensitivity, seeds=seeds):
            noise = noise or DiscreteNoise(insecure_seed=next(seeds))
            return TreeCounter(1, (runs, d), budget=RHO, row_sensitivity=s, noise=noise)

        pair = (torch.zeros(runs, d, dtype=torch.int64), torch.ones(runs, d, dtype=torch.int64))
        game = ContinualGame(build, always_first(1, pair))
        found = game.audit(lambda view: view.releases[0].sum(1))
        assert found.exceeds(RHO) is wrong
        # √25 as much: 5, of which 4000 runs can tell 4.
        assert found.mu > 4 if wrong else found.mu < 1


def recomputed(plan: Recompute, runs, seed):
    """Sums of all releases of a maximum that is 0 throughout, or 1."""
    noise = DiscreteNoise(insecure_seed=seed)
    sides = [noise.sample(plan.kind, plan.scale, (runs, plan.releases)).sum(1) for _ in (0, 1)]
    return Audit(sides[0], sides[1] + plan.releases)


def test_old_records_that_later_releases_are_not_charged_for_are_found():
    plan = recompute_max(1000, RHO, 0.05)
    right = recomputed(plan, 20_000, 1)
    assert 0.9 < right.mu <= 1
    assert not right.exceeds(RHO)
    parallel = Recompute(plan.interval, plan.releases, plan.kind, Fraction(1), plan.stale)
    assert recomputed(parallel, 20_000, 2).exceeds(RHO)


def test_floating_point_noise_leaks_the_integer_under_it():
    runs = 20_000
    spacing = 2.0**-53

    def low_bits(view):
        # Nothing else than whether the low bits could be those of noise on 1.
        value = view.releases[0].double().numpy()
        return -off_lattice(value, spacing) * (np.abs(value) < 0.5)

    leaky = counters(TreeCounter, 1, runs, sampler="float").audit(low_bits)
    assert leaky.exceeds(RHO)
    assert leaky.epsilon(1e-6) > RHO.epsilon(1e-6)
    exact = counters(TreeCounter, 1, runs).audit(low_bits)
    assert (exact.mu, exact.rho) == (0, 0)
    # Rounding to integers hides the bits, not the roundings that made them.
    assert not counters(TreeCounter, 1, runs).audit(lambda v: v.releases[0]).exceeds(RHO)


class Fainter:
    """Another's noise of a smaller scale than was asked for."""

    def __init__(self, noise, factor):
        self.noise, self.factor = noise, factor

    def sample(self, kind, scale, shape):
        return self.noise.sample(kind, scale / self.factor, shape)


@pytest.mark.parametrize(("factor", "found"), [(1, False), (25, True)])
def test_an_adversary_that_adapts_finds_what_is_wrong_and_nothing_else(factor, found):
    seeds = itertools.count(1)

    def build(noise):
        noise = Fainter(DiscreteNoise(insecure_seed=next(seeds)), factor)
        kinds = {"mechanism": "recompute", "consistent": False, "noise": noise}
        return MaxSum(4, 1, budget=RHO, **kinds)

    def adversary(releases):
        if not releases:
            return Challenge([0], [1])
        return [int(releases[-1] > len(releases) / 2)]

    audit = ContinualGame(build, adversary).audit(lambda view: sum(view.releases), 100)
    assert audit.exceeds(RHO) is found

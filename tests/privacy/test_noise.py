# SPDX-License-Identifier: Apache-2.0
"""Oracles of the exact samplers: exact tables, every branch by enumeration, then frequencies."""

import ast
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from exact_laws import Script, exact_mass, exact_pmf, p_value
from scipy import stats

from batchery.privacy import (
    DiscreteNoise,
    device_noise,
    discrete_gaussian,
    discrete_laplace,
    law,
)
from batchery.privacy import noise as module
from batchery.privacy.law import Law, cumulative, exp_bounds, resolve
from batchery.privacy.noise import BitSource, bernoulli_exp, exponential, round_up

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")


@pytest.mark.parametrize(
    "exponent", ["0", "1/7", "1", "5/3", "100/3", "255/256", "1/1000003", "88"]
)
@pytest.mark.parametrize("bits", [10, 64, 190])
def test_bounds_of_the_exponential_enclose_it(exponent, bits):
    exponent = Fraction(exponent)
    low, high = exp_bounds(exponent, bits)
    with mpmath.workdps(120):
        exact = mpmath.exp(-mpmath.mpf(exponent.numerator) / exponent.denominator) * 2**bits
        assert low <= exact <= high
    assert high - low <= 2


LAWS = [
    Law("gaussian", Fraction(1, 10), 1),
    Law("gaussian", Fraction(5, 2), 1),
    Law("gaussian", Fraction(1000), 4),
    Law("laplace", Fraction(1, 3), 1),
    Law("laplace", Fraction(7, 2), 2),
    Law("gaussian", Fraction(5, 2), 1, halved=True),
    Law("laplace", Fraction(1, 3), 1, halved=True),
]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("bits", [8, 63, 127])
def test_every_entry_of_a_table_is_the_floor_of_the_exact_distribution(law, bits):
    table = cumulative(law, bits)
    with mpmath.workdps(100):
        mass, k = [], 0
        while not mass or mass[-1] > mpmath.mpf(10) ** -95:
            mass.append(exact_mass(law.kind, law.scale, k * law.step))
            k += 1
        if law.halved:
            mass[0] /= 2
        total, below = mpmath.fsum(mass), mpmath.mpf(0)
        for k, entry in enumerate(table):
            below += mass[k]
            assert entry == int(mpmath.floor(below / total * 2**bits))
    assert table[-1] == 2**bits - 1
    assert table[-2:-1] != [2**bits - 1]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_word_on_a_boundary_is_decided_by_further_bits(law):
    short, long = cumulative(law, 8), cumulative(law, 72)
    for k in range(len(short) - 1):
        if short[k] in short[:k] + short[k + 1 :]:
            continue
        rest = long[k] - (short[k] << 64)  # the next 64 bits of F(k)
        for word, wanted in ((rest - 1, k), (rest + 1, k + 1)):
            if 0 <= word < 2**64:
                assert resolve(law, short[k], 8, Script(word)) == wanted
        last = cumulative(law, 136)[k] - (long[k] << 64)
        assert resolve(law, short[k], 8, Script(rest, last - 1)) == k
        assert resolve(law, short[k], 8, Script(rest, last + 1)) == k + 1


class Branch:
    """A source that follows one path through a sampler's choices and weighs it.

    `below` offers every integer; `words` offers one word for each cell of a table, weighed by the
    number of words in the cell. Beyond the path it says how many choices there are.
    """

    class Open(Exception):
        pass

    def __init__(self, path, cells=()):
        self.path, self.cells, self.weight = list(path), cells, Fraction(1)

    def choose(self, options):
        if not self.path:
            raise Branch.Open(options)
        return self.path.pop(0)

    def below(self, bound, n):
        assert n == 1
        if bound == 1:
            return np.zeros(1, np.uint64)
        self.weight /= bound
        return np.array([self.choose(bound)], np.uint64)

    def words(self, n):
        assert n == 1
        word, count = self.cells[self.choose(len(self.cells))]
        self.weight *= Fraction(count, 2**64)
        return np.array([word], np.uint64)


def enumerate_branches(sample, least, cells=()):
    """Return {outcome: exact probability}, leaving paths below a probability of `least`."""
    found, paths = {}, [()]
    while paths:
        path = paths.pop()
        source = Branch(path, cells)
        try:
            outcome = sample(source)
        except Branch.Open as more:
            if source.weight >= least * more.args[0]:
                paths += [(*path, choice) for choice in range(more.args[0])]
            continue
        found[outcome] = found.get(outcome, Fraction(0)) + source.weight
    return found


@pytest.mark.parametrize("exponent", ["0", "1/4", "2/3", "1", "4/3", "5/2"])
def test_bernoulli_exp_is_exact_in_every_branch(exponent):
    exponent = Fraction(exponent)

    def sample(source):
        top = np.array([exponent.numerator], np.uint64)
        return bool(bernoulli_exp(top, exponent.denominator, source)[0])

    found = enumerate_branches(sample, 1e-8)
    assert sum(found.values()) > 1 - Fraction(1, 10**4)
    low, high = found.get(True, 0), 1 - found.get(False, 0)
    assert float(low) <= math.exp(-exponent) <= float(high)


@pytest.mark.parametrize(
    "law",
    [
        Law("gaussian", Fraction(3, 2), 1),
        Law("gaussian", Fraction(5, 2), 2),
        Law("laplace", Fraction(3, 2), 1),
        Law("laplace", Fraction(5, 3), 2),
    ],
    ids=str,
)
def test_the_sampler_is_exact_in_every_branch(law):
    table = np.array(cumulative(law, 63), np.uint64)
    edges = [-1, *(int(word) for word in table)]
    cells = [
        ((low + 1) << 1 | sign, high - low - 1)  # its words, less the one on the boundary
        for low, high in zip(edges, edges[1:], strict=False)
        if high - low > 2**40  # leaves out less than 2^-20 of all
        for sign in (0, 1)
    ]

    def sample(source):
        kept = module._some(law, table, 1, source)
        return int(kept[0]) if kept.size else None

    found = enumerate_branches(sample, 1e-8, cells)
    lost = 1 - sum(found.values())  # in boundaries, tails and long paths
    assert lost < Fraction(1, 2000)
    whole = 1 - found.pop(None)  # kept, or in a path not followed
    width = max(found)
    for x, wanted in zip(
        range(-width, width + 1), exact_pmf(law.kind, law.scale, width), strict=True
    ):
        low, high = found[x] / whole, (found[x] + lost) / (whole - lost)
        assert float(low) <= wanted * (1 + 1e-12)
        assert wanted <= float(high) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("gaussian", Fraction(1, 4)),
        ("gaussian", Fraction(2)),
        ("gaussian", Fraction(1234, 7)),
        ("gaussian", Fraction(90_000)),  # a table of every second integer
        ("laplace", Fraction(1, 2)),
        ("laplace", Fraction(22, 7)),
        ("laplace", Fraction(150)),  # of every eighth
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_exact_law(kind, scale):
    samples = DiscreteNoise(insecure_seed=11).sample(kind, scale, (200_000,))
    assert p_value(samples, kind, scale) > 1e-4
    pairs = np.corrcoef(samples[:-1], samples[1:])[0, 1]
    assert abs(pairs) < 5 / math.sqrt(samples.size)


def test_the_frequency_test_can_fail():
    generator = np.random.default_rng(0)
    rounded = np.rint(generator.normal(0, math.sqrt(2), 200_000)).astype(np.int64)
    assert p_value(rounded, "gaussian", Fraction(2)) < 1e-4


def test_a_wide_law_has_its_moments():
    scale = Fraction(20_000_000)
    samples = discrete_gaussian(scale, 200_000, insecure_seed=1)
    assert samples.var() == pytest.approx(2e7, rel=0.02)
    assert abs(samples.mean()) < 5 * math.sqrt(2e7 / 200_000)
    assert len(np.unique(samples % 64)) == 64  # the fine part reaches every residue
    assert stats.kstest((samples + 0.5) / math.sqrt(2e7), "norm").pvalue > 1e-4
    wide = discrete_laplace(Fraction(10**6), 200_000, insecure_seed=2)
    assert np.abs(wide).mean() == pytest.approx(1e6, rel=0.02)


@pytest.mark.parametrize("coefficient", ["1/2", "2", "1/50"])
def test_exact_choice_has_the_probabilities_of_a_softmax(coefficient):
    coefficient = Fraction(coefficient)
    scores = np.array([3, 7, 7, 5, 0, 6], np.int64)
    source = BitSource(insecure_seed=3)
    draws = [exponential(scores, coefficient, source) for _ in range(6000)]
    weights = np.exp(float(coefficient) * (scores - 7.0))
    expected = 6000 * weights / weights.sum()
    observed = np.bincount(draws, minlength=6)
    few = expected < 10
    merged = [np.append(v[~few], v[few].sum()) if few.any() else v for v in (observed, expected)]
    assert stats.chisquare(*merged).pvalue > 1e-4


def test_choice_between_far_scores_needs_no_luck():
    scores = np.array([0, 2**37, 5], np.int64)
    assert exponential(scores, Fraction(1), BitSource()) == 1
    with pytest.raises(ValueError, match="coefficient must have fewer digits"):
        exponential(scores, Fraction(2**27 - 1, 2**5), BitSource())
    with pytest.raises(ValueError, match="scores must not be empty"):
        exponential(scores[:0], Fraction(1), BitSource())


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 2**62 + 1, 2**63])
def test_integers_below_a_bound_are_uniform_to_the_last_word(bound):
    rounds = 2**64 // bound
    last = rounds * bound - 1  # accepted; the next word is not
    source = BitSource()
    given = Script(last, min(last + 1, 2**64 - 1), 5)
    source.words = given.words
    assert source.below(bound, 1)[0] == last % bound
    wanted = 5 % bound if last + 1 < 2**64 else (2**64 - 1) % bound
    assert source.below(bound, 1)[0] == wanted


def test_a_seed_repeats_resumes_and_warns():
    with pytest.warns(UserWarning, match="protects nobody"):
        one = DiscreteNoise(insecure_seed=5)
    two = DiscreteNoise(insecure_seed=5)
    first = one.sample("gaussian", Fraction(70_000), (1000,))
    state = one.state()
    rest = one.sample("laplace", Fraction(3), (1000,))
    assert np.array_equal(two.sample("gaussian", Fraction(70_000), (1000,)), first)
    three = DiscreteNoise(insecure_seed=5)
    three.load(state)
    assert np.array_equal(three.sample("laplace", Fraction(3), (1000,)), rest)
    assert repr(one) == "DiscreteNoise(insecure_seed=5)"
    with pytest.raises(ValueError, match="insecure_seed must be that of the saved source, 5, got"):
        DiscreteNoise().load(state)


def test_by_default_bits_come_from_the_system(monkeypatch):
    asked = []
    monkeypatch.setattr(
        module.os, "urandom", lambda n: asked.append(n) or np.random.default_rng(n).bytes(n)
    )
    noise = DiscreteNoise()
    assert noise.sample("gaussian", Fraction(4), (3, 2)).shape == (3, 2)
    assert sum(asked) >= 48
    assert noise.state() is None
    assert repr(noise) == "DiscreteNoise()"


@pytest.mark.parametrize("file", [module, law, device_noise], ids=lambda file: file.__name__)
def test_no_float_is_in_the_samplers(file):
    for node in ast.walk(ast.parse(open(file.__file__).read())):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float | complex))
        assert not isinstance(node, ast.Div)
        assert not (isinstance(node, ast.Name) and node.id in ("float", "math"))
        assert not (isinstance(node, ast.Attribute) and "float" in node.attr)


@pytest.mark.parametrize(
    ("kind", "scale", "error", "message"),
    [
        ("gaussian", 2.0, TypeError, "scale must be an int or a Fraction, got float"),
        ("gaussian", Fraction(0), ValueError, "scale must be > 0"),
        ("laplace", -1, ValueError, "scale must be > 0, got -1"),
        ("cauchy", 1, ValueError, "kind must be one of 'gaussian', 'laplace', got 'cauchy'"),
        ("gaussian", Fraction(2**61 + 1, 2), ValueError, "numerator below 2\\^61"),
    ],
)
def test_bad_scales_are_named(kind, scale, error, message):
    with pytest.raises(error, match=message):
        DiscreteNoise().sample(kind, scale, (1,))


@pytest.mark.parametrize("draw", [discrete_gaussian, discrete_laplace])
def test_bad_shapes_are_named(draw):
    for shape in (-3, (2, -1)):
        with pytest.raises(ValueError, match=f"{draw.__name__}: shape must be >= 0, got -"):
            draw(2, shape)
    for shape in (2.5, "ab", (True,)):
        with pytest.raises(TypeError, match=f"{draw.__name__}: shape must be an integer, got"):
            draw(2, shape)
    assert draw(2, (0, 3)).shape == (0, 3)
    assert draw(2, np.int64(4)).shape == (4,)


def test_scales_are_rounded_up_to_few_digits():
    for value in (Fraction(1, 3), Fraction(10**9 + 7), Fraction(22, 7), Fraction(1, 10**12)):
        rounded = round_up(value)
        assert value <= rounded <= value * (1 + Fraction(1, 2**23))
        odd = rounded.numerator // (rounded.numerator & -rounded.numerator)
        assert odd < 2**24
        assert rounded.denominator & (rounded.denominator - 1) == 0
    assert round_up(Fraction(1 << 40)) == 1 << 40

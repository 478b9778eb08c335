# SPDX-License-Identifier: Apache-2.0
"""The device's sampler word by word against the exact tables; its kernel is in test_chacha."""

import bisect
from fractions import Fraction

import numpy as np
import pytest
import torch
from exact_laws import Script, exact_pmf, p_value

from batchery.privacy import Budget, DiscreteNoise, MaxSum, TreeCounter, device_noise
from batchery.privacy import noise as module
from batchery.privacy.device_noise import can_draw, draw_on, invert_
from batchery.privacy.law import Law, cumulative, resolve
from batchery.privacy.noise import BitSource

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")

LAWS = [
    Law("gaussian", Fraction(1, 10), 1, halved=True),
    Law("gaussian", Fraction(5, 2), 1, halved=True),
    Law("gaussian", Fraction(100**2), 1, halved=True),
    Law("laplace", Fraction(1, 3), 1, halved=True),
    Law("laplace", Fraction(20), 1, halved=True),
]


def as_words(values, device="cpu"):
    """Words given as integers below 2^64."""
    return torch.from_numpy(np.array(values, np.uint64).view(np.int64)).to(device)


def signed(k, word):
    return -k if word & 1 else k


@pytest.fixture(
    params=[pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")]
)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def on_device(device, monkeypatch):
    """A device that `DiscreteNoise` draws on; for the CPU, words are the system's.

    Noise drawn any other way is an error.
    """

    def drawn_elsewhere(*_):
        raise AssertionError

    monkeypatch.setattr(module, "draw", drawn_elsewhere)
    if device.type == "cpu":
        monkeypatch.setattr(module, "can_draw", lambda law, device: True)
        monkeypatch.setattr(
            device_noise,
            "random_words",
            lambda n, device: torch.from_numpy(BitSource().words(n).view(np.int64).copy()),
        )
    return device


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_words_become_what_the_table_says(law, device):
    table = cumulative(law, 63)
    uniform = np.random.default_rng(0).integers(0, 2**63 - 1, 3000).tolist()
    uniform += [0, 1, 2**62, 2**63 - 2]
    uniform += [entry + step for entry in table for step in (-1, 1) if 0 <= entry + step < 2**63]
    words = [u << 1 | sign for u in uniform if u not in set(table) for sign in (0, 1)]
    wanted = [signed(resolve(law, word >> 1, 63, Script()), word) for word in words]
    assert invert_(as_words(words, device), law, Script()).tolist() == wanted
    assert {0, 1, -1} <= set(wanted)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_word_that_equals_an_entry_is_decided_by_further_bits(law, device):
    table, long = cumulative(law, 63), cumulative(law, 127)
    words, more, wanted = [0], [], [0]
    assert table[0] > 0  # 0 is no entry
    for k, entry in enumerate(table):
        rest = long[k] - (entry << 64)
        for further, sign in ((0, 0), (2**64 - 1, 1), (rest - 1, 0), (rest + 1, 1)):
            if 0 <= further < 2**64 and entry << 64 | further not in (long[k], long[-1]):
                words += [entry << 1 | sign, 2]
                more.append(further)
                wanted.append(signed(bisect.bisect_right(long, entry << 64 | further), sign))
                wanted.append(0)  # of the word 2, so that ties are not side by side
    source = Script(*more)
    assert invert_(as_words(words, device), law, source).tolist() == wanted
    assert source.prepared == []
    assert len(more) >= 2 * len(table)


def test_the_last_words_end_in_the_tail(device):
    law = LAWS[1]
    table, long = cumulative(law, 63), cumulative(law, 127)
    found = invert_(as_words([2**64 - 1, 2**64 - 2], device), law, Script(2**64 - 2, 0))
    first, second = found.tolist()
    assert -first == bisect.bisect_right(long, 2**127 - 2) >= len(table)
    assert second == bisect.bisect_right(long, (2**63 - 1) << 64)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_cells_of_the_table_are_the_probabilities(law):
    table = [0, *cumulative(law, 63)]
    cells = [above - below for below, above in zip(table, table[1:], strict=False)]
    width = len(cells) - 1
    exact = exact_pmf(law.kind, law.scale, width)
    for k, words in enumerate(cells):
        wanted = exact[width + k]
        found = words / 2**63 if k == 0 else words / 2**64  # with both signs, or one
        assert found == pytest.approx(wanted, rel=1e-12, abs=2**-62)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("gaussian", Fraction(1, 4)),
        ("gaussian", Fraction(1234, 7)),
        ("gaussian", Fraction(90_000)),  # on the CPU a table of every second integer
        ("laplace", Fraction(22, 7)),
        ("laplace", Fraction(150)),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_exact_law(kind, scale):
    words = np.random.default_rng(1).integers(0, 2**64, 200_000, np.uint64)
    law = Law(kind, scale, 1, halved=True)
    samples = invert_(as_words(words), law, BitSource()).numpy()
    assert p_value(samples, kind, scale) > 1e-4


def test_a_table_that_is_not_halved_has_too_many_zeros():
    words = np.random.default_rng(1).integers(0, 2**64, 200_000, np.uint64)
    samples = invert_(as_words(words), Law("gaussian", Fraction(7), 1), BitSource()).numpy()
    assert p_value(samples, "gaussian", Fraction(7)) < 1e-4


@pytest.mark.parametrize(("kind", "scale"), [("gaussian", 7), ("laplace", 20)])
def test_noise_of_the_cipher_has_the_exact_law(kind, scale, kernel_device):
    n = 2_000_000 if kernel_device.type == "cuda" else 5000
    law = Law(kind, Fraction(scale), 1)
    samples = draw_on(kernel_device, law, (n,), BitSource())
    assert samples.device.type == kernel_device.type
    assert p_value(samples.cpu().numpy(), kind, Fraction(scale)) > 1e-6  # it has no seed


@pytest.mark.gpu
@pytest.mark.parametrize("sigma", [100, 4096])
def test_a_large_draw_on_the_device_has_the_exact_law(sigma):
    samples = DiscreteNoise(device="cuda").sample("gaussian", Fraction(sigma**2), (5, 1_000_000))
    assert samples.is_cuda
    assert samples.dtype == torch.int64
    samples = samples.cpu().numpy().ravel()
    if sigma == 100:
        assert p_value(samples, "gaussian", Fraction(sigma**2)) > 1e-6
    assert samples.var() == pytest.approx(sigma**2, rel=0.005)
    assert abs(samples.mean()) < 6 * sigma / samples.size**0.5
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 6 / samples.size**0.5


def test_pieces_are_one_draw(on_device, monkeypatch):
    noise = DiscreteNoise(device=on_device)
    words = as_words(np.random.default_rng(2).integers(0, 2**64, 1000, np.uint64), on_device)
    monkeypatch.setattr(device_noise, "random_words", lambda n, device: words[:n].clone())
    whole = noise.sample("gaussian", Fraction(50), (10, 100))
    monkeypatch.setattr(device_noise, "_CHUNK", 64)
    assert torch.equal(noise.sample("gaussian", Fraction(50), (10, 100)), whole)
    assert noise.sample("gaussian", Fraction(50), (0, 3)).shape == (0, 3)
    assert noise.sample("gaussian", 50, ()).shape == ()


def test_a_counter_draws_on_its_device(on_device):
    counter = TreeCounter(64, 2000, budget=Budget(rho=0.5), device=on_device)
    rows = torch.arange(2000).expand(40, -1)
    releases = counter.update_many(rows)
    assert releases.device.type == on_device.type
    noise = releases.cpu() - torch.arange(1, 41)[:, None] * rows
    assert p_value(noise[0].numpy(), "gaussian", Fraction(7)) > 1e-6
    for t in (8, 39):  # as many nodes as t has bits
        assert noise[t - 1].double().var() == pytest.approx(7 * t.bit_count(), rel=0.25)
    state = counter.state_dict()
    again = TreeCounter(64, 2000, budget=Budget(rho=0.5), device=on_device)
    again.load_state_dict(state)
    assert state["noise"] is None
    assert torch.equal(again.last(), releases[-1])
    both = [c.update(rows[0]).cpu() - 41 * rows[0] for c in (counter, again)]
    assert not torch.equal(*both)  # row 41 is a leaf of its own, not yet drawn


def test_other_mechanisms_draw_there_too(on_device):
    pure = TreeCounter(64, 500, budget=Budget.pure(1.0), device=on_device)
    assert pure.update(torch.zeros(500, dtype=torch.int64)).abs().sum() > 0
    for mechanism in ("recompute", "sparse", "tree"):
        maximum = MaxSum(64, 3, budget=Budget(rho=50.0), mechanism=mechanism, device=on_device)
        releases = maximum.update_many(torch.ones(64, 3, dtype=torch.int64))
        assert 0 < int(releases[-1]) < 100


@pytest.mark.parametrize(
    ("kind", "scale", "wanted"),
    [
        ("gaussian", Fraction(1, 10), True),
        ("gaussian", Fraction(4096**2), True),
        ("gaussian", Fraction(4096**2 + 1), False),
        ("laplace", Fraction(512), True),
        ("laplace", Fraction(1025, 2), False),
    ],
)
def test_what_is_drawn_on_a_device(kind, scale, wanted, monkeypatch):
    law = module.law_of(kind, scale)
    assert can_draw(law, torch.device("cuda", 1)) == wanted
    assert not can_draw(law, torch.device("cpu"))
    monkeypatch.setattr(device_noise, "triton", None)
    assert not can_draw(law, torch.device("cuda"))


def test_noise_with_a_seed_is_the_same_everywhere(device, monkeypatch):
    monkeypatch.setattr(module, "can_draw", lambda law, device: True)
    wanted = DiscreteNoise(insecure_seed=5).sample("gaussian", Fraction(9), (2, 50))
    noise = DiscreteNoise(device=device, insecure_seed=5)
    found = noise.sample("gaussian", Fraction(9), (2, 50))
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), torch.from_numpy(wanted))
    assert repr(noise) == f"DiscreteNoise(device='{device}', insecure_seed=5)"
    assert noise.state() == {"insecure_seed": 5, "used": noise.source.state()["used"]}


@pytest.mark.gpu
def test_wide_noise_is_drawn_on_the_cpu_and_moved(monkeypatch):
    monkeypatch.setattr(module, "draw_on", None)  # not to be called
    samples = DiscreteNoise(device="cuda").sample("gaussian", Fraction(10**10), (1000,))
    assert samples.is_cuda
    assert 0.7 < samples.double().var() / 1e10 < 1.4


def test_bad_scales_are_named_on_a_device_too(on_device):
    with pytest.raises(TypeError, match="scale must be an int or a Fraction, got float"):
        DiscreteNoise(device=on_device).sample("gaussian", 2.0, (1,))
    with pytest.raises(ValueError, match="scale must be > 0"):
        DiscreteNoise(device=on_device).sample("laplace", Fraction(-1), (1,))

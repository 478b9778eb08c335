# SPDX-License-Identifier: Apache-2.0
"""Noise from the system, exact or float, is drawn for one run: copies and forks have their own.

Two runs with the same noise and different rows would show the difference of the rows.
"""

import copy
import os
import pickle

import pytest
import torch

from batchery.privacy import (
    Budget,
    FactorizationCounter,
    FloatNoise,
    Ledger,
    MaxSum,
    SumSelect,
    TreeCounter,
)
from batchery.privacy.saved_state import state_from_bytes, state_to_bytes

LITTLE = Budget(rho=1e-6)  # so that integers of noise are some thousands, and are not equal
COLUMNS = 8
RUNS = {
    "tree": lambda: TreeCounter(100, COLUMNS, budget=LITTLE),
    "float tree": lambda: TreeCounter(100, COLUMNS, budget=LITTLE, sampler="float"),
    "honaker": lambda: TreeCounter(
        100, COLUMNS, budget=LITTLE, sampler="float", estimator="honaker"
    ),
    "endless": lambda: TreeCounter(None, COLUMNS, budget=LITTLE, sampler="float"),
    "sqrt": lambda: FactorizationCounter(100, COLUMNS, budget=LITTLE, strategy="sqrt"),
    "blt": lambda: FactorizationCounter(100, COLUMNS, budget=LITTLE, strategy="blt"),
    "max": lambda: maximum("recompute", interval=1),
    "max sqrt": lambda: maximum("sqrt"),
    "select sqrt": lambda: SumSelect(
        100, COLUMNS, budget=LITTLE, sampler="float", mechanism="sqrt"
    ),
}
each = pytest.mark.parametrize("name", RUNS)
ROWS = torch.zeros(20, COLUMNS, dtype=torch.int64)


def maximum(mechanism, **kinds):
    kinds = {"sampler": "float", "consistent": False, **kinds}
    return MaxSum(100, COLUMNS, budget=LITTLE, mechanism=mechanism, **kinds)


def begun(name):
    mechanism = RUNS[name]()
    mechanism.update_many(ROWS[:3])
    return mechanism


def through_pickle(mechanism):
    return pickle.loads(pickle.dumps(mechanism))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@each
def test_a_copy_draws_its_own_noise(name, copied):
    mechanism = begun(name)
    other = copied(mechanism)
    assert torch.equal(torch.as_tensor(mechanism.last()), torch.as_tensor(other.last()))
    assert not torch.equal(mechanism.update_many(ROWS), other.update_many(ROWS))


@each
def test_a_fork_draws_its_own_noise(name):
    mechanism = begun(name)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, state_to_bytes({"found": mechanism.update_many(ROWS)}))
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        theirs = state_from_bytes(pipe.read())["found"]
    assert not torch.equal(mechanism.update_many(ROWS), theirs)


@each
def test_what_is_released_again_has_other_noise(name):
    mechanism = begun(name)
    state = state_from_bytes(state_to_bytes(mechanism.state_dict()))
    wanted = mechanism.update_many(ROWS)
    for strict in (False, True):
        other = RUNS[name]()
        other.resume(state, published=3 if strict else 23, strict=strict)
        assert not torch.equal(other.update_many(ROWS), wanted)
    mechanism.load_state_dict(state)  # the run itself, gone back
    assert not torch.equal(mechanism.update_many(ROWS), wanted)


def test_an_old_copy_of_a_ledger_has_other_noise(path):
    found = []
    with Ledger(path) as ledger, ledger.open("x", RUNS["sqrt"]()) as stream:
        stream.update(ROWS[0])
    old = path.read_bytes()
    for _ in range(2):
        path.write_bytes(old)
        with Ledger(path) as ledger, ledger.open("x", RUNS["sqrt"]()) as stream:
            found.append(stream.update(ROWS[0]).value)
    assert found[0] != found[1]


def test_noise_alone_is_copied_afresh_and_in_a_state_only_with_its_generator():
    law = ("gaussian", 4, (5,))
    noise = FloatNoise(dtype=torch.float32)
    for other in (copy.deepcopy(noise), through_pickle(noise)):
        assert other.dtype == torch.float32
        assert not torch.equal(noise.sample(*law), other.sample(*law))
    assert noise.state() is None
    given = FloatNoise(torch.Generator().manual_seed(1))
    assert torch.equal(copy.deepcopy(given).sample(*law), through_pickle(given).sample(*law))
    for to, state in ((noise, given.state()), (given, None)):
        with pytest.raises(ValueError, match="FloatNoise: generator must be given .* saved noise"):
            to.load(state)

# SPDX-License-Identifier: Apache-2.0
"""Noise from the system, exact or float, is drawn for one run: copies and forks have their own.

Nor do threads share it, or replays of a CUDA graph.

Two runs with the same noise and different rows would show the difference of the rows.
"""

import copy
import os
import pickle
import threading
import time
from contextlib import nullcontext

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


@pytest.mark.parametrize("same_pid", [False, True])
@each
def test_a_fork_draws_its_own_noise(name, same_pid):
    mechanism = begun(name)
    parent = os.getpid()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if same_pid:  # as in a namespace of its own
            os.getpid = lambda: parent
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


BUSY = "TreeCounter: is being updated already, by another thread or in its own commit"


def test_threads_that_update_at_once_are_refused_and_share_no_noise(monkeypatch):
    mechanism = RUNS["tree"]()
    together = threading.Barrier(4)
    released, refused = [], []

    def slow(function):
        def slowed():
            result = function()
            time.sleep(1e-3)  # where others go on
            return result

        return slowed

    def work():
        together.wait()
        for _ in range(25):
            try:
                release = mechanism.update(ROWS[0], commit=lambda state: None)
                released.append(tuple(release.tolist()))
            except RuntimeError as error:
                refused.append(str(error))

    for owner, name in ((mechanism, "state_dict"), (mechanism._sum.noise, "step")):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(released) == len(set(released)) == mechanism.t > 0
    assert set(refused) == {BUSY}


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_an_update_within_an_update_is_refused_and_a_copy_made_there_goes_on(copied):
    mechanism = copied(begun("tree"))
    for within in (lambda _: mechanism.update(ROWS[0]), lambda _: mechanism.update_many(ROWS)):
        with pytest.raises(RuntimeError, match=BUSY):
            mechanism.update(ROWS[0], commit=within)
        assert mechanism.t == 3
    copies = []
    mechanism.update(ROWS[0], commit=lambda _: copies.append(copied(mechanism)))
    copies[0].update(ROWS[0])
    assert (mechanism.t, copies[0].t) == (4, 5)


def pretend_to_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)


def test_an_update_on_a_device_that_captures_is_refused_and_leaves_no_trace(monkeypatch):
    mechanism = begun("tree")
    pretend_to_capture(monkeypatch)
    mechanism.update(ROWS[0])  # on the CPU nothing is captured
    state = mechanism.state_dict()
    mechanism.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="TreeCounter: must not be captured in a CUDA graph"):
        mechanism._advance(1, None, None)
    assert mechanism.t == 4
    assert torch.equal(mechanism.last(), state["inner"]["total"] + mechanism._sum.noise.last())


@pytest.mark.gpu
def test_no_graph_is_captured_of_an_update():
    mechanism = TreeCounter(100, COLUMNS, budget=LITTLE, device="cuda")
    row = ROWS[0].cuda()
    first = mechanism.update(row)  # draws a block of noise, whose next row needs no more

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            row.zero_()  # a graph of nothing warns
            mechanism.update(row)

    with pytest.raises(RuntimeError, match="TreeCounter: must not be captured in a CUDA graph"):
        capture()
    assert mechanism.t == 1
    assert torch.equal(mechanism.last(), first)
    assert not torch.equal(mechanism.update(row), first)

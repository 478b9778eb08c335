# SPDX-License-Identifier: Apache-2.0
"""What every private mechanism owes. Broken ones at the end show that the suite can fail."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from dist_ranks import run_on_ranks

from batchery.privacy import FloatNoise, HorizonExceeded, OnOneRank, TreeCounter
from batchery.privacy.column_mechanism import ColumnMechanism
from batchery.privacy.mechanism import Mechanism

from .cases import CASES, _tree, global_randomness, objects

MECHANISMS = [CASES[path] for path in objects("mechanism") if path in CASES]
every = pytest.mark.parametrize("case", MECHANISMS, ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
HORIZON, COLUMNS = 20, 3


def rows(n=HORIZON, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n, COLUMNS), generator=generator)


def single(mechanism, stream):
    return torch.stack([torch.as_tensor(mechanism.update(row)) for row in stream])


def written(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a, b):
    """Whether two states are equal, tensors within them too."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def check_resume(build, at):
    """A mechanism loaded in mid-run goes on with the noise of the first, drawing none again."""
    stream = rows()
    wanted = single(build(), stream)
    first = build()
    single(first, stream[:at])
    again = build(seed=2)  # its own noise must not come through
    if again.sampler == "discrete":  # a seeded source tells that it is another, and refuses
        again = build()
        single(again, stream[:3])
    again.load_state_dict(written(first.state_dict()))
    assert again.t == at
    assert torch.equal(torch.as_tensor(again.last()), wanted[at - 1])
    assert torch.equal(single(again, stream[at:]), wanted[at:])


def check_looks(build):
    """The last release is shown again as it was."""
    mechanism = build()
    assert mechanism.last() is None
    for row in rows():
        release = torch.as_tensor(mechanism.update(row)).clone()
        for _ in range(3):
            assert torch.equal(torch.as_tensor(mechanism.last()), release)


@every
def test_it_is_a_mechanism(case):
    mechanism = case.build()
    assert isinstance(mechanism, Mechanism)
    assert mechanism.horizon == HORIZON
    assert mechanism.t == 0


@every
@pytest.mark.parametrize("at", [1, 2, 7, 8, 19])
def test_resumes_in_mid_run_bit_for_bit_with_the_same_noise(case, at):
    check_resume(case.build, at)


@every
def test_a_look_at_the_last_release_draws_nothing(case):
    check_looks(case.build)


@every
@pytest.mark.parametrize("sizes", [[20], [1, 19], [7, 6, 7], [8, 8, 4]], ids=str)
def test_many_rows_at_once_are_single_rows(case, sizes):
    wanted = single(case.build(), rows())
    mechanism = case.build()
    found = torch.cat([mechanism.update_many(part) for part in rows().split(sizes)])
    assert torch.equal(found, wanted)
    assert found.dtype == wanted.dtype
    assert torch.equal(torch.as_tensor(mechanism.last()), wanted[-1])


@every
def test_the_seed_decides_and_the_system_where_there_is_none(case):
    kinds = {"horizon": 200, "interval": 1} if "interval" in settings(case) else {"horizon": 200}
    stream = rows(200)
    assert torch.equal(single(case.build(**kinds), stream), single(case.build(**kinds), stream))
    assert not torch.equal(
        single(case.build(**kinds), stream), single(case.build(**kinds, seed=2), stream)
    )
    one, two = (case.build(**kinds, seed=None) for _ in range(2))
    assert not torch.equal(single(one, stream), single(two, stream))


def settings(case):
    return inspect.signature(type(case.build())).parameters


@every
def test_leaves_global_randomness_and_its_rows_alone(case):
    before = global_randomness()
    stream = rows()
    kept = stream.clone()
    for seed in (1, None):
        mechanism = case.build(seed=seed)
        mechanism.update(stream[0])
        mechanism.update_many(stream[1:])
    assert global_randomness() == before
    assert torch.equal(stream, kept)


@every
def test_beyond_the_horizon_nothing_is_touched(case):
    mechanism = case.build()
    mechanism.update_many(rows(HORIZON - 1))
    state = written(mechanism.state_dict())
    message = f"{case.name}: 2 more after {HORIZON - 1} is beyond the horizon of {HORIZON}"
    with pytest.raises(HorizonExceeded, match=message):
        mechanism.update_many(rows(2))
    assert same(state, mechanism.state_dict())
    mechanism.update(rows()[0])
    with pytest.raises(HorizonExceeded, match=f"{case.name}: 1 more after {HORIZON}"):
        mechanism.update(rows()[0])
    assert issubclass(HorizonExceeded, ValueError)


NAN, INF = float("nan"), float("inf")
REFUSED = {  # by every mechanism
    "short": [1] * (COLUMNS - 1),
    "long": [987_654] * (COLUMNS + 4),
    "nested": [[1, 0, 0]],
    "scalar": 1,
    "empty": [],
    "ragged": [[1], [0, 1], 0],
    "text": ["1", "0", "0"],
    "none": [None, 0, 0],
    "nothing": None,
    "mapping": {"column": 1},
    "object": object(),
    "huge": [1 << 64, 0, 0],
    "nan": [NAN, 0.0, 1.0],
    "infinite": [0.0, INF, 1.0],
    "complex": [1j, 0, 1],
}
REFUSED_IN_PART = {
    "half": [0.5, 0.0, 1.0],  # where rows are integers
    "negative": [-1, 0, 1],  # where they are bits
    "two": [0, 987_654, 1],
    "most": [0, 255, 1],
    "crowd": [1, 1, 0],  # where a row has one bit
}
FLOAT = {"sampler": "float"}
SHORT = {**FLOAT, "dtype": torch.float32}
VARIANTS = {  # every way to release, beside those of the cases
    "TreeCounter": [
        {"estimator": "honaker"},
        {"clip": "linf", "row_sensitivity": 9},
        {"horizon": None},
        SHORT,
    ],
    "FactorizationCounter": [
        {"strategy": "sqrt"},
        {"strategy": "banded", "bands": 3},
        {"strategy": "blt"},
        {"clip": "l2", "row_sensitivity": 9.0},
        {"horizon": None},
        {"dtype": torch.float32},
    ],
    "MaxSum": [{"mechanism": name} for name in ("tree", "sparse", "constant")]
    + [{"mechanism": "sqrt", **FLOAT}, {"horizon": None}, {"mechanism": "tree", "max_ones": 1}],
    "SumSelect": [{"mechanism": name} for name in ("tree", "constant")]
    + [{"mechanism": "sqrt", **FLOAT}, {"horizon": None}, {"mechanism": "tree", "max_ones": 1}],
}
EACH = [(case, kinds) for case in MECHANISMS for kinds in ({}, *VARIANTS[case.name])]
each_way = pytest.mark.parametrize(
    ("case", "kinds"), EACH, ids=[f"{case.name}-{kinds}" for case, kinds in EACH]
)


def built(case, kinds):
    """A mechanism with seeded noise of the kind that its sampler has."""
    seeded = FloatNoise(torch.Generator().manual_seed(1)) if "sampler" in kinds else None
    return case.build(**kinds, **({"noise": seeded} if seeded else {}))


def few(n=6):
    """Rows that every mechanism takes."""
    return torch.eye(COLUMNS, dtype=torch.int64).repeat(n, 1)[:n]


def refused_by(mechanism):
    found = dict(REFUSED)
    if mechanism.sampler == "discrete":
        found["half"] = REFUSED_IN_PART["half"]
    if isinstance(mechanism, ColumnMechanism):
        found |= {name: REFUSED_IN_PART[name] for name in ("half", "negative", "two", "most")}
        if mechanism.max_ones == 1:
            found["crowd"] = REFUSED_IN_PART["crowd"]
    return found


@each_way
def test_what_is_refused_leaves_no_trace_in_state_or_noise_and_shows_no_values(case, kinds):
    mechanism, other = built(case, kinds), built(case, kinds)
    for each in (mechanism, other):
        each.update(few()[0])
    state = written(mechanism.state_dict())
    for name, row in refused_by(mechanism).items():
        before = few(2).tolist()
        for call, given in ((mechanism.update, row), (mechanism.update_many, [*before, row])):
            message = rf"^{case.name}: rows? (\d+ )?must (hold|have) "
            with pytest.raises((TypeError, ValueError), match=message) as error:
                call(given)
            assert "987654" not in str(error.value), name
            assert same(state, mechanism.state_dict()), name
    # Rows that a sum of another kind could stumble over are taken, and their gradients left.
    for dtype in (torch.bool, torch.uint8, torch.uint16, torch.uint64):
        assert torch.equal(
            *(torch.as_tensor(m.update(few()[1].to(dtype))) for m in (mechanism, other))
        )
    if mechanism.sampler == "float":
        rows = few().double().requires_grad_()
        found = mechanism.update_many(rows)
        assert not found.requires_grad
        assert torch.equal(found, other.update_many(few()))
    assert torch.equal(mechanism.update_many(few()), other.update_many(few()))


@every
def test_spending_grows_to_the_budget_and_no_further(case):
    mechanism = case.build()
    spent = [mechanism.spent.rho]
    for row in rows():
        mechanism.update(row)
        spent.append(mechanism.spent.rho)
    assert spent == sorted(spent)
    assert spent[0] == 0
    assert spent[-1] == pytest.approx(mechanism.budget.rho, rel=1e-12)


@every
def test_bounds_are_finite_and_wider_where_more_certain(case):
    mechanism = case.build()
    bounds = [mechanism.error_bound(beta) for beta in (0.5, 0.05, 1e-9)]
    assert all(0 < bound < math.inf for bound in bounds)
    assert bounds == sorted(bounds)
    with pytest.raises(ValueError, match=f"{case.name}: beta must be > 0 and < 1, got 0"):
        mechanism.error_bound(0)


@each_way
def test_the_squared_error_that_is_expected_is_a_number_or_none(case, kinds):
    mechanism = built(case, kinds)
    found = mechanism.expected_squared_error()
    choice = case.name == "SumSelect" and mechanism.mechanism == "recompute"
    if choice or kinds.get("mechanism") in ("sparse", "constant"):
        assert found is None
    else:
        assert 0 < found < math.inf
        assert found <= mechanism.plan["sigma"] ** 2 * (1 + 1e-12)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
@each_way
def test_a_copy_with_seeded_noise_goes_on_like_the_original(case, kinds, copied):
    mechanism = built(case, kinds)
    single(mechanism, few(7))
    other = copied(mechanism)
    assert torch.equal(single(mechanism, few(9)), single(other, few(9)))


@every
def test_repr_names_it_and_warns_of_noise_that_is_not_its_own(case):
    text = repr(case.build(seed=None))
    assert text.startswith(f"{case.name}({HORIZON}, ")
    assert "budget=Budget(rho=0.5)" in text
    assert "WARNING" not in text
    assert "WARNING: injected noise, not private" in repr(case.build())


@every
def test_bad_arguments_are_named(case):
    assert case.bad
    for kinds, error, message in case.bad:
        with pytest.raises(error, match=message):
            case.build(**kinds)


@every
def test_its_page_says_what_it_takes_and_raises(case):
    doc = inspect.getdoc(type(case.build()))
    assert "Args:" in doc
    assert "Raises:" in doc
    assert ">>>" in doc
    named = [name for name in settings(case) if name != "self"]
    assert [name for name in named if f"{name}:" not in doc] == []


def _on_rank(rank, size, path):
    private = OnOneRank(CASES[path].build() if rank == 0 else None)
    before = global_randomness()
    # Each rank holds its part of every row: here, the columns of its own.
    part = torch.arange(COLUMNS) % size == rank
    found = [torch.as_tensor(private.update(row * part)) for row in rows()]
    assert global_randomness() == before
    return torch.stack(found)


@every
@pytest.mark.dist
def test_two_ranks_with_one_mechanism_release_what_one_process_does(case):
    wanted = single(case.build(), rows())
    for found in run_on_ranks(_on_rank, case.path):
        assert torch.equal(found, wanted)


class Forgetful(TreeCounter):
    """Broken on purpose: after a resume its noise begins again."""

    def load_state_dict(self, state):
        state = {**state, "inner": {**state["inner"], "noise": {**state["inner"]["noise"]}}}
        state["inner"]["noise"]["rows"] = {}
        super().load_state_dict({**state, "noise": {**state["noise"], "used": 0}})


class Redrawing(TreeCounter):
    """Broken on purpose: every look at the last release draws new noise for it."""

    def last(self):
        shown = super().last()
        return None if shown is None else shown + self._sum.noise.rows.take(1)[0]


def broken(kind):
    def build(seed=1, **kinds):
        right = _tree(seed=seed, **kinds)
        kinds = {"budget": right.budget, "row_sensitivity": right.row_sensitivity}
        return kind(right.horizon, right.shape, noise=right.noise, **kinds)

    return build


def test_the_suite_catches_noise_that_begins_again():
    check_resume(broken(TreeCounter), 7)
    with pytest.raises(AssertionError):
        check_resume(broken(Forgetful), 7)


def test_the_suite_catches_noise_that_is_drawn_again():
    check_looks(broken(TreeCounter))
    with pytest.raises(AssertionError):
        check_looks(broken(Redrawing))

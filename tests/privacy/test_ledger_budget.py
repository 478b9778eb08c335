# SPDX-License-Identifier: Apache-2.0
"""Totals, reservations and declared parameters of a ledger."""

import math

import pytest
from ledger_streams import RHO, seeded, together
from recorded_noise import Zero

from batchery.privacy import (
    Budget,
    BudgetExceeded,
    HorizonExceeded,
    Ledger,
    MaxSum,
    SumSelect,
    TreeCounter,
    accounting,
)
from batchery.privacy.ledger import within

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")


def test_what_adds_up_to_a_total():
    third = [Budget(rho=0.1)] * 3
    assert within(Budget(rho=0.3), third)
    assert not within(Budget(rho=0.3), [*third, Budget(rho=1e-12)])
    assert within(Budget.pure(0.3), [Budget.pure(0.1), Budget.pure(0.2)])
    assert not within(Budget.pure(0.3), [Budget.pure(0.1), Budget.pure(0.21)])
    assert not within(Budget.pure(1.0), [Budget(rho=1e-9)])
    assert within(Budget(rho=0.5), [Budget.pure(1.0)])  # ε²/2
    one = Budget.approx(1.0, 1e-6)
    assert within(one, [Budget(one.rho)])
    # One continuous Gaussian mechanism may have the whole of the exact line; another beside, none.
    assert within(one, [one.for_gaussian()])
    assert one.for_gaussian().rho > one.rho
    assert not within(one, [one.for_gaussian(), Budget(rho=1e-9, gaussian=True)])
    assert not within(one, [one.for_gaussian().share(0.99), Budget(rho=1e-9)])
    # A promise of continuous Gaussian noise is not kept by anything else.
    assert within(one.for_gaussian(), [one.for_gaussian()])
    assert not within(one.for_gaussian(), [Budget(rho=1e-9)])


@pytest.mark.parametrize(
    "build",
    [
        lambda budget: SumSelect(1000, 5, budget=budget, mechanism="recompute"),
        lambda budget: MaxSum(1000, 5, budget=budget, mechanism="sparse"),
        lambda budget: TreeCounter(1000, 5, budget=budget),
    ],
)
def test_a_total_is_not_passed_by_a_budget_that_calls_other_noise_gaussian(build, path):
    total = Budget.approx(1.0, 1e-6)
    with Ledger(path, total=total) as ledger:
        with pytest.raises(BudgetExceeded, match="stream 'x' costs"):
            ledger.open("x", build(total.for_gaussian()))
        ledger.open("x", build(Budget(total.rho, gaussian=True))).close()


def test_what_is_refused_before_it_is_a_stream_leaves_no_lock(path):
    with Ledger(path, total=Budget(rho=0.1)) as ledger:
        with pytest.raises(BudgetExceeded):
            ledger.open("x", seeded())
        with pytest.raises(ValueError, match="published must be <= 0"):
            ledger.open("x", seeded(budget=Budget(rho=0.1)), published=1)
        assert [found.name for found in path.parent.iterdir()] == ["streams.db"]
    path.unlink()
    Ledger(path).close()  # nothing was spent from the one that is gone


def test_noise_of_anothers_is_declared(path):
    with Ledger(path) as ledger:
        for first, second in ((None, Zero()), (Zero(), None)):
            name = repr(first)
            with ledger.open(name, seeded(noise=first)) as stream:
                stream.update(1)
            with pytest.raises(ValueError, match=f"injected={first is not None}, this object"):
                ledger.open(name, seeded(noise=second))
            with ledger.open(name, seeded(noise=first)) as stream:
                assert stream.t == 1
        with pytest.raises(ValueError, match=r"declared must not name .* got \['injected'\]"):
            ledger.open("y", seeded(), declared={"injected": False})


def test_a_total_is_kept_over_streams_and_reopenings(path):
    with Ledger(path, total=Budget(rho=1.0)) as ledger:
        with ledger.open("a", seeded(budget=Budget(rho=0.6))) as stream:
            stream.update(1)
        with pytest.raises(
            BudgetExceeded, match=r"stream 'b' costs Budget\(rho=0.5\); of .*rho=0.6\) is reserved"
        ):
            ledger.open("b", seeded())
        assert [account.name for account in ledger.accounts()] == ["a"]
    with Ledger(path) as ledger:
        assert ledger.total == Budget(rho=1.0)
        ledger.open("b", seeded(budget=Budget(rho=0.4)))
        with pytest.raises(BudgetExceeded):
            ledger.open("c", seeded(budget=Budget(rho=1e-9)))
        ledger.open("a", seeded(budget=Budget(rho=0.6)))  # is not reserved again
    with pytest.raises(ValueError, match=r"total must be Budget\(rho=1.0\), as .* has it, got"):
        Ledger(path, total=Budget(rho=2.0))
    with pytest.raises(TypeError, match="Ledger: total must be a Budget, got float"):
        Ledger(path, total=1.0)


def test_before_its_first_step_a_stream_is_declared_anew_and_holds_nothing_when_closed(path):
    with Ledger(path, total=Budget(rho=1.0)) as ledger:
        ledger.open("x", seeded(budget=Budget(rho=0.9)), declared={"every": 3}).close()
        (account,) = ledger.accounts()
        assert (account.reserved.rho, account.spent.rho) == (0, 0)
        with pytest.raises(BudgetExceeded, match="is reserved already"):
            ledger.open("x", seeded(budget=Budget(rho=1.1)))
        with ledger.open("y", seeded(budget=Budget(rho=0.9))):  # held, and not used
            with pytest.raises(BudgetExceeded, match=r"Budget\(rho=0.9\) is reserved already"):
                ledger.open("x", seeded(budget=Budget(rho=0.2)))
        with ledger.open("x", MaxSum(20, 3, budget=RHO), declared={"every": 4}) as stream:
            stream.update([1, 0, 1])
        assert [account.reserved.rho for account in ledger.accounts()] == [0.5, 0]
        with pytest.raises(ValueError, match="stream 'x': the saved state has every=4"):
            ledger.open("x", MaxSum(20, 3, budget=RHO), declared={"every": 5})
        with pytest.raises(BudgetExceeded):
            ledger.open("y", seeded(budget=Budget(rho=0.6)))
    with Ledger(path) as ledger, ledger.open("y", seeded()) as stream:
        assert stream.update(1) == stream.releases()[0]


def test_a_total_may_be_set_later_and_binds_whoever_has_the_ledger_open(path):
    with Ledger(path) as before:
        before.open("a", seeded()).update(1)
        with pytest.raises(BudgetExceeded, match=r"has reserved Budget\(rho=0.5\), beyond a total"):
            Ledger(path, total=Budget(rho=0.4))
        with Ledger(path) as ledger:
            assert ledger.total is None
        Ledger(path, total=Budget(rho=0.8)).close()
        with pytest.raises(BudgetExceeded, match="stream 'b' costs"):
            before.open("b", seeded())
        assert before.total == Budget(rho=0.8)
        before.open("b", seeded(budget=Budget(rho=0.3)))
    with pytest.raises(ValueError, match=r"total must be Budget\(rho=0.8\)"):
        Ledger(path, total=Budget(rho=0.9))


@pytest.mark.parametrize("towards", [0.0, math.inf])
def test_a_total_is_the_same_where_the_last_digit_of_epsilon_is_another(towards, path, monkeypatch):
    def build():
        return seeded(budget=Budget(rho=1e-3))

    mine = Budget.approx(1.0, 1e-6)
    with Ledger(path, total=mine) as ledger, ledger.open("a", build()) as stream:
        stream.update(1)
    real = accounting.zcdp_epsilon
    monkeypatch.setattr(accounting, "zcdp_epsilon", lambda *of: math.nextafter(real(*of), towards))
    other = Budget.approx(1.0, 1e-6)
    assert other.rho != mine.rho
    for total in (None, other):
        with Ledger(path, total=total) as ledger, ledger.open("a", build()) as stream:
            assert ledger.total.target == (1.0, 1e-6)
            assert stream.t == 1
    for total in (Budget.approx(1.0, 2e-6), Budget(1e-3, target=(1.0, 1e-6)), Budget(other.rho)):
        with pytest.raises(
            ValueError, match=r"total must be Budget.approx\(epsilon=1.0, delta=1e-"
        ):
            Ledger(path, total=total)


@pytest.mark.parametrize("total", [Budget.pure(1.0), Budget.approx(1.0, 1e-6)], ids=repr)
def test_totals_of_other_kinds(total, path):
    with Ledger(path, total=total) as ledger:
        ledger.open("a", seeded(budget=total))
        with pytest.raises(BudgetExceeded):
            ledger.open("b", seeded(budget=Budget.pure(0.001)))
    with Ledger(path, total=total) as ledger:
        assert ledger.total == total


def test_processes_that_reserve_at_once_stay_within_the_total(path):
    Ledger(path, total=Budget(rho=1.0)).close()

    def run(name):
        with Ledger(path) as ledger:
            ledger.open(name, seeded(budget=Budget(rho=0.3)))

    found = together([lambda name=name: run(name) for name in "abcdef"])
    assert found.count(0) == 3
    with Ledger(path) as ledger:
        assert len(ledger.accounts()) == 3


@pytest.mark.parametrize(
    ("build", "declared", "message"),
    [
        (lambda: seeded(21), {"every": 3}, "has horizon=20, this object horizon=21"),
        (lambda: seeded(20, 2), {"every": 3}, r"has shape=\[\], this object shape=\[2\]"),
        (lambda: seeded(budget=Budget(rho=0.6)), {"every": 3}, "has budget='Budget.rho=0.5"),
        (lambda: seeded(row_sensitivity=2.0), {"every": 3}, "has row_sensitivity=1.0"),
        (lambda: seeded(estimator="honaker"), {"every": 3}, "has estimator='prefix'"),
        (
            lambda: MaxSum(20, 3, budget=RHO),
            {"every": 3},
            "has class='TreeCounter', this object class='MaxSum'",
        ),
        (seeded, {"every": 4}, "has every=3, this object every=4"),
        (seeded, {}, "has no 'every'"),
        (seeded, {"every": 3, "columns": ["a"]}, "has no 'columns'"),
    ],
)
def test_other_parameters_are_refused_by_name_and_nothing_is_spent(build, declared, message, path):
    with Ledger(path) as ledger:
        with ledger.open("x", seeded(), declared={"every": 3}) as stream:
            stream.update(1)
        before = ledger.accounts()
        data = path.read_bytes()
        with pytest.raises(ValueError, match=f"stream 'x': .*{message}"):
            ledger.open("x", build(), declared=declared)
        assert ledger.accounts() == before
    assert path.read_bytes() == data
    with Ledger(path) as ledger, ledger.open("x", seeded(), declared={"every": 3}) as stream:
        assert stream.t == 1


def test_bad_rows_and_the_end_of_the_horizon_leave_the_file_as_it_is(path):
    with Ledger(path) as ledger, ledger.open("x", MaxSum(2, 3, budget=RHO)) as stream:
        stream.update([1, 0, 1])
        data = path.read_bytes()
        for bad, error in (
            ([1, 0, 777], ValueError),
            ([1, -1, 0], ValueError),
            ([1.0, math.nan, 0.0], TypeError),
            ([1, 0], ValueError),
        ):
            with pytest.raises(error) as caught:
                stream.update(bad)
            assert "777" not in str(caught.value)
        with pytest.raises(HorizonExceeded):
            stream.update_many([[1, 0, 1]] * 2)
        assert path.read_bytes() == data
        stream.update([1, 0, 1])  # the stream goes on
        data = path.read_bytes()
        with pytest.raises(HorizonExceeded, match="MaxSum: 1 more after 2 is beyond"):
            stream.update([1, 0, 1])
        assert path.read_bytes() == data
        assert ledger.accounts()[0].t == 2

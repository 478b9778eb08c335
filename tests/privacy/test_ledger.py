# SPDX-License-Identifier: Apache-2.0
"""What a ledger promises: crashes at every point, races, totals, parameters, damage."""

import json
import math
import os
import shutil
import signal
import sqlite3
import stat
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchery.privacy import (
    Budget,
    BudgetExceeded,
    CorruptLedger,
    DiscreteNoise,
    FactorizationCounter,
    FloatNoise,
    HorizonExceeded,
    Ledger,
    LedgerConflict,
    LedgerError,
    MaxSum,
    OnOneRank,
    SumSelect,
    TreeCounter,
)
from batchery.privacy.ledger import within
from batchery.privacy.ledger_file import LedgerFile
from batchery.privacy.saved_state import state_from_bytes, state_to_bytes
from batchery.privacy.stream import Stream

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "streams.db"


def bits(n, *shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (n, *shape)))


def seeded(horizon=20, shape=(), **kinds):
    return TreeCounter(
        horizon, shape, **({"budget": RHO, "noise": DiscreteNoise(insecure_seed=1)} | kinds)
    )


def forked(function, *arguments):
    """Start a process that runs a function and is gone, with status 0 if nothing was raised."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def status(child):
    return os.waitpid(child, 0)[1]


# States as bytes

MECHANISMS = {
    "tree": lambda: seeded(40, 3),
    "honaker": lambda: seeded(40, 3, estimator="honaker"),
    "scalar": lambda: seeded(40),
    "endless": lambda: seeded(None, 3),
    "pure": lambda: seeded(40, 3, budget=Budget.pure(0.5)),
    "sqrt": lambda: real("sqrt"),
    "one band": lambda: real("banded", bands=1),
    "blt": lambda: real("blt"),
    "float32": lambda: real("banded", bands=3, dtype=torch.float32),
    "max": lambda: column(MaxSum, "recompute"),
    "max tree": lambda: column(MaxSum, "tree"),
    "sparse": lambda: column(MaxSum, "sparse", budget=Budget(rho=900.0), expected_max=30),
    "constant": lambda: column(MaxSum, "constant"),
    "select": lambda: column(SumSelect, "recompute"),
}


def real(strategy, dtype=torch.float64, **kinds):
    noise = FloatNoise(torch.Generator().manual_seed(1), dtype=dtype)
    kinds = {"budget": RHO, "noise": noise, "dtype": dtype} | kinds
    return FactorizationCounter(40, 3, strategy=strategy, **kinds)


def column(kind, mechanism, **kinds):
    noise = DiscreteNoise(insecure_seed=1)
    return kind(40, 3, mechanism=mechanism, **({"budget": RHO, "noise": noise} | kinds))


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_goes_on_from_bytes_as_if_nothing_had_happened(name, path):
    build = MECHANISMS[name]
    rows = bits(40, 3) if name != "scalar" else bits(40)
    whole = build()
    wanted = whole.update_many(rows.to(whole.dtype)).tolist()
    found = []
    for begin, end in ((0, 1), (1, 17), (17, 40)):
        with Ledger(path) as ledger, ledger.open("x", build()) as stream:
            assert stream.t == begin
            part = rows[begin:end].to(whole.dtype)
            found += [release.value for release in stream.update_many(part)]
            stream.confirm(end)
    assert found == wanted
    with Ledger(path) as ledger:
        (account,) = ledger.accounts()
        assert (account.name, account.t) == ("x", 40)
        assert account.spent == whole.spent
        assert account.reserved == whole.cost


def test_bytes_are_exact_and_run_no_code():
    state = {
        "a": torch.tensor([[1.1, -0.0, math.inf]], dtype=torch.float32),
        "b": torch.zeros(0, 3),
        "c": torch.tensor(7, dtype=torch.bfloat16),
        "d": {"e": [1, None, True, "x", 0.1 + 0.2, 1 << 80]},
    }
    again = state_from_bytes(state_to_bytes(state))
    assert again["d"] == state["d"]
    for name in "abc":
        assert again[name].dtype == state[name].dtype
        assert again[name].shape == state[name].shape
        assert torch.equal(again[name], state[name])
    assert math.copysign(1, again["a"][0, 1]) == -1
    with pytest.raises(TypeError):
        state_to_bytes({"a": object()})
    with pytest.raises(TypeError, match="must not hold a tensor of complex64"):
        state_to_bytes({"a": torch.zeros(1, dtype=torch.complex64)})


# Crashes


def serve(path, shown, rows, kill, build=seeded):
    """A program that publishes a stream as it should, and dies at a point of a step."""
    point, step = kill
    persist = Stream._persist

    def dying(self, *arguments):
        if (point, step) == ("drawn", self.mechanism.t):
            os.kill(os.getpid(), signal.SIGKILL)
        written = persist(self, *arguments)
        if (point, step) == ("written", self.mechanism.t):
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    Stream._persist = dying
    with Ledger(path) as ledger, ledger.open("x", build()) as stream, open(shown, "a") as out:

        def publish(releases):
            for release in releases:
                if (point, step) == ("persisted", release.t):
                    os.kill(os.getpid(), signal.SIGKILL)
                out.write(f"{release.t} {release.value}\n")
                out.flush()
                if (point, step) == ("published", release.t):
                    os.kill(os.getpid(), signal.SIGKILL)
            stream.confirm(releases[-1].t)

        pending = stream.pending()
        if pending:
            publish(pending)
        while stream.t < len(rows):
            t = stream.t
            many = t % 5 == 2  # two rows at once, every now and then
            if many and t + 2 <= len(rows):
                publish(stream.update_many(rows[t : t + 2]))
            else:
                publish([stream.update(rows[t])])


@pytest.mark.parametrize("point", ["drawn", "written", "persisted", "published"])
def test_killed_at_any_point_of_any_step_the_stream_is_what_it_would_have_been(
    point, path, tmp_path
):
    rows = bits(20)
    wanted = [f"{t} {x}" for t, x in enumerate(seeded().update_many(rows).tolist(), 1)]
    shown = tmp_path / "shown"
    for step in (1, 2, 4, 7, 9, 14, 20):  # two rows at once end at 4, 9, 14
        child = forked(serve, path, shown, rows, (point, step))
        assert status(child) == signal.SIGKILL
        with Ledger(path) as ledger:
            (account,) = ledger.accounts()
        lines = shown.read_text().splitlines() if shown.exists() else []
        seen = max((int(line.split()[0]) for line in lines), default=0)
        assert seen <= account.t  # nothing was shown that was not on disk
        if point in ("drawn", "written"):
            assert account.t < step
        else:
            assert account.t >= step
            assert (f"{step} " in [line[: len(str(step)) + 1] for line in lines]) == (
                point == "published"
            )
    assert status(forked(serve, path, shown, rows, ("", 0))) == 0
    lines = shown.read_text().splitlines()
    assert sorted(set(lines), key=lambda line: int(line.split()[0])) == wanted


def test_with_entropy_what_was_persisted_comes_back_and_what_was_not_is_new(path, tmp_path):
    drawn = tmp_path / "drawn"

    def die(after):
        with Ledger(path) as ledger:
            stream = ledger.open("x", TreeCounter(8, budget=Budget(rho=1e-9)))
            persist = stream._persist

            def dying(*arguments):
                if not after:
                    drawn.write_text(str(int(arguments[0][0][1])))
                    os.kill(os.getpid(), signal.SIGKILL)
                return persist(*arguments)

            stream._persist = dying
            release = stream.update(1)
            drawn.write_text(str(release.value))
            os.kill(os.getpid(), signal.SIGKILL)

    def resumed():
        with (
            Ledger(path) as ledger,
            ledger.open("x", TreeCounter(8, budget=Budget(rho=1e-9))) as stream,
        ):
            return stream.t, stream.pending(), stream.mechanism.last()

    assert status(forked(die, False)) == signal.SIGKILL
    assert resumed() == (0, [], None)
    unseen = int(drawn.read_text())
    assert status(forked(die, True)) == signal.SIGKILL
    t, (pending,), last = resumed()
    assert (t, pending.t) == (1, 1)
    assert pending.value == int(last) == int(drawn.read_text())
    assert pending.value != unseen  # σ is above 30 000


def test_a_release_that_cannot_be_written_is_not_returned_and_leaves_the_stream_where_it_was(
    path, monkeypatch
):
    rows = bits(20)
    wanted = seeded().update_many(rows).tolist()
    with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:
        assert stream.update(rows[0]).value == wanted[0]

        def full(*_):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(stream._file, "add_releases", full)
        for _ in range(2):
            with pytest.raises(OSError, match=r"streams\.db: database or disk is full"):
                stream.update(rows[1])
        monkeypatch.undo()
        assert (stream.t, stream.mechanism.t) == (1, 1)
        assert stream.update(rows[1]).value == wanted[1]
        assert [release.value for release in stream.releases()] == wanted[:2]


@pytest.mark.parametrize("name", MECHANISMS)
def test_an_interrupt_in_the_middle_of_a_step_leaves_no_trace_of_it(name, path, monkeypatch):
    rows = bits(40, 3) if name != "scalar" else bits(40)
    rows = rows.to(MECHANISMS[name]().dtype)
    wanted = MECHANISMS[name]().update_many(rows).tolist()

    def interrupted(self, *arguments):
        step(self, *arguments)
        raise KeyboardInterrupt

    with Ledger(path) as ledger, ledger.open("x", MECHANISMS[name]()) as stream:
        stream.update_many(rows[:11])
        kind = type(stream.mechanism)
        for many in (False, True):
            step = getattr(kind, "_steps" if many else "_step")
            monkeypatch.setattr(kind, "_steps" if many else "_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream.update_many(rows[11:30]) if many else stream.update(rows[11])
            monkeypatch.undo()
        stream.update_many(rows[11:])
        assert [release.value for release in stream.releases()] == wanted


def test_when_it_is_unknown_what_a_commit_has_done_the_stream_must_be_opened_again(path):
    class Failing:
        def __init__(self, database, before):
            self.database, self.before = database, before

        def execute(self, statement, *values):
            if statement == "COMMIT" and self.before:
                raise sqlite3.OperationalError("disk I/O error")
            found = self.database.execute(statement, *values)
            if statement == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return found

        def __getattr__(self, name):
            return getattr(self.database, name)

    with Ledger(path) as ledger:
        database = ledger.file._database
        for before in (True, False):
            stream = ledger.open("x", seeded())
            ledger.file._database = Failing(database, before)
            with pytest.raises(OSError, match="disk I/O error"):
                stream.update(1)
            ledger.file._database = database
            assert stream.t == 0
            if before:
                stream.close()
        assert ledger.accounts()[0].t == 1  # though nobody has been told
        with pytest.raises(LedgerConflict):
            stream.update(1)
        stream.close()
        with ledger.open("x", seeded()) as stream:
            assert [release.t for release in stream.pending()] == [1]


# Several processes


def test_a_stream_is_held_by_one_and_free_when_it_is_gone(path):
    with Ledger(path) as ledger:
        stream = ledger.open("x", seeded())
        with pytest.raises(LedgerConflict, match=r"stream 'x' of .* or twice by this one"):
            ledger.open("x", seeded())

        def other():
            with Ledger(path) as mine:
                with pytest.raises(LedgerConflict, match="held by another process"):
                    mine.open("x", seeded())
                mine.open("y", seeded()).update(1)

        assert status(forked(other)) == 0
        stream.update(1)
        stream.close()
        with pytest.raises(LedgerError, match="must be opened again"):
            stream.update(1)

    def hold():
        ledger = Ledger(path)
        ledger.open("x", seeded())
        os.kill(os.getpid(), signal.SIGKILL)

    assert status(forked(hold)) == signal.SIGKILL
    with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:
        assert stream.t == 1
        assert ledger.accounts()[1].t == 1


def together(functions):
    """Run functions in as many processes, begun at the same moment."""
    reading, writing = os.pipe()

    def wait(function):
        os.close(writing)
        os.read(reading, 1)
        function()

    children = [forked(wait, function) for function in functions]
    os.close(writing)
    found = [status(child) for child in children]
    os.close(reading)
    return found


def test_of_two_that_open_at_once_one_gets_the_stream(path, tmp_path):
    for attempt in range(8):

        def run(name, attempt=attempt):
            with Ledger(path) as ledger:
                try:
                    stream = ledger.open(f"x{attempt}", seeded())
                except LedgerConflict:
                    (tmp_path / f"lost{attempt}{name}").touch()
                    return
                release = stream.update(1)
                (tmp_path / f"won{attempt}{name}").write_text(str(release.t))
                while not list(tmp_path.glob(f"lost{attempt}*")):
                    pass

        assert together([lambda: run("a"), lambda: run("b")]) == [0, 0]
        assert len(list(tmp_path.glob(f"won{attempt}*"))) == 1
    with Ledger(path) as ledger:
        assert [account.t for account in ledger.accounts()] == [1] * 8


def test_without_locks_the_version_keeps_two_processes_from_one_release(
    path, tmp_path, monkeypatch
):
    monkeypatch.setattr(LedgerFile, "lock", lambda *_: sqlite3.connect(":memory:"))

    def run(name):
        with Ledger(path) as ledger, open(tmp_path / name, "w") as out:
            out.write("")
            while True:
                try:
                    stream = ledger.open("x", TreeCounter(40, budget=RHO))
                    while stream.t < 40:
                        time.sleep(0.001)
                        release = stream.update(1)
                        out.write(f"{release.t} {release.value}\n")
                    return
                except LedgerConflict:
                    out.write("conflict\n")

    assert together([lambda: run("a"), lambda: run("b")]) == [0, 0]
    lines = [line for name in "ab" for line in (tmp_path / name).read_text().splitlines()]
    shown = [line for line in lines if line != "conflict"]
    assert "conflict" in lines  # they did meet
    with Ledger(path) as ledger, ledger.open("x", TreeCounter(40, budget=RHO)) as stream:
        kept = [f"{release.t} {release.value}" for release in stream.releases()]
    assert sorted(shown) == sorted(kept)
    assert len(kept) == 40


def test_a_holder_that_was_overtaken_draws_nothing(path, monkeypatch):
    monkeypatch.setattr(LedgerFile, "lock", lambda *_: sqlite3.connect(":memory:"))
    with Ledger(path) as one, Ledger(path) as two:
        first, second = one.open("x", seeded()), two.open("x", seeded())
        used = first.mechanism.noise.state()
        with pytest.raises(LedgerConflict, match="stream 'x' was moved on by another process"):
            first.update(1)
        assert first.mechanism.t == 0
        assert first.mechanism.noise.state() == used
        assert second.update(1).t == 1
        first.confirm(0)
        first.close()
        assert second.update(1).t == 2


def test_a_fork_and_an_update_beside_the_ledger_are_refused(path):
    with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:

        def child():
            with pytest.raises(LedgerError, match="by one process"):
                stream.update(1)

        assert status(forked(child)) == 0
        stream.update(1)
        stream.mechanism.update(1)
        with pytest.raises(LedgerError, match="mechanism of stream 'x' was moved on by itself"):
            stream.update(1)


def test_another_object_may_update_and_commit(path):
    wanted = seeded().update_many([1, 0, 1]).tolist()
    with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:
        stream.update(1, note="first")
        private = OnOneRank(stream.mechanism)
        found = [int(private.update(torch.tensor(row), commit=stream.commit)) for row in (0, 1)]
        assert found == wanted[1:]
        assert [release.value for release in stream.releases()] == wanted
        assert stream.note == "first"
        with pytest.raises(LedgerError, match="mechanism of stream 'x' was not moved on"):
            stream.commit(stream.mechanism.state_dict())


# Budgets and parameters


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


def test_a_total_is_kept_over_streams_and_reopenings(path):
    with Ledger(path, total=Budget(rho=1.0)) as ledger:
        ledger.open("a", seeded(budget=Budget(rho=0.6))).close()
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
    with pytest.raises(
        ValueError, match=r"total must be Budget\(rho=1.0\), with which .* made, got"
    ):
        Ledger(path, total=Budget(rho=2.0))
    with pytest.raises(TypeError, match="Ledger: total must be a Budget, got float"):
        Ledger(path, total=1.0)


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


# Releases


def test_only_every_nth_release_is_kept(path):
    rows = bits(20, 3)
    wanted = column(MaxSum, "recompute").update_many(rows).tolist()
    with Ledger(path) as ledger, ledger.open("x", column(MaxSum, "recompute")) as stream:
        found = stream.update_many(rows[:7], every=3) + stream.update_many(rows[7:], every=3)
        assert [release.t for release in found] == [3, 6, 9, 12, 15, 18]
        assert [release.value for release in found] == wanted[2:18:3]
        assert stream.t == 20
        assert stream.releases() == found
        assert stream.releases(after=9) == found[3:]


def test_what_is_pending_and_what_was_noted(path):
    with Ledger(path) as ledger:
        with ledger.open("x", seeded()) as stream:
            assert stream.pending() == []
            assert stream.note is None
            stream.update_many([1, 1, 1], note={"records": 30})
            stream.confirm(2)
            stream.confirm(1)  # once shown, always
            with pytest.raises(ValueError, match="t must be <= 3, where the stream is, got 4"):
                stream.confirm(4)
        with ledger.open("x", seeded()) as stream:
            assert stream.note == {"records": 30}
            assert stream.published == 2
            assert [release.t for release in stream.pending()] == [3]
            assert stream.pending()[0].time.endswith("+00:00")


def test_a_ledger_behind_what_was_published_is_refused(path):
    with Ledger(path) as ledger:
        with pytest.raises(ValueError, match="published must be <= 0, where the state is.* got 2"):
            ledger.open("x", seeded(), published=2)
        assert ledger.accounts() == []
        with ledger.open("x", seeded()) as stream:
            stream.update(1)
            stream.confirm(1)
    old = path.read_bytes()
    with Ledger(path) as ledger, ledger.open("x", seeded(), published=1) as stream:
        stream.update(1)
    path.write_bytes(old)
    with (
        Ledger(path) as ledger,
        pytest.raises(ValueError, match="it would draw noise again, got 2"),
    ):
        ledger.open("x", seeded(), published=2)


# The file


def test_the_file_is_for_its_owner_and_safe_at_every_commit(path):
    mask = os.umask(0)
    try:
        with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:
            stream.update(1)
            with ledger.file.writing():
                ledger.file.write(replace(stream._entry, version=9))
                journal = path.with_name("streams.db-journal")
                assert stat.S_IMODE(journal.stat().st_mode) == 0o600
            assert ledger.file._pragma("journal_mode") == "delete"
            assert ledger.file._pragma("synchronous") == 3  # "extra"
        for found in path.parent.iterdir():
            assert stat.S_IMODE(found.stat().st_mode) == 0o600
    finally:
        os.umask(mask)
    assert sorted(found.name for found in path.parent.iterdir()) == [
        "streams.db",
        "streams.db.1.lock",
    ]
    path.chmod(0o644)  # as a copy may be
    Ledger(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_ledger_is_made_where_one_was(path):
    with Ledger(path) as ledger:
        ledger.open("x", seeded())
    path.unlink()
    with pytest.raises(CorruptLedger, match=r"streams\.db is gone, but its streams\.db\.1\.lock"):
        Ledger(path)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"not a database" * 100])
def test_what_is_no_ledger_is_named_and_left(content, path):
    path.write_bytes(content)
    with pytest.raises(CorruptLedger, match=r"streams\.db is (empty|damaged, or no ledger)"):
        Ledger(path)
    assert path.read_bytes() == content


def test_other_databases_and_formats_are_named_and_left(path):
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE streams (name TEXT)")
    with pytest.raises(CorruptLedger, match="no ledger"):
        Ledger(path)
    path.unlink()
    Ledger(path).close()
    with sqlite3.connect(path) as later:
        later.execute("PRAGMA user_version = 2")
    with pytest.raises(LedgerError, match="has format 2, and 1 is read here"):
        Ledger(path)


def test_damage_anywhere_is_found_or_harmless(path, tmp_path):
    with Ledger(path, total=Budget(rho=1.0)) as ledger:
        with ledger.open("clicks", seeded(20, 3)) as stream:
            stream.update_many(bits(15, 3), note={"records": 15})
            entries, releases = ledger.file.entries(), stream.releases()
    whole = path.read_bytes()
    broken = tmp_path / "broken.db"
    found = 0
    rng = np.random.default_rng(0)
    used = [at for at, byte in enumerate(whole) if byte]  # most of a page is empty
    for at in [*range(100), *rng.choice(used, 400, replace=False)]:
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        broken.write_bytes(data)
        try:
            with Ledger(broken) as ledger:
                assert ledger.total == Budget(rho=1.0)
                assert ledger.file.entries() == entries
                assert ledger.file.releases(1, 0) == releases
        except LedgerError:
            found += 1
        assert broken.read_bytes() == bytes(data) or found == 0
        broken.with_name("broken.db-journal").unlink(missing_ok=True)
    assert found > 300
    for length in range(4096, len(whole), 4096):
        broken.write_bytes(whole[:length])
        with pytest.raises(CorruptLedger, match=r"broken\.db is damaged"):
            Ledger(broken)


def test_rows_that_vanish_are_missed(path):
    with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:
        stream.update_many([1, 0, 1])
    for statement, what in (
        ("DELETE FROM releases WHERE t = 2", "releases of 'x'"),
        ("UPDATE releases SET value = 999 WHERE t = 2", "release 2"),
        ("UPDATE streams SET version = 1", "stream 1"),
        ("DELETE FROM streams", "a stream is missing"),
        ("DELETE FROM ledger", "its total is missing"),
        ("UPDATE ledger SET total = 'null '", "its total"),
    ):
        copy = path.with_name("copy.db")
        shutil.copyfile(path, copy)
        with sqlite3.connect(copy) as database:
            database.execute(statement)
        with (
            pytest.raises(CorruptLedger, match=f"copy.db is damaged .{what}"),
            Ledger(copy) as found,
        ):
            found.file.releases(1, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("", seeded()), ValueError, "Ledger: name must not be empty"),
        ((3, seeded()), TypeError, "Ledger: name must be a string, got int"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message, path):
    with Ledger(path) as ledger, pytest.raises(error, match=message):
        ledger.open(*arguments)


def test_a_used_mechanism_and_a_shadowed_setting_are_refused(path):
    used = seeded()
    used.update(1)
    with Ledger(path) as ledger:
        with pytest.raises(ValueError, match="Ledger: mechanism must be new"):
            ledger.open("x", used)
        with pytest.raises(ValueError, match=r"declared must not name .* got \['horizon'\]"):
            ledger.open("x", seeded(), declared={"horizon": 3})
        assert ledger.accounts() == []
        assert repr(ledger).startswith("Ledger('")
        with ledger.open("x", seeded()) as stream:
            assert repr(stream).startswith("Stream('x', at=0, TreeCounter(20")
            assert json.dumps(stream._entry.head)  # plain values alone

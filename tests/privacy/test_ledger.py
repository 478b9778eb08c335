# SPDX-License-Identifier: Apache-2.0
"""What a ledger promises of one stream: states, crashes at every point, releases."""

import math
import os
import signal
import sqlite3

import pytest
import torch
from ledger_streams import MECHANISMS, bits, column, forked, seeded, status

from batchery.privacy import (
    Budget,
    Ledger,
    LedgerConflict,
    MaxSum,
    TreeCounter,
)
from batchery.privacy.saved_state import state_from_bytes, state_to_bytes
from batchery.privacy.stream import Stream

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")


# States as bytes


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
        with ledger.open("x", seeded(), published=3) as stream:
            assert stream.pending() == []  # the caller knows better


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

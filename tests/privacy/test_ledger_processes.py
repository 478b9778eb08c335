# SPDX-License-Identifier: Apache-2.0
"""Several processes at one ledger: locks, races, forks."""

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from ledger_streams import RHO, forked, seeded, status, together

from batchery.privacy import (
    BudgetExceeded,
    Ledger,
    LedgerConflict,
    LedgerError,
    OnOneRank,
    TreeCounter,
)
from batchery.privacy.ledger_file import LedgerFile

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")


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


def test_an_unused_stream_that_is_held_is_not_declared_anew(path):
    def hold():
        ledger = Ledger(path, total=RHO)
        ledger.open("x", seeded(21))
        os.kill(os.getpid(), signal.SIGKILL)

    assert status(forked(hold)) == signal.SIGKILL
    with Ledger(path) as ledger:
        with pytest.raises(BudgetExceeded):  # the name that died has it still
            ledger.open("y", seeded())
        with ledger.open("x", seeded()) as stream:

            def other():
                with Ledger(path) as mine, pytest.raises(LedgerConflict, match="is held by"):
                    mine.open("x", seeded(22))

            assert status(forked(other)) == 0
            assert stream.update(1).t == 1
    with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:
        assert stream.t == 1


def test_of_two_that_declare_anew_at_once_one_gets_the_stream(path, tmp_path):
    for attempt in range(8):
        with Ledger(path) as ledger:
            ledger.open(f"x{attempt}", seeded(9)).close()

        def run(horizon, attempt=attempt):
            with Ledger(path) as ledger:
                try:
                    stream = ledger.open(f"x{attempt}", seeded(horizon))
                except LedgerConflict:
                    (tmp_path / f"lost{attempt}").touch()
                    return
                stream.update(1)
                (tmp_path / f"won{attempt}").write_text(str(horizon))
                while not (tmp_path / f"lost{attempt}").exists():
                    pass

        assert together([lambda: run(10), lambda: run(11)]) == [0, 0]
        won = int((tmp_path / f"won{attempt}").read_text())
        with Ledger(path) as ledger, ledger.open(f"x{attempt}", seeded(won)) as stream:
            assert stream.t == 1


def test_without_locks_what_was_declared_anew_stops_the_one_before(path, monkeypatch):
    monkeypatch.setattr(LedgerFile, "lock", lambda *_: sqlite3.connect(":memory:"))
    with Ledger(path, total=RHO) as one, Ledger(path) as two:
        first = one.open("x", seeded())
        two.open("x", seeded(9)).close()
        with two.open("y", seeded()) as second:
            with pytest.raises(LedgerConflict, match="moved on by another process"):
                first.update(1)
            first.close()
            assert second.update(1).t == 1
        assert [account.reserved.rho for account in two.accounts()] == [0, 0.5]


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
                    (tmp_path / f"opened {name}").touch()
                    while len(list(tmp_path.glob("opened *"))) < 2:  # so that they do meet
                        pass
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
    assert "conflict" in lines
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


@pytest.mark.parametrize("same_pid", [False, True])
def test_a_fork_and_an_update_beside_the_ledger_are_refused(same_pid, path):
    parent = os.getpid()
    with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:

        def child():
            if same_pid:  # as in a namespace of its own
                os.getpid = lambda: parent
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


def test_to_look_whether_a_file_is_a_ledger_ends_no_lock_of_this_process(path):
    program = (
        "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    )
    with Ledger(path) as ledger, ledger.file.writing():
        ledger.file._check_head()  # as another thread's opening does
        found = subprocess.run([sys.executable, "-c", program, path], capture_output=True)
    assert b"database is locked" in found.stderr

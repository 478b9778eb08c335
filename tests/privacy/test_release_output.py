# SPDX-License-Identifier: Apache-2.0
"""The releases of `batchery release` after crashes, interrupts and old ledgers."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from release_runs import CITIES, COUNT, csv_of, one_line, positions, published, release, values

from batchery import cli
from batchery.privacy import Budget, Ledger
from batchery.privacy import records as reading
from batchery.privacy.question import Question
from batchery.privacy.release import Engine, whole
from batchery.privacy.release_job import Job, Output
from batchery.privacy.stream import Stream

pytestmark = pytest.mark.usefixtures("folder")


def test_a_file_of_releases_is_completed_from_the_ledger(table, capsys):
    shared = ["--count", "--horizon", 40, "--rho", 1, "a.csv", "--out", "o.jsonl"]
    Path("a.csv").write_text(csv_of(table[:12]))
    assert release(*shared) == 0
    text = Path("o.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    assert len(ends) == 12
    for cut in (0, 5, ends[0], ends[6], ends[6] + 20, ends[10] + 1, ends[11]):
        Path("o.jsonl").write_bytes(text[:cut])
        assert release(*shared) == 0
        assert Path("o.jsonl").read_bytes() == text
    Path("o.jsonl").unlink()
    assert release(*shared) == 0
    assert Path("o.jsonl").read_bytes() == text
    capsys.readouterr()
    for content, message in (
        (b"precious\n", "o.jsonl holds no releases of stream 'stream'"),
        (b"[1]\n", "o.jsonl holds no releases of stream 'stream'"),
        (text.replace(b'"stream"}', b'"x"}').replace(b': "stream"', b': "other"'), "holds no"),
        (text + b"precious", "o.jsonl ends with something else than a release"),
        (b"precious", "o.jsonl ends with something else than a release"),
        (text[: ends[5]].replace(b'"value": ', b'"value": 1'), "holds other releases than"),
    ):
        Path("o.jsonl").write_bytes(content)
        assert release(*shared) == cli.USAGE
        assert message in one_line(capsys.readouterr().err)
        assert Path("o.jsonl").read_bytes() == content


def test_a_ledger_behind_its_releases_draws_nothing_again(table, capsys):
    shared = ["--max", *COUNT[1:], "--every", 2, "--horizon", 40, "--rho", 1, "a.csv"]
    shared += ["--out", "o.jsonl"]
    Path("a.csv").write_text(csv_of(table[:12]))
    assert release(*shared) == 0
    old = Path("l.db").read_bytes()
    Path("a.csv").write_text(csv_of(table))
    assert release(*shared) == 0
    text = Path("o.jsonl").read_bytes()
    Path("l.db").write_bytes(old)
    assert release(*shared) == cli.USAGE
    assert "published must be <= 12, where the state is" in one_line(capsys.readouterr().err)
    assert release(*shared, ledger="new.db") == cli.USAGE
    assert "published must be <= 0, where the state is" in one_line(capsys.readouterr().err)
    assert Path("o.jsonl").read_bytes() == text


def test_an_old_ledger_is_told_what_was_seen_on_standard_output(table, capsys):
    shared = ["--max", *COUNT[1:], "--every", 2, "--horizon", 40, "--rho", 1, "a.csv"]
    Path("a.csv").write_text(csv_of(table[:12]))
    assert release(*shared) == 0
    old = Path("l.db").read_bytes()
    Path("a.csv").write_text(csv_of(table))
    assert release(*shared, "--published", 6) == 0
    assert [line["t"] for line in published(capsys.readouterr().out)] == list(range(1, 21))
    Path("l.db").write_bytes(old)
    assert release(*shared, "--published", 20) == cli.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "published must be <= 12, where the state is" in one_line(captured.err)
    assert Path("l.db").read_bytes() == old


def job(**kinds):
    defaults = {"source": Path("a.csv"), "test_mode": True, "horizon": 40, "ledger": Path("k.db")}
    question = Question("count", ("city",), tuple(CITIES))
    return Job(question, Budget(rho=1.0), **(defaults | kinds))


def killed_at(point, step, **kinds):
    """Run a job in a process that dies at a point of a step; return the signal."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    persist, write = Stream._persist, Output.write

    def die(name, t):
        if name == point and t >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    def persisting(self, values, *more):
        die("before", values[-1][0])
        found = persist(self, values, *more)
        die("in", values[-1][0])
        return found

    def writing(self, releases):
        die("after", releases[-1].t)
        write(self, releases[:1])
        die("between", releases[-1].t)
        write(self, releases[1:])
        die("published", releases[-1].t)

    Stream._persist, Output.write = persisting, writing
    try:
        Engine(job(**kinds), lambda _: None, lambda *_: None).run()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("point", ["before", "in", "after", "between", "published"])
def test_killed_anywhere_the_command_goes_on_as_if_it_had_not_been(point, table, monkeypatch):
    monkeypatch.setattr(reading, "_PIECE", 50)  # two or three records at once
    Engine(job(ledger=Path("w.db"), out=Path("w.jsonl")), lambda _: None, lambda *_: None).run()
    wanted = values(Path("w.jsonl").read_text())
    out = {"out": Path("o.jsonl")}
    died = 0
    for step in (1, 2, 3, 5, 8, 13, 21, 34, 40):
        status = killed_at(point, step, **out)
        assert status in (0, signal.SIGKILL)
        died += status == signal.SIGKILL
        text = Path("o.jsonl").read_text() if Path("o.jsonl").exists() else ""
        known = values(text)
        assert known == wanted[: len(known)]
    assert died > 5
    assert killed_at("", 0, **out) == 0
    assert values(Path("o.jsonl").read_text()) == wanted


def test_on_standard_output_what_was_persisted_comes_again_with_the_same_value(
    table, monkeypatch, capfdbinary
):
    monkeypatch.setattr(reading, "_PIECE", 50)
    text = b""
    for point, step in (("after", 4), ("published", 9), ("between", 12), ("before", 18)):
        assert killed_at(point, step, test_mode=False) == signal.SIGKILL
        text += capfdbinary.readouterr().out
    assert killed_at("", 0, test_mode=False) == 0
    text += capfdbinary.readouterr().out
    found = published(text.decode())
    once = {json.dumps(line) for line in found}
    assert len(once) == 40  # no release has two values
    assert len(found) > 40
    with Ledger("k.db") as ledger:
        kept = ledger.file.releases(1, 0)
    assert [release.t for release in kept] == list(range(1, 41))
    assert sorted(line["time"] for line in map(json.loads, once)) == [r.time for r in kept]


def test_ctrl_c_waits_for_the_end_of_a_release():
    steps = []

    def interrupted():
        with whole():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("persisted")
            steps.append("published")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == ["persisted", "published"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    failed = []

    def elsewhere():
        with whole():
            failed.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failed == [True]


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(table):
    # One process for all of it, since importing torch takes most of the time.
    program = [sys.executable, "-m", "batchery.cli", "release", "--follow", "a.csv", "--count"]
    program += ["--horizon", "40", "--rho", "1", "--ledger", "l.db"]
    Path("a.csv").write_text(csv_of(table[:7]))
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = [process.stdout.readline() for _ in range(7)]
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED, error
    assert rest == ""
    assert "the same command goes on from here" in error
    assert "Traceback" not in error
    assert positions() == [7]
    Path("a.csv").write_text(csv_of(table))
    assert release("--count", "--horizon", 40, "--rho", 1, "a.csv", "--out", "o.jsonl") == 0
    found = Path("o.jsonl").read_text().splitlines(keepends=True)
    assert found[:7] == first
    assert len(found) == 40


def test_a_reader_that_has_gone_is_one_line(table):
    Path("a.csv").write_text("a\n" + "1\n" * 5000)
    program = [sys.executable, "-m", "batchery.cli", "release", "a.csv", "--count"]
    program += ["--horizon", "5000", "--rho", "1", "--ledger", "l.db"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=30) == cli.FAILED
    assert "Broken pipe" in one_line(error)
    assert "Exception ignored" not in error

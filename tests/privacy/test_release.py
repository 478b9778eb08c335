# SPDX-License-Identifier: Apache-2.0
"""The command `batchery release`: what it releases, and goes on from."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from release_runs import (
    CITIES,
    COUNT,
    EXACT,
    SUM,
    csv_of,
    positions,
    published,
    release,
    values,
)

from batchery import cli
from batchery.privacy import Ledger

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("source", ["a.csv", "a.jsonl", "-"])
@pytest.mark.parametrize("every", [1, 4])
def test_with_a_vast_budget_releases_are_the_truth(source, every, table, capsys, monkeypatch):
    city = np.array([[row["city"] == name for name in CITIES] for row in table]).cumsum(0)
    pair = np.array([[row["amount"], row["bit"]] for row in table]).cumsum(0)
    shared = [*EXACT, "--every", every, "--horizon", 40 // every]
    for place, (ask, wanted) in enumerate(
        {
            ("--count",): range(1, 41),
            tuple(COUNT): [dict(zip(CITIES, map(int, row), strict=True)) for row in city],
            tuple(SUM): [{"amount": int(a), "bit": int(b)} for a, b in pair],
            ("--max", *COUNT[1:]): city.max(1).tolist(),
            ("--select", *COUNT[1:]): [CITIES[i] for i in city.argmax(1)],
        }.items()
    ):
        arguments = [*ask, *shared, "--stream", f"s{place}"]
        if source == "-":
            pipe = io.TextIOWrapper(io.BytesIO(Path("a.csv").read_bytes()))
            monkeypatch.setattr(sys, "stdin", pipe)
        else:
            arguments.append(source)
        assert release(*arguments) == 0
        found = published(capsys.readouterr().out)
        assert [line["value"] for line in found] == list(wanted)[every - 1 :: every]
        assert [line["t"] for line in found] == list(range(1, 40 // every + 1))
        assert [line["records"] for line in found] == list(range(every, 41, every))
        assert {line["stream"] for line in found} == {f"s{place}"}
        assert all(set(line) == {"stream", "t", "records", "value", "time"} for line in found)
    with Ledger("l.db") as ledger:
        assert len(ledger.accounts()) == 5


def test_the_noise_has_the_size_of_the_budget(capsys):
    Path("a.csv").write_text("a\n" + "0\n" * 40)
    names = ",".join(map(str, range(400)))
    ask = ["--count", "--columns", "a", "--values", names, "--horizon", 40, "--rho", 0.005]
    assert release(*ask, "a.csv") == 0
    found = np.array([list(value.values()) for value in values(capsys.readouterr().out)])
    # One of several values has Δ² = 2, and 40 steps are in 6 levels: σ² = 6 · 2 / (2ρ). Release 32
    # has one noise, release 31 five.
    assert np.mean(np.square(found[31, 1:])) == pytest.approx(1200, rel=0.35)
    assert np.mean(np.square(found[30, 1:])) == pytest.approx(6000, rel=0.35)
    assert abs(found[31, 0] - 32) < 300


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("ask", [COUNT, ["--max", *COUNT[1:]], ["--select", *COUNT[1:]]])
def test_a_stream_in_parts_is_the_stream(ask, every, table, capsys):
    shared = [*ask, "--every", every, "--horizon", 40, "--rho", 1, "--test-mode"]
    assert release(*shared, "a.csv", ledger="whole.db") == 0
    wanted = values(capsys.readouterr().out)
    assert len(wanted) == 40 // every
    text = Path("a.csv").read_text().splitlines(keepends=True)
    found = []
    for end in (1, 2, 9, 9, 27, 41):
        Path("part.csv").write_text("".join(text[:end]))
        assert release(*shared, "part.csv") == 0
        found += values(capsys.readouterr().out)
    assert found == wanted


def test_records_that_wait_for_a_batch_are_not_consumed(table, capsys):
    Path("a.csv").write_text(csv_of(table[:10]))
    shared = ["--count", "--every", 4, "--horizon", 10, *EXACT, "a.csv"]
    assert release(*shared) == 0
    captured = capsys.readouterr()
    assert values(captured.out) == [4, 8]
    assert "2 records wait for a batch of 4; not consumed" in captured.err
    Path("a.csv").write_text(csv_of(table))
    assert release(*shared) == 0
    assert values(capsys.readouterr().out) == [12, 16, 20, 24, 28, 32, 36, 40]


def test_a_pipe_that_begins_again_and_one_that_goes_on(table, capsys, monkeypatch):
    def pipe(rows, *more):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(csv_of(rows).encode())))
        status = release(*SUM, "--horizon", 40, *EXACT, *more)
        return status, capsys.readouterr()

    status, first = pipe(table[:10])
    assert (status, len(values(first.out))) == (0, 10)
    status, second = pipe(table[:20])
    assert (status, len(values(second.out))) == (0, 10)
    assert "the first 10 records of standard input were consumed before and are" in second.err
    status, third = pipe(table[20:], "--continue")
    assert (status, len(values(third.out))) == (0, 20)
    assert "20 records were consumed before; all that comes is new" in third.err
    assert values(third.out)[-1]["amount"] == sum(row["amount"] for row in table)
    # What was read in parts is the same as in one.
    assert pipe(table)[0] == 0
    status, fifth = pipe(table[:5])
    assert status == cli.USAGE
    assert "ends 35 records before what the ledger has consumed" in fifth.err
    assert "--continue" in fifth.err


def test_other_records_in_place_of_consumed_ones_are_noticed(table, capsys):
    assert release("--count", "--horizon", 99, *EXACT, "a.csv") == 0
    before = positions()
    rows = [*table, *table]
    rows[3], rows[4] = rows[4], rows[3]
    Path("a.csv").write_text(csv_of(rows))
    assert release("--count", "--horizon", 99, *EXACT, "a.csv") == cli.USAGE
    captured = capsys.readouterr()
    assert "a.csv does not begin with the records that the ledger has consumed" in captured.err
    assert len(values(captured.out)) == 40
    assert positions() == before


def test_without_a_horizon(table, capsys):
    assert release("--count", "--horizon", "none", *EXACT, "a.csv") == 0
    assert values(capsys.readouterr().out) == list(range(1, 41))
    assert release("--max", "--columns", "bit", "--horizon", "none", *EXACT, "a.csv") == cli.USAGE


def test_the_help_says_what_matters(capsys):
    with pytest.raises(SystemExit):
        cli.main(["release", "--help"])
    text = capsys.readouterr().out
    assert "THE LEDGER IS AS SENSITIVE AS THE RECORDS" in text
    assert "PROTECTS NOBODY" in text
    assert "--range=-5,5" in text
    assert "--total keeps them within one budget" in text

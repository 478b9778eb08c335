# SPDX-License-Identifier: Apache-2.0
"""What the command `batchery release` refuses, and what that costs."""

from pathlib import Path

import numpy as np
import pytest
from release_runs import COUNT, EXACT, csv_of, one_line, positions, release, values

from batchery import cli
from batchery.privacy import Budget, Ledger
from batchery.privacy.question import Question
from batchery.privacy.release_command import BAD_RECORD, OVERSPENT
from batchery.privacy.release_job import Job
from batchery.privacy.stream import Stream

pytestmark = pytest.mark.usefixtures("folder")


BAD = [
    ("rome,1,nan", "column 'amount' is NaN"),
    ("rome,1,-777", "column 'amount' is negative"),
    ("rome,1,777", "column 'amount' is outside of 0 to 100"),
    ("rome,1,7.77", "column 'amount' is not a whole number"),
    ("rome,1", "has 2 cells, the header 3"),
    ("", "is empty"),
    ('"rome', "is no CSV"),
]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_record_stops_the_stream_and_costs_nothing(line, reason, every, capsys):
    good = "city,bit,amount\nrome,1,5\noslo,1,6\nrome,0,7\n"
    Path("a.csv").write_text(f"{good}{line}\nrome,1,9\n")
    ask = ["--sum", "--columns", "amount", "--range", "0,100", "--horizon", 9, "--every", every]
    assert release(*ask, *EXACT, "a.csv") == BAD_RECORD
    captured = capsys.readouterr()
    before = [value["amount"] for value in values(captured.out)]
    assert before == [5, 11, 18][every - 1 :: every]  # what came before it is out
    assert one_line(captured.err) == f"batchery release: line 5 {reason}; it is not consumed"
    assert "77" not in captured.err
    assert positions() == [3 // every]
    # Once mended, the same command goes on.
    Path("a.csv").write_text(f"{good}rome,1,8\nrome,1,9\n")
    assert release(*ask, *EXACT, "a.csv") == 0
    after = [value["amount"] for value in values(capsys.readouterr().out)]
    assert after == ([26, 35] if every == 1 else [26])


@pytest.mark.parametrize("ask", ["--count", "--max", "--select"])
def test_counts_outside_of_what_one_record_may_change_are_refused(ask, capsys):
    for cell, reason in ((2, "outside of 0 to 1"), (-1, "negative")):
        Path("a.csv").write_text(f"bit,x\n1,0\n{cell},1\n")
        shared = [ask, "--columns", "bit,x", "--horizon", 9, *EXACT, "--stream", cell]
        assert release(*shared, "a.csv") == BAD_RECORD
        assert f"line 3 column 'bit' is {reason}" in one_line(capsys.readouterr().err)
    assert positions() == [1, 1]


def test_a_bad_first_record_spends_nothing(capsys):
    for place, (name, text) in enumerate(
        {
            "a.csv": "city\nparis\n",
            "b.jsonl": '{"town": "rome"}\n',
            "c.jsonl": '{"city": "rome"\n',
        }.items()
    ):
        Path(name).write_text(text)
        ledger = f"{place}.db"
        assert release(*COUNT, "--horizon", 9, "--rho", 1, name, ledger=ledger) == BAD_RECORD
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "paris" not in captured.err
        with Ledger(ledger) as opened:
            (account,) = opened.accounts()
            assert account.t == 0
            assert account.spent.rho == 0
            assert account.reserved.rho == 0


@pytest.mark.parametrize("other", [[], ["--stream", "s2"]], ids=["same name", "other name"])
def test_a_range_that_was_too_narrow_for_the_first_record_costs_nothing(other, capsys):
    Path("a.csv").write_text("n\n-3\n4\n")
    shared = ["--sum", "--columns", "n", "--horizon", 9, *EXACT, "--total", 1e6, "a.csv"]
    assert release(*shared, "--range", "0,5") == BAD_RECORD
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "line 2 column 'n' is negative; it is not consumed" in one_line(captured.err)
    assert release(*shared, "--range=-5,5", *other) == 0
    assert [value["n"] for value in values(capsys.readouterr().out)] == [-3, 1]
    # What has released something is held to what it declared, and keeps its budget.
    assert release(*shared, "--range=-9,9", *other) == cli.USAGE
    assert "the saved state has row_sensitivity=10" in one_line(capsys.readouterr().err)
    assert release(*shared, "--range=-5,5", "--stream", "s3") == OVERSPENT
    assert "is reserved already" in one_line(capsys.readouterr().err)


def test_skipped_records_are_zeros_in_their_place(capsys):
    Path("a.csv").write_text("city\nrome\nparis\n\nrome\noslo\n")
    shared = [*COUNT, "--horizon", 9, *EXACT, "--on-bad", "skip", "a.csv"]
    assert release(*shared) == 0
    captured = capsys.readouterr()
    totals = [sum(value.values()) for value in values(captured.out)]
    assert totals == [1, 1, 1, 2, 3]
    assert "line 3 column 'city' holds none of the declared values; it counts as zeros" in (
        captured.err
    )
    assert "line 4 is empty; it counts as zeros" in captured.err
    assert "2 bad lines count as zeros" in captured.err
    assert "paris" not in captured.err
    with open("a.csv", "a") as file:
        file.write("rome\n")
    assert release(*shared) == 0  # and are consumed
    assert values(capsys.readouterr().out)[-1]["rome"] == 3


def test_a_record_being_bad_changes_one_row_and_no_other(monkeypatch, capsys):
    given = []
    update = Stream.update_many

    def spy(self, rows, **kinds):
        given.extend(rows.tolist())
        return update(self, rows, **kinds)

    monkeypatch.setattr(Stream, "update_many", spy)
    streams = []
    for place, fifth in enumerate(("rome", "paris", "", '"')):
        cities = ["rome", "oslo"] * 5
        cities[4] = fifth
        Path("a.csv").write_text("city\n" + "".join(city + "\n" for city in cities))
        shared = [*COUNT, "--horizon", 10, *EXACT, "--on-bad", "skip"]
        assert release(*shared, "a.csv", ledger=f"{place}.db") == 0
        streams.append(np.array(given))
        given.clear()
    for other in streams[1:]:
        assert (streams[0] != other).any(1).nonzero()[0].tolist() == [4]


def test_many_bad_lines_are_not_all_named(capsys):
    Path("a.csv").write_text("city\n" + "paris\n" * 100)
    assert release(*COUNT, "--horizon", 100, *EXACT, "--on-bad", "skip", "a.csv") == 0
    error = capsys.readouterr().err
    assert error.count("it counts as zeros") == 20
    assert "100 bad lines count as zeros" in error


@pytest.mark.parametrize("ask", [["--count"], ["--max", *COUNT[1:]]])
def test_past_the_horizon_nothing_is_released(ask, table, capsys):
    shared = [*ask, "--horizon", 9, "--every", 4, "--rho", 1, "a.csv"]
    for releases in (9, 0):
        assert release(*shared) == OVERSPENT
        captured = capsys.readouterr()
        assert len(values(captured.out)) == releases
        assert one_line(captured.err) == (
            "batchery release: all 9 releases are made, after 36 records; line 38 is not read"
        )
    with Ledger("l.db") as ledger:
        (account,) = ledger.accounts()
        assert account.spent.rho <= 1
    Path("a.csv").write_text(csv_of(table[:36]))
    assert release(*shared) == 0  # exactly to the end


def test_other_parameters_are_refused_by_name(table, capsys):
    first = {
        "--horizon": 50,
        "--rho": 1,
        "--every": 2,
        "--columns": "city",
        "--values": "rome,oslo",
    }

    def run(**changed):
        options = first | {f"--{name}": value for name, value in changed.items()}
        flat = [x for pair in options.items() for x in pair]
        return release("--count", *flat, "--on-bad", "skip", "a.csv")

    assert run() == 0
    before, data = positions(), Path("l.db").read_bytes()
    capsys.readouterr()
    for changed, named in (
        ({"horizon": 51}, "horizon=50"),
        ({"rho": 2}, "budget='Budget(rho=1.0)'"),
        ({"every": 3}, "every=2"),
        ({"values": "oslo,rome"}, "values=['rome', 'oslo']"),
        ({"columns": "bit"}, "columns=['city']"),
    ):
        assert run(**changed) == cli.USAGE
        captured = capsys.readouterr()
        assert captured.out == ""
        assert f"stream 'stream': the saved state has {named}, this object" in one_line(
            captured.err
        )
    assert release("--max", *COUNT[1:], "--horizon", 50, "--rho", 1, "a.csv") == cli.USAGE
    assert positions() == before
    assert Path("l.db").read_bytes() == data


def test_a_total_over_several_streams(table, capsys):
    shared = ["--count", "--horizon", 40, "a.csv", "--epsilon"]
    assert release(*shared, 1, "--total", 2.5, "--stream", "a") == 0
    assert release(*shared, 1, "--stream", "b") == 0
    capsys.readouterr()
    assert release(*shared, 1, "--stream", "c") == OVERSPENT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "stream 'c' costs Budget.pure(epsilon=1.0)" in one_line(captured.err)
    assert len(list(Path().glob("l.db.*.lock"))) == 2  # of a and b
    assert release(*shared, 0.5, "--stream", "c", "--total", 3) == cli.USAGE
    error = one_line(capsys.readouterr().err)
    assert "total must be Budget.pure(epsilon=2.5), as l.db has it, got" in error
    assert release(*shared, 0.5, "--stream", "c") == 0
    assert positions() == [40, 40, 40]


def test_a_second_stream_without_a_total_is_told_of_and_a_total_may_still_be_set(table, capsys):
    shared = ["--count", "--horizon", 40, "a.csv", "--rho"]
    assert release(*shared, 1, "--stream", "a") == 0
    assert "WARNING" not in capsys.readouterr().err
    assert release(*shared, 0.5, "--stream", "b") == 0
    error = capsys.readouterr().err
    assert "WARNING: stream 'b' spends Budget(rho=0.5) beside Budget(rho=1.0) of 'a'" in error
    assert "--total keeps l.db within one budget" in error
    assert release(*shared, 0.5, "--stream", "b", "--total", 1) == OVERSPENT
    error = one_line(capsys.readouterr().err)
    assert "l.db has reserved Budget(rho=1.0) and Budget(rho=0.5), beyond a total of" in error
    assert release(*shared, 0.5, "--stream", "b", "--total", 2) == 0
    assert "WARNING" not in capsys.readouterr().err
    assert release(*shared, 1, "--stream", "c") == OVERSPENT
    assert release(*shared, 0.5, "--stream", "c") == 0


def test_a_stream_in_use_is_refused(table, capsys):
    job = Job(Question("count"), Budget(rho=1e6), 99, Path("l.db"))
    with Ledger("l.db") as ledger, ledger.open("stream", job.mechanism(), declared=job.declared()):
        assert release("--count", "--horizon", 99, *EXACT, "a.csv") == cli.FAILED
    assert "stream 'stream' of l.db is held" in one_line(capsys.readouterr().err)
    assert release("--count", "--horizon", 99, *EXACT, "a.csv") == 0


def test_a_damaged_ledger_is_refused_and_left(table, capsys):
    assert release("--count", "--horizon", 99, *EXACT, "a.csv") == 0
    data = bytearray(Path("l.db").read_bytes())
    place = data.index(b'"note"')
    data[place + 1] ^= 1
    Path("l.db").write_bytes(data)
    capsys.readouterr()
    assert release("--count", "--horizon", 99, *EXACT, "a.csv") == cli.FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "l.db is damaged (stream 1)" in one_line(captured.err)
    assert Path("l.db").read_bytes() == bytes(data)
    Path("l.db").unlink()
    assert release("--count", "--horizon", 99, *EXACT, "a.csv") == cli.FAILED
    assert "l.db is gone, but its l.db.1.lock is here" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "--rho", 1, "a.csv"], "--horizon"),
        (["--count", "--horizon", 0, "--rho", 1, "a.csv"], "horizon must be >= 1, got 0"),
        (
            ["--count", "--horizon", "x", "--rho", 1, "a.csv"],
            "argument --horizon: must be a whole number or none, got 'x'",
        ),
        (["--count", "--horizon", 9, "a.csv"], "--rho --epsilon is required"),
        (["--horizon", 9, "--rho", 1, "a.csv"], "--count --sum --max --select is required"),
        (["--count", "--max", "--horizon", 9, "--rho", 1], "not allowed with"),
        (["--count", "--horizon", 9, "--rho", 1, "--epsilon", 1], "not allowed with"),
        (["--count", "--horizon", 9, "--rho", 1, "--delta", 0.1, "a.csv"], "--delta belongs to"),
        (["--count", "--horizon", 9, "--rho", 0, "a.csv"], "budget must be > 0"),
        (["--count", "--horizon", 9, "--epsilon", -1, "a.csv"], "epsilon must be > 0, got -1.0"),
        (["--count", "--horizon", 9, "--rho", 1, "--every", 0, "a.csv"], "every must be >= 1"),
        (["--count", "--horizon", 9, "--rho", 1, "--follow"], "follow is for a file"),
        (["--max", "--horizon", 9, "--rho", 1, "a.csv"], "columns must be given for 'max'"),
        (
            ["--sum", "--columns", "a", "--range", "1", "--horizon", 9, "--rho", 1],
            "argument --range: must be two whole numbers with a comma between, got '1'",
        ),
        (["--count", "--horizon", "1_0", "--rho", 1, "a.csv"], "whole number or none, got '1_0'"),
        (["--count", "--horizon", "９", "--rho", 1, "a.csv"], "whole number or none, got '９'"),
        (["--count", "--horizon", 9, "--rho", "x"], "argument --rho: must be a number, got 'x'"),
        (["--count", "--horizon", 9, "--rho", "1_0"], "must be a number, got '1_0'"),
        (
            ["--count", "--horizon", 9, "--rho", 1, "--every", "x"],
            "must be a whole number, got 'x'",
        ),
        (
            ["--sum", "--columns", "a", "--range", "0,1_0", "--horizon", 9, "--rho", 1],
            "two whole numbers with a comma between, got '0,1_0'",
        ),
        (["--max", "--columns", "a\nb", "--horizon", 9, "--rho", 1], "quoted as in CSV, got"),
        (
            ["--count", "--horizon", 9, "--rho", 1, "a.csv", "--plot", "x.doc"],
            "plot must end in .svg, .png, .pdf, got 'x.doc'",
        ),
        (
            ["--count", "--horizon", 9, "--rho", 1, "a.csv", "--plot", "."],
            "plot must be a file that can be written, got '.'",
        ),
        (["--count", "--horizon", 9, "--rho", 1, "a.csv", "--plot", "a.csv/p.svg"], "a.csv"),
        (
            ["--count", "--horizon", 9, "--rho", 1, "a.csv", "--published", -1],
            "published must be >= 0, got -1",
        ),
        ([*COUNT, "--horizon", 9, "--rho", 1, "none.csv"], "No such file"),
        (["--count", "--columns", "x", "--horizon", 9, "--rho", 1, "a.csv"], "no column 'x'"),
        (
            ["--sum", "--columns", "bit", "--range", f"0,{1 << 40}", "--horizon", 9, "--rho", 1]
            + ["a.csv"],
            "Question: range must ask for exact noise of less than 61 bits within "
            f"Budget(rho=1.0), got (0, {1 << 40})",
        ),
        (
            ["--sum", "--columns", "bit", "--range", f"0,{1 << 40}", "--horizon", "none"]
            + ["--epsilon", 1e-9, "a.csv"],
            "Question: range must ask for exact noise of less than 61 bits within "
            f"Budget.pure(epsilon=1e-09), got (0, {1 << 40})",
        ),
        (
            ["--sum", "--columns", "bit", "--range", f"0,{1 << 40}", "--horizon", 1 << 30]
            + ["--rho", 1, "a.csv"],
            "horizon must let sums be below 2^62",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_the_ledger_is_made(
    arguments, message, table, capsys
):
    try:
        status = release(*arguments)
    except SystemExit as exit_:
        status = exit_.code
    assert status in (cli.USAGE, cli.FAILED)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in one_line(captured.err)
    assert not Path("l.db").exists()

# SPDX-License-Identifier: Apache-2.0
"""The command `batchery release`: what it reads, releases, refuses, and goes on from."""

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from batchery import cli
from batchery.privacy import Budget, Ledger, MaxSum, SumSelect
from batchery.privacy import records as reading
from batchery.privacy.question import BadRecord, Question, _root
from batchery.privacy.records import Records, lines
from batchery.privacy.release import Engine, whole
from batchery.privacy.release_command import BAD_RECORD, OVERSPENT
from batchery.privacy.release_job import Job, Output
from batchery.privacy.stream import Stream

EXACT = ["--rho", "1e6"]  # the discrete noise of this budget is 0 but for one draw in 10^1000
CITIES = ["rome", "oslo", "bern"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def table():
    """Forty records: a city, a bit, an amount; as rows, and in a.csv and a.jsonl."""
    rng = np.random.default_rng(0)
    rows = [
        {"city": CITIES[c], "bit": int(b), "amount": int(a)}
        for c, b, a in zip(
            rng.choice(3, 40, p=[0.6, 0.3, 0.1]),
            rng.integers(0, 2, 40),
            rng.integers(-5, 21, 40),
            strict=True,
        )
    ]
    Path("a.csv").write_text(csv_of(rows))
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def csv_of(rows):
    body = "".join(f'"{row["city"]}",{row["bit"]},{row["amount"]}\n' for row in rows)
    return "city,bit,amount\n" + body


def release(*arguments, ledger="l.db"):
    return cli.main(["release", *map(str, arguments), "--ledger", ledger])


def published(text):
    return [json.loads(line) for line in text.splitlines()]


def values(text):
    return [line["value"] for line in published(text)]


def positions(ledger="l.db"):
    with Ledger(ledger) as opened:
        return [account.t for account in opened.accounts()]


COUNT = ["--count", "--columns", "city", "--values", "rome,oslo,bern"]
SUM = ["--sum", "--columns", "amount,bit", "--range=-5,20"]


# Questions

ASKS = [
    Question("count"),
    Question("count", ("a", "b", "c")),
    Question("count", ("a",), ("x",)),
    Question("count", ("a",), ("x", "y", "z")),
    Question("sum", ("a",), range=(0, 7)),
    Question("sum", ("a", "b"), range=(-2, 3)),
    Question("sum", ("a", "b"), range=(2, 5)),  # 0, of a bad record, is farther than 2
    Question("sum", ("a",), range=(-9, -3)),
]


@pytest.mark.parametrize("question", ASKS, ids=str)
def test_sensitivity_is_the_most_that_a_record_can_change(question):
    cells = question.values or range(question.range[0], question.range[1] + 1)
    records = [
        dict(zip(question.columns, cells, strict=True))
        for cells in itertools.product(cells, repeat=len(question.columns))
    ]
    rows = np.array([*map(question.row, records), [0] * question.width])  # or a bad record
    changes = np.abs(rows[:, None] - rows)
    assert question.sensitivity(pure=True) == changes.sum(-1).max()
    assert question.sensitivity(pure=False) >= math.sqrt((changes**2).sum(-1).max())
    assert question.sensitivity(pure=False) == pytest.approx(
        math.sqrt((changes**2).sum(-1).max()), rel=1e-12
    )


@pytest.mark.parametrize("square", [2, 3, 4, (1 << 60) - 1, 1 << 60, (1 << 60) + 1])
def test_a_root_is_never_taken_for_less(square):
    assert square <= Fraction(_root(square)) ** 2 <= square * (1 + Fraction(1, 1 << 50))


def test_questions_make_their_mechanisms():
    budget = Budget(rho=0.5)
    assert Question("count").mechanism(10, 5, budget).horizon == 10
    leader = Question("max", ("a", "b")).mechanism(10, 5, budget)
    assert isinstance(leader, MaxSum)
    assert (leader.horizon, leader.num_columns) == (50, 2)
    assert isinstance(Question("select", ("a",), ("x", "y")).mechanism(None, 5, budget), SumSelect)
    for ask in ("max", "select"):  # one line names one value, and any number of columns
        values = Question(ask, ("a",), ("x", "y", "z")).mechanism(10, 5, budget)
        assert values.max_ones == 1
        assert Question(ask, ("a", "b", "c")).mechanism(10, 5, budget).max_ones == 3
    counter = Question("count", ("a",), ("x", "y", "z")).mechanism(1, 1, budget)
    assert 2 <= counter.design.scale < 2.00001
    assert Question("count", ("a",), ("x", "y")).mechanism(1, 1, Budget.pure(1.0)).design.scale == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mean",), "ask must be one of 'count', 'sum', 'max', 'select', got 'mean'"),
        (("sum",), "columns must be given for 'sum'"),
        (("max", ("a", "a")), "columns must be distinct and not empty"),
        (("max", ("a", "")), "columns must be distinct and not empty"),
        (("max", ("a",), ("x", "x")), "values must be distinct"),
        (("max", ("a", "b"), ("x",)), "columns must be one if values are given"),
        (("sum", ("a",), ("x",)), "values must not be given for 'sum'"),
        (("sum", ("a",), (), (3, 3)), "range must be low < high"),
        (("sum", ("a",), (), (0, 1 << 41)), "range must be low < high, within"),
        (("max", ("a",), (), (0, 2)), "range must be 0 to 1 but for 'sum'"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"Question: {message}"):
        Question(*arguments)


CELLS = [
    ("nan", "is NaN"),
    (math.nan, "is NaN"),
    ("inf", "is not a whole number"),
    ("-3", "is negative"),
    (-3, "is negative"),
    ("778", "is outside of 0 to 100"),
    ("9" * 30, "is outside of 0 to 100"),
    ("7.5", "is not a whole number"),
    ("seven", "is not a number"),
    ("1_0", "is outside"),
    ("", "is empty"),
    (None, "is not a number"),
    ([7], "is not a number"),
]


@pytest.mark.parametrize(("cell", "message"), CELLS)
def test_bad_numbers_are_named_and_not_shown(cell, message):
    question = Question("sum", ("age",), range=(0, 100) if cell != "1_0" else (0, 9))
    with pytest.raises(BadRecord, match=f"^column 'age' {message}") as caught:
        question.row({"age": cell})
    for secret in ("778", "7.5", "seven", "99999"):
        assert secret not in str(caught.value)


def test_good_numbers_and_words():
    question = Question("sum", ("age",), range=(-5, 100))
    for cell in (7, "7", " 7 ", "+7", 7.0, "7.0"):
        assert question.row({"age": cell}) == [7]
    assert question.row({"age": True}) == [1]
    assert question.row({"age": "-5"}) == [-5]
    with pytest.raises(BadRecord, match="^column 'age' is outside of -5 to 100$"):
        question.row({"age": -6})
    words = Question("count", ("a",), ("x", "3", "true"))
    assert words.row({"a": " x "}) == [1, 0, 0]
    assert words.row({"a": 3}) == [0, 1, 0]
    assert words.row({"a": True}) == [0, 0, 1]
    for cell in ("secret", None, ["x"], 3.0):
        with pytest.raises(BadRecord, match="^column 'a' holds none of the declared values$"):
            words.row({"a": cell})
    with pytest.raises(BadRecord, match="^column 'a' is missing$"):
        words.row({"b": 1})


# Reading


def parsed(data, format="csv", columns=("a",)):
    records = Records(io.BytesIO(data), format, columns)
    found = []
    for number, line in itertools.chain.from_iterable(records):
        try:
            found.append((number, records.parse(line)))
        except BadRecord as error:
            found.append((number, str(error)))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 16])
def test_lines_are_whole_in_pieces_of_any_size(size, monkeypatch):
    monkeypatch.setattr(reading, "_PIECE", size)
    data = b"a,b\n1,2\r\n\n3,4"
    found = list(itertools.chain.from_iterable(lines(io.BytesIO(data))))
    assert found == data.split(b"\n")
    wanted = [(2, {"a": "1"}), (3, "is empty"), (4, {"a": "3"})]
    assert parsed(data) == wanted


def test_csv():
    data = b'\xef\xbb\xbfb, a ,"c,d"\n1,"x, y",2\n1,2\n"open,2,3\n1,\xff,3\n1,"s""q",3\n'
    assert parsed(data, columns=["a"]) == [
        (2, {"a": "x, y"}),
        (3, "has 2 cells, the header 3"),
        (4, "is no CSV"),
        (5, "is not UTF-8"),
        (6, {"a": 's"q'}),
    ]
    for data, message in (
        (b"", "the CSV has no header"),
        (b"b,c\n", "the header has no column 'a', but b, c"),
        (b"a,b,a\n", "the header has two columns 'a'"),
        (b'"a\n', "the header is no CSV"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(data)


def test_jsonl():
    data = b'{"a": 1, "b": 2}\n[1]\n{"a": 1\n\n{"a": NaN}\n' + b"[" * 100_000
    found = parsed(data, "jsonl")
    assert found[:4] == [
        (1, {"a": 1, "b": 2}),
        (2, "is no JSON object"),
        (3, "is no JSON"),
        (4, "is empty"),
    ]
    assert math.isnan(found[4][1]["a"])
    assert found[5] == (6, "is no JSON")


# Releases


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


def test_a_file_that_grows_is_followed(table, capsys):
    Path("a.csv").write_text(csv_of(table[:2]))
    body = csv_of(table).encode()
    begin = len(csv_of(table[:2]))

    def grow():
        with open("a.csv", "ab", buffering=0) as file:
            for at in range(begin, len(body), 97):  # not at the ends of lines
                file.write(body[at : at + 97])
                time.sleep(0.01)

    thread = threading.Thread(target=grow)
    thread.start()
    assert release(*COUNT, "--horizon", 40, *EXACT, "--follow", "a.csv", "--out", "o.jsonl") == 0
    thread.join()
    found = values(Path("o.jsonl").read_text())
    assert len(found) == 40
    assert sum(found[-1].values()) == 40


def test_a_file_that_shrinks_while_followed_is_an_error(table, monkeypatch, capsys):
    def shrink(_):
        Path("a.csv").write_text("city\n")

    monkeypatch.setattr(reading.time, "sleep", shrink)
    assert release("--count", "--horizon", 99, *EXACT, "--follow", "a.csv") == cli.FAILED
    assert "a.csv has become shorter while it was followed" in capsys.readouterr().err


def test_without_a_horizon(table, capsys):
    assert release("--count", "--horizon", "none", *EXACT, "a.csv") == 0
    assert values(capsys.readouterr().out) == list(range(1, 41))
    assert release("--max", "--columns", "bit", "--horizon", "none", *EXACT, "a.csv") == cli.USAGE


# Refusals


def one_line(text):
    *_, last = text.strip().splitlines()
    assert last.startswith("batchery release: ")
    return last


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
    assert release(*shared, 0.5, "--stream", "c", "--total", 3) == cli.USAGE
    assert "total must be Budget.pure(epsilon=2.5)" in one_line(capsys.readouterr().err)
    assert release(*shared, 0.5, "--stream", "c") == 0
    assert positions() == [40, 40, 40]


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
        (["--count", "--horizon", "x", "--rho", 1, "a.csv"], "invalid horizon value: 'x'"),
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
            "invalid low_high",
        ),
        ([*COUNT, "--horizon", 9, "--rho", 1, "none.csv"], "No such file"),
        (["--count", "--columns", "x", "--horizon", 9, "--rho", 1, "a.csv"], "no column 'x'"),
        (
            ["--sum", "--columns", "bit", "--range", f"0,{1 << 40}", "--horizon", 9, "--rho", 1]
            + ["a.csv"],
            "scale must have a numerator below 2^61",
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


# Output, crashes, interrupts


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


# Figures and test mode


@pytest.mark.parametrize("ask", [COUNT, SUM, ["--max", *COUNT[1:]], ["--select", *COUNT[1:]]])
def test_figures_show_the_truth_in_test_mode_alone(ask, table, capsys):
    shared = [*ask, "--horizon", 40, "--rho", 1, "--every", 2, "a.csv"]
    assert release(*shared, "--plot", "p.svg", ledger="p.db") == 0
    assert "TEST" not in capsys.readouterr().err
    Path("a.csv").write_text(csv_of(table[:20]))
    assert release(*shared, "--test-mode") == 0
    Path("a.csv").write_text(csv_of(table))
    assert release(*shared, "--plot", "t.svg", "--test-mode") == 0
    captured = capsys.readouterr()
    assert "TEST MODE: THE NOISE IS KNOWN TO ANYONE" in captured.err
    assert all(line["test"] is True for line in published(captured.out))
    plain, true = Path("p.svg").read_text(), Path("t.svg").read_text()
    assert plain.startswith("<?xml")
    assert "<!-- truth -->" in true
    assert "<!-- truth -->" not in plain
    # A stream with known noise never goes on as one that protects, nor the other way round.
    assert release(*shared) == cli.USAGE
    assert "test_mode=True" in one_line(capsys.readouterr().err)
    assert release(*shared, "--test-mode", ledger="p.db") == cli.USAGE


def test_a_figure_is_drawn_when_the_stream_stops(table, capsys):
    assert release("--count", "--horizon", 9, "--rho", 1, "a.csv", "--plot", "p.png") == OVERSPENT
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")


def test_the_help_says_what_matters(capsys):
    with pytest.raises(SystemExit):
        cli.main(["release", "--help"])
    text = capsys.readouterr().out
    assert "THE LEDGER IS AS SENSITIVE AS THE RECORDS" in text
    assert "PROTECTS NOBODY" in text

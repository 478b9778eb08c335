# SPDX-License-Identifier: Apache-2.0
"""How records are read: lines, CSV, JSONL, a file that grows."""

import io
import itertools
import math
import threading
import time
from pathlib import Path

import pytest
from release_runs import COUNT, EXACT, csv_of, one_line, release, values

from batchery import cli
from batchery.privacy import records as reading
from batchery.privacy.question import BadRecord
from batchery.privacy.records import Records, lines

pytestmark = pytest.mark.usefixtures("folder")


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
        (b"b,c\n", "the header has no column 'a', of 2 in all$"),
        (b"a,b,a\n", "the header has two columns 'a', of 3 in all$"),
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


def test_a_file_that_is_rotated_while_followed_is_read_to_its_end_and_named(
    table, monkeypatch, capsys
):
    sleeps = []

    def rotate(_):
        sleeps.append(1)
        assert len(sleeps) == 1, "the old file is followed for ever"
        Path("a.csv").rename("a.csv.1")
        with open("a.csv.1", "a") as old:
            old.write("rome,1,1\n")
        Path("a.csv").write_text(csv_of(table[:3]))

    monkeypatch.setattr(reading.time, "sleep", rotate)
    shared = ["--count", "--horizon", 99, *EXACT, "a.csv"]
    assert release(*shared, "--follow") == cli.FAILED
    captured = capsys.readouterr()
    assert values(captured.out) == list(range(1, 42))
    assert "a.csv was renamed or replaced while it was followed" in one_line(captured.err)
    assert "--continue" in one_line(captured.err)
    assert release(*shared, "--continue") == 0
    assert values(capsys.readouterr().out) == [42, 43, 44]


def test_a_file_that_is_removed_while_followed_is_named(table, monkeypatch, capsys):
    def remove(_):
        Path("a.csv").unlink()  # raises if it comes again

    monkeypatch.setattr(reading.time, "sleep", remove)
    assert release("--count", "--horizon", 99, *EXACT, "--follow", "a.csv") == cli.FAILED
    assert "a.csv was renamed or replaced" in one_line(capsys.readouterr().err)


def test_what_was_written_just_before_a_rotation_is_read(table, monkeypatch):
    def rotated(file):
        if len(Path("a.csv").read_text().splitlines()) == 41:
            with open("a.csv", "a") as old:
                old.write("rome,1,1\n")
        return False

    monkeypatch.setattr(reading, "_in_place", rotated)
    found = []
    with open("a.csv", "rb") as file, pytest.raises(OSError, match="was renamed or replaced"):
        found.extend(lines(file, follow=True))
    assert found[-1] == [b"rome,1,1"]


def test_a_record_in_place_of_the_header_is_not_shown(capsys):
    Path("a.csv").write_text("alice,secret-diagnosis\nbob,flu\n")
    ask = ["--count", "--columns", "page", "--values", "x", "--horizon", 9, "--rho", 1]
    assert release(*ask, "a.csv") == cli.USAGE
    error = capsys.readouterr().err
    assert one_line(error).endswith("the header has no column 'page', of 2 in all")
    assert "alice" not in error
    assert "secret" not in error

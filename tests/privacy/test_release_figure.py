# SPDX-License-Identifier: Apache-2.0
"""The figure of `batchery release`, and its test mode."""

from pathlib import Path

import numpy as np
import pytest
from release_runs import CITIES, COUNT, SUM, csv_of, one_line, published, release

from batchery import cli
from batchery.privacy import release as engine
from batchery.privacy.release_command import OVERSPENT

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def truths(monkeypatch):
    """The truth that each figure was drawn with."""
    given, draw = [], engine.draw

    def spy(job, releases, truth, bound):
        given.append(truth)
        draw(job, releases, truth, bound)

    monkeypatch.setattr(engine, "draw", spy)
    return given


def answers(ask, table):
    """The true answer after every second record, by number."""
    city = np.array([[row["city"] == name for name in CITIES] for row in table]).cumsum(0)
    pair = np.array([[row["amount"], row["bit"]] for row in table]).cumsum(0)
    found = {
        "--count": city,
        "--sum": pair,
        "--max": city.max(1),
        "--select": city.argmax(1),
    }[ask[0]]
    return dict(enumerate(found[1::2].tolist(), 1))


@pytest.mark.parametrize("ask", [COUNT, SUM, ["--max", *COUNT[1:]], ["--select", *COUNT[1:]]])
def test_figures_show_the_truth_in_test_mode_alone(ask, table, truths, capsys):
    shared = [*ask, "--horizon", 40, "--rho", 1, "--every", 2, "a.csv"]
    assert release(*shared, "--plot", "p.svg", ledger="p.db") == 0
    assert "TEST" not in capsys.readouterr().err
    assert truths == [{}]
    Path("a.csv").write_text(csv_of(table[:20]))
    assert release(*shared, "--test-mode") == 0
    Path("a.csv").write_text(csv_of(table))
    truths.clear()
    assert release(*shared, "--plot", "t.svg", "--test-mode") == 0
    assert truths == [answers(ask, table)]
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


def test_the_truth_is_refused_where_records_before_are_not_known(table, truths, capsys):
    shared = [*SUM, "--horizon", 40, "--rho", 1, "--every", 2, "--test-mode"]
    shared += ["--continue", "--plot", "t.svg", "a.csv"]
    Path("a.csv").write_text(csv_of(table[:20]))
    assert release(*shared) == 0
    assert truths.pop() == answers(SUM, table[:20])  # nothing was consumed before
    assert "the truth is not drawn" not in capsys.readouterr().err
    Path("a.csv").write_text(csv_of(table[20:]))
    assert release(*shared) == 0
    assert truths == [{}]
    assert "<!-- truth -->" not in Path("t.svg").read_text()
    assert "the truth is not drawn: it needs those records too" in capsys.readouterr().err


def test_a_figure_is_drawn_when_the_stream_stops(table, capsys):
    assert release("--count", "--horizon", 9, "--rho", 1, "a.csv", "--plot", "p.png") == OVERSPENT
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")

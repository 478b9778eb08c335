# SPDX-License-Identifier: Apache-2.0
import io
import json
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from batchery import __main__ as entry
from batchery import cli
from batchery.cards import load_cards
from batchery.datasets import MissingData
from batchery.studies import harness
from batchery.studies.report import arm_rows, stored_results
from batchery.studies.study import UNSHOWN, Comparison, Metric, Outcome, Study

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Every slug's study is a quick one whose losses the test may change."""
    monkeypatch.chdir(tmp_path)
    losses = {"old": 2.0, "new": 1.0}

    def load(slug):
        def arm(name):
            def run(trial):
                if losses[name] is None:
                    raise MissingData(name="x", file="x.txt", reason="absent", command="get x")
                return Outcome({"loss": losses[name] + 0.01 * trial.seed})

            return run

        arms = {name: arm(name) for name in losses}
        comparison = Comparison("new", "old", "loss")
        metric = Metric("loss", "loss", "lower")
        return Study(slug, "c", "p", arms, [metric], [comparison], {"smoke": 1, "cpu": 2, "gpu": 1})

    monkeypatch.setattr(harness, "load_study", load)
    return losses


def _first_words(table):
    """The first column of a table below its header; a line that goes on begins with space."""
    rows = table.split("\n")[1:]
    return {row.split()[0] for row in rows if row[:2].strip()}


def _one_line(text):
    return len(text.strip().split("\n")) == 1


def test_list_and_search(capsys):
    assert cli.main(["list"]) == 0
    assert {"lamb", "wsd", "marlin"} < _first_words(capsys.readouterr().out)
    assert cli.main(["list", "BERT", "training"]) == 0
    assert _first_words(capsys.readouterr().out) == {"lamb"}
    assert cli.main(["list", "LARS"]) == 0  # an object's name
    assert _first_words(capsys.readouterr().out) == {"lamb"}
    assert cli.main(["list", "no-such-word-anywhere"]) == 1
    assert "no card holds" in capsys.readouterr().err


def test_show(capsys):
    assert cli.main(["show", "lamb"]) == 0
    assert "Minimal example" in capsys.readouterr().out


@pytest.fixture
def printed(monkeypatch):
    """Make the console a text of so many columns."""

    def make(columns):
        file = io.StringIO()
        monkeypatch.setattr(cli, "console", Console(file=file, width=columns))
        return file

    return make


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("entry", stored_results(load_cards(), RESULTS), ids=".".join)
def test_no_word_or_number_of_a_stored_result_is_cut(printed, entry, columns):
    result = harness.load_result(RESULTS, *entry)
    file = printed(columns)
    cli._print_result(result)
    text = file.getvalue()
    assert max(map(len, text.split("\n"))) <= columns
    assert not re.search(r"\S…|…\S", text)
    header, rows = arm_rows(result)
    words = set(text.split())
    for cell in header + [row[0] for row in rows]:
        assert set(cell.split()) <= words
    for row in rows:
        assert all(cell in text for cell in row[1:])


def test_a_table_that_is_too_wide_comes_in_parts_of_the_rows_that_have_them(printed):
    header = ["arm", "the first number", "second", "third"]
    rows = [["one", "1.00 ± 0.01", "", "7"], ["the other", "", "2.00 ± 0.02", ""]]
    for columns, expected in (
        (60, ["arm the first number second third", "one 1.00 ± 0.01 7", "the other 2.00 ± 0.02"]),
        (
            32,
            ["arm the first number", "one 1.00 ± 0.01", ""]
            + ["arm second third", "one 7", "the other 2.00 ± 0.02"],
        ),
    ):
        file = printed(columns)
        cli._print_table(header, rows)
        assert [" ".join(line.split()) for line in file.getvalue().rstrip().split("\n")] == expected


def test_all_systems_end_with_one_table_of_verdicts(toy, printed):
    file = printed(100)
    assert cli.main(["study", "--all", "--scale", "cpu", "--seeds", "2", "--report", "report"]) == 0
    lines = [line.split() for line in file.getvalue().strip().split("\n")]
    assert lines[0] == ["system", "arms", "runs", "seconds", "verdict"]
    slugs = [card.slug for card in load_cards()]
    assert [line[:3] for line in lines[1 : len(slugs) + 1]] == [[slug, "2", "4"] for slug in slugs]
    assert lines[-1] == ["report:", "report/index.html"]


def test_show_prints_stored_results_with_their_protocol(printed):
    file = printed(80)
    assert cli.main(["show", "hard-batches", "--results", str(RESULTS)]) == 0
    text = file.getvalue()
    order = ["What we measured", "hard-batches (cpu):", "verdict:", "hard-batches (gpu):"]
    places = [text.index(part) for part in [*order, "Compared with"]]
    assert places == sorted(places)
    assert "protocol: Every arm makes as many updates" in text
    assert not re.search(r"\S…", text[places[1] : places[-1]])


def test_show_without_results_says_so(printed, tmp_path):
    file = printed(80)
    assert cli.main(["show", "lamb", "--results", str(tmp_path)]) == 0
    assert "No stored result yet." in file.getvalue()


def test_a_misspelt_slug_brings_the_nearest(capsys):
    assert cli.main(["show", "lam"]) == cli.USAGE
    error = capsys.readouterr().err
    assert "lamb" in error
    assert _one_line(error)


@pytest.mark.parametrize(
    "arguments",
    [
        ["study"],
        ["study", "lamb", "--all"],
        ["study", "lamb", "--scale", "huge"],
        ["study", "lamb", "--device", "nonsense"],
        ["study", "lamb", "--device", "xpu"],
        ["study", "lamb", "--device", "meta"],
        ["study", "lamb", "--device", "cuda:9999999999"],
        ["study", "lamb", "--seeds", "0"],
        ["study", "lamb", "--seeds", "many"],
        ["study", "nothing-like-it"],
        ["data", "nothing-like-it"],
        ["dance"],
        [],
    ],
)
def test_bad_arguments_bring_one_clear_line(arguments, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    assert status == cli.USAGE
    error = capsys.readouterr().err
    assert error.startswith("batchery")
    assert _one_line(error)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_cuda_is_a_wrong_argument(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["study", "lamb", "--device", device])
    assert exit_.value.code == cli.USAGE
    error = capsys.readouterr().err
    assert f"{device} is not here: CUDA has 0 devices" in error
    assert _one_line(error)


def test_a_slug_named_twice_runs_once(toy, capsys):
    assert cli.main(["study", "lamb", "wsd", "lamb", "--results", "out"]) == 0
    assert capsys.readouterr().out.count("lamb (cpu)") == 1


def test_study_writes_result_figure_and_report(toy, tmp_path, capsys):
    assert cli.main(["study", "lamb", "--report", "page", "--results", "out"]) == 0
    printed = capsys.readouterr().out
    assert "verdict: holds" in printed
    assert json.loads((tmp_path / "out/lamb.cpu.json").read_text())["verdict"] == "holds"
    assert (tmp_path / "out/lamb.cpu.svg").is_file()
    assert (tmp_path / "page/index.html").is_file()
    assert not list((tmp_path / "out/.runs").glob("*/*.json"))


def test_check_fails_when_a_stored_claim_no_longer_holds(toy, tmp_path, capsys):
    assert cli.main(["study", "lamb", "--results", "out"]) == 0
    stored = (tmp_path / "out/lamb.cpu.json").read_bytes()
    assert cli.main(["study", "lamb", "--results", "out", "--check"]) == 0
    toy["new"] = 3.0
    assert cli.main(["study", "lamb", "--results", "out", "--check"]) == cli.FAILED
    assert (tmp_path / "out/lamb.cpu.json").read_bytes() == stored
    assert "lamb: no longer holds: new vs old on loss" in capsys.readouterr().err


def test_check_with_one_seed_names_what_it_cannot_check(toy, tmp_path, capsys):
    assert cli.main(["study", "lamb", "--results", "out"]) == 0
    capsys.readouterr()
    assert cli.main(["study", "lamb", "--results", "out", "--check", "--seeds", "1"]) == 0
    shown, error = capsys.readouterr()
    assert "0 of 2 claims that held still hold" in shown
    assert "unchecked, for want of an arm or of seeds: new vs old on loss" in shown
    assert "no longer holds" not in error


def test_check_looks_behind_a_verdict_that_did_not_hold(toy, tmp_path):
    assert cli.main(["study", "lamb", "--results", "out"]) == 0
    path = tmp_path / "out/lamb.cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": UNSHOWN}))
    assert cli.main(["study", "lamb", "--results", "out", "--check"]) == 0
    toy["new"] = 3.0
    assert cli.main(["study", "lamb", "--results", "out", "--check"]) == cli.FAILED


def test_check_against_nothing_fails_and_checks_the_others(toy, tmp_path, capsys):
    assert cli.main(["study", "lamb", "--results", "out", "--check"]) == cli.FAILED
    error = capsys.readouterr().err
    assert "lamb: nothing to check against, no stored result out/lamb.cpu.json" in error
    assert _one_line(error)
    assert cli.main(["study", "wsd", "--results", "out"]) == 0
    capsys.readouterr()
    assert cli.main(["study", "lamb", "wsd", "--results", "out", "--check"]) == cli.FAILED
    assert "wsd: stored 'holds', now 'holds'" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{bad", "{}"])
@pytest.mark.parametrize(
    "verb", [["show", "lamb"], ["report", "page"], ["study", "lamb", "--check"]]
)
def test_a_damaged_result_is_named(toy, tmp_path, capsys, verb, text):
    (tmp_path / "lamb.cpu.json").write_text(text)
    assert cli.main([*verb, "--results", str(tmp_path)]) == cli.FAILED
    error = capsys.readouterr().err
    assert f"stored result {tmp_path}/lamb.cpu.json" in error
    assert _one_line(error)


def test_missing_data_is_named_and_does_not_stop_the_other_studies(toy, tmp_path, capsys):
    toy["new"] = None
    assert cli.main(["study", "lamb", "wsd", "--results", "out"]) == cli.NO_DATA
    error = capsys.readouterr().err
    assert "x.txt" in error
    assert "get x" in error
    toy["new"] = 1.0
    assert cli.main(["study", "lamb", "wsd", "--results", "out"]) == 0


def test_report_of_stored_results(toy, tmp_path, capsys):
    assert cli.main(["report", "--results", "out"]) == cli.FAILED
    assert "no stored results in out" in capsys.readouterr().err
    cli.main(["study", "lamb", "--results", "out"])
    assert cli.main(["report", "page", "--results", "out"]) == 0
    assert (tmp_path / "page/index.html").is_file()


def test_ctrl_c_while_modules_load_brings_one_line(monkeypatch, capsys):
    class Interrupted(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "batchery.cli", Interrupted("batchery.cli"))
    assert entry.main() == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"


@pytest.mark.slow
def test_ctrl_c_keeps_finished_runs_and_the_same_command_resumes(tmp_path):
    command = [sys.executable, "-m", "batchery.cli", "study", "hard-batches"]
    command += ["--scale", "smoke", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    runs = tmp_path / ".runs" / "hard-batches.smoke"
    deadline = time.monotonic() + 60
    while len(list(runs.glob("*.json"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, error
    assert "the same command goes on from here" in error
    assert "Traceback" not in error
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "finished runs are here already" in again.stdout
    assert not runs.exists()

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math

import pytest
import torch

from batchery.studies import harness
from batchery.studies.harness import forget_runs, kept_runs, load_result, run_study
from batchery.studies.study import HOLDS, Comparison, Metric, Outcome, Study


class Toy:
    """A study whose arms note each call, and can stop or diverge on demand."""

    def __init__(self):
        self.calls = []
        self.interrupt_at = None
        self.diverge = False

    def _arm(self, name, loss):
        def run(trial):
            self.calls.append((name, trial.seed))
            if len(self.calls) == self.interrupt_at:
                raise KeyboardInterrupt
            trial.progress(1, 2)
            value = math.nan if self.diverge and name == "new" else loss + 0.01 * trial.seed
            return Outcome({"loss": value + trial.prepared["shift"]}, {"curve": [2.0, value]})

        return run

    def prepare(self, trial):
        self.calls.append(("prepare", trial.seed))
        return {"shift": 1.0}

    def study(self):
        return Study(
            "toy",
            "new beats old",
            "equal everything",
            {"old": self._arm("old", 2.0), "new": self._arm("new", 1.0)},
            [Metric("loss", "loss", "lower", "nats")],
            [Comparison("new", "old", "loss")],
            {"smoke": 1, "cpu": 3, "gpu": 3},
            prepare=self.prepare,
        )


@pytest.fixture
def toy():
    return Toy()


def test_a_result_holds_what_a_reader_needs(toy, tmp_path):
    result = run_study(toy.study(), "cpu", results=tmp_path)
    assert result["verdict"] == HOLDS
    stored = load_result(tmp_path, "toy", "cpu")
    assert stored == json.loads(json.dumps(result))
    new = stored["arms"][1]
    assert new["name"] == "new"
    assert [run["metrics"]["loss"] for run in new["runs"]] == pytest.approx([2.0, 2.01, 2.02])
    assert new["summary"]["loss"] == pytest.approx({"mean": 2.01, "sd": 0.01})
    assert new["runs"][0]["memory"]["process_mib"] > 10
    assert stored["environment"]["versions"]["torch"] == torch.__version__
    assert stored["prepared"]["value"] == {"shift": 1.0}
    assert stored["comparisons"][0]["effect"] == pytest.approx(1.0)
    assert toy.calls[:3] == [("prepare", 0), ("old", 0), ("new", 0)]


def test_an_interrupted_study_goes_on_where_it_stopped(toy, tmp_path):
    toy.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        run_study(toy.study(), "cpu", results=tmp_path)
    assert kept_runs(tmp_path, "toy", "cpu") == 4
    assert load_result(tmp_path, "toy", "cpu") is None
    toy.calls.clear()
    toy.interrupt_at = None
    resumed = run_study(toy.study(), "cpu", results=tmp_path)
    assert toy.calls == [("new", 1), ("old", 2), ("new", 2)]
    whole = run_study(Toy().study(), "cpu", results=tmp_path / "other")
    assert [a["summary"] for a in resumed["arms"]] == [a["summary"] for a in whole["arms"]]
    assert kept_runs(tmp_path, "toy", "cpu") == 0


def test_runs_made_by_other_code_are_not_used(toy, tmp_path, monkeypatch):
    toy.interrupt_at = 4
    with pytest.raises(KeyboardInterrupt):
        run_study(toy.study(), "cpu", results=tmp_path)
    toy.calls.clear()
    toy.interrupt_at = None
    monkeypatch.setattr(harness, "source_hash", lambda: "another")
    run_study(toy.study(), "cpu", results=tmp_path)
    assert len(toy.calls) == 7


def test_runs_can_be_kept_for_a_group_of_studies(toy, tmp_path):
    run_study(toy.study(), "cpu", results=tmp_path, keep_runs=True)
    assert kept_runs(tmp_path, "toy", "cpu") == 7
    toy.calls.clear()
    run_study(toy.study(), "cpu", results=tmp_path, keep_runs=True)
    assert toy.calls == []
    forget_runs(tmp_path, "toy", "cpu")
    assert kept_runs(tmp_path, "toy", "cpu") == 0


def test_divergence_is_a_result_and_the_file_is_valid_json(toy, tmp_path):
    toy.diverge = True
    run_study(toy.study(), "cpu", results=tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads((tmp_path / "toy.cpu.json").read_text(), parse_constant=refuse)
    assert stored["verdict"] == "does not hold here"
    assert stored["arms"][1]["summary"]["loss"]["mean"] is None


def test_progress_ends_at_one_and_never_goes_back(toy, tmp_path):
    seen = []
    run_study(toy.study(), "cpu", results=tmp_path, on_progress=lambda _, part: seen.append(part))
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0


def test_bad_arguments(toy, tmp_path):
    with pytest.raises(ValueError, match="study toy: scale must be one of .*, got 'huge'"):
        run_study(toy.study(), "huge", results=tmp_path)
    with pytest.raises(ValueError, match="study toy: seeds must be >= 1, got 0"):
        run_study(toy.study(), "cpu", results=tmp_path, seeds=0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="scale 'gpu' on device cuda needs CUDA"):
            run_study(toy.study(), "gpu", results=tmp_path)


def test_a_comparison_without_its_metric_is_an_error(toy, tmp_path):
    study = toy.study()
    broken = {"old": lambda trial: Outcome({}), "new": study.arms["new"]}
    object.__setattr__(study, "arms", broken)
    with pytest.raises(ValueError, match="needs loss of both arms"):
        run_study(study, "cpu", results=tmp_path)


def test_a_study_computes_with_its_own_threads_and_gives_the_others_back(toy, tmp_path):
    before = torch.get_num_threads()
    seen = []

    def arm(trial):
        seen.append(torch.get_num_threads())
        return Outcome({"loss": 1.0})

    study = dataclasses.replace(toy.study(), arms={"old": arm, "new": arm}, threads=3)
    result = run_study(study, "smoke", results=tmp_path)
    assert seen == [3, 3]
    assert result["environment"]["threads"] == 3
    assert torch.get_num_threads() == before

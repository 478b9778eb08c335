# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math
import re

import pytest
import torch

from batchery import datasets
from batchery.cards import load_cards
from batchery.datasets import MissingData
from batchery.studies import harness
from batchery.studies.harness import (
    CorruptResult,
    forget_runs,
    kept_runs,
    load_result,
    load_study,
    run_study,
    source_hash,
)
from batchery.studies.study import HOLDS, SCALES, Comparison, Metric, Outcome, Study


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


@pytest.mark.parametrize("label", ["prepare", "old"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{bad",
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text[:-30],
        lambda text: text.replace("{", "\xff", 1),
        lambda text: json.dumps(json.loads(text) | {"record": {}}),
        lambda text: json.dumps(json.loads(text) | {"record": []}),
        lambda text: text.replace('"seconds"', '"minutes"'),
        lambda text: text.replace('"value"', '"metrics"').replace('"series"', '"value"'),
        lambda text: re.sub(r'("value"|"metrics"): {', r'\1: 7, "more": {', text),
    ],
)
def test_a_damaged_kept_run_is_made_anew(toy, tmp_path, label, damage):
    toy.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        run_study(toy.study(), "cpu", results=tmp_path)
    path = tmp_path / ".runs" / "toy.cpu" / f"{label}.0.json"
    whole = path.read_text()
    path.write_bytes(damage(whole).encode("latin-1"))
    toy.calls.clear()
    toy.interrupt_at = None
    resumed = run_study(toy.study(), "cpu", results=tmp_path, keep_runs=True)
    assert toy.calls == [(label, 0), ("new", 1), ("old", 2), ("new", 2)]
    assert resumed["verdict"] == HOLDS
    assert json.loads(path.read_text()).keys() == json.loads(whole).keys()
    assert json.loads(path.read_text())["record"].keys() == json.loads(whole)["record"].keys()


def test_runs_made_by_other_code_are_not_used(toy, tmp_path, monkeypatch):
    toy.interrupt_at = 4
    with pytest.raises(KeyboardInterrupt):
        run_study(toy.study(), "cpu", results=tmp_path)
    toy.calls.clear()
    toy.interrupt_at = None
    monkeypatch.setattr(harness, "source_hash", lambda: "another")
    run_study(toy.study(), "cpu", results=tmp_path)
    assert len(toy.calls) == 7


@pytest.mark.parametrize("name", ["a.py", "kernels/b.c", "studies/c.jinja"])
def test_every_kind_of_source_makes_other_code(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("old")
    before = source_hash(tmp_path)
    path.write_text("new")
    assert source_hash(tmp_path) != before


def test_data_are_made_sure_of_before_the_first_run(toy, tmp_path, monkeypatch):
    asked = []

    def fetch(name):
        asked.append(name)
        if name == "lost":
            raise MissingData(name, "lost.txt", "gone", "batchery data lost")

    monkeypatch.setattr(datasets, "fetch", fetch)
    study = dataclasses.replace(toy.study(), data={"smoke": ["here"], "cpu": ["here", "lost"]})
    run_study(study, "smoke", results=tmp_path)
    assert asked == ["here"]
    toy.calls.clear()
    with pytest.raises(MissingData, match=r"lost.txt: gone; get it with: batchery data lost"):
        run_study(study, "cpu", results=tmp_path)
    assert toy.calls == []


@pytest.mark.parametrize("card", load_cards(), ids=lambda card: card.slug)
def test_the_data_of_a_study_are_known(card):
    data = load_study(card.slug).data
    assert set(data) == set(SCALES)
    assert all(set(names) <= set(datasets.names()) for names in data.values())


def test_a_stored_result_of_another_shape_is_named(toy, tmp_path):
    whole = run_study(toy.study(), "smoke", results=tmp_path)
    path = tmp_path / "toy.smoke.json"
    for text, message in [
        ("[]", "is a JSON list, not a result"),
        ("{bad", "is not JSON: Expecting property name"),
        ("{}", "has no slug, or not as a str"),
        (json.dumps(whole | {"arms": 3}), "has no arms, or not as a list"),
        (json.dumps(whole | {"arms": []}), "has arms that lack some of memory"),
        (json.dumps(whole | {"metrics": [7]}), "has metrics that lack some of better"),
        (json.dumps(whole | {"environment": {}}), "has environment that lack some of commit"),
    ]:
        path.write_text(text)
        with pytest.raises(CorruptResult, match=rf"stored result .*toy\.smoke\.json {message}"):
            load_result(tmp_path, "toy", "smoke")


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

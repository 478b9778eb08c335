# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from batchery.optim import warmup_fraction
from batchery.studies import lamb
from batchery.studies.lab import LabSize
from batchery.studies.lamb import SIZES, STUDY, Size, steps_to_target
from batchery.studies.study import SCALES, Trial

CPU = torch.device("cpu")


def test_the_claims_rest_on_the_fixed_rule_and_not_on_retuning():
    claims = [c for c in STUDY.comparisons if c.claim]
    assert {c.metric for c in claims} == {"loss_large", "error_large"}
    assert set(STUDY.seeds) == set(SCALES)


@pytest.mark.parametrize(
    ("target", "window", "updates"),
    [(5.0, 1, 0), (2.0, 1, 2), (1.0, 1, 4), (0.5, 1, 6), (2.5, 2, 2), (2.4, 2, 5), (2.5, 3, 4)],
)
def test_updates_to_target_count_those_before_the_first_mean_at_the_target(target, window, updates):
    """Means over 2: 4, 2.5, 3, 2.5, 1. Over 3: 10/3, 3, 7/3, 2."""
    losses = torch.tensor([5.0, 3.0, 2.0, 4.0, 1.0, 1.0])
    assert steps_to_target(losses, target, window) == updates


def test_a_run_that_diverges_after_the_target_has_reached_it_and_one_before_has_not():
    losses = torch.tensor([4.0, 2.0, math.inf, math.nan, math.nan])
    assert steps_to_target(losses, 3.0, 2) == 1
    assert steps_to_target(losses, 2.5, 2) == 5


def test_the_protocol_names_the_targets_and_every_window_holds_whole_batches():
    for scale in ("cpu", "gpu"):
        assert f"{SIZES[scale].target} " in STUDY.protocol
        assert all(lamb.SMOOTHED % batch == 0 for batch in SIZES[scale].batches)
    assert f"{lamb.SMOOTHED:,} samples" in STUDY.protocol


def test_text_grows_to_the_batch_of_the_claim_with_a_fifth_of_warm_up():
    for scale in ("cpu", "gpu"):
        size = SIZES[scale]
        assert size.batches[-1] == 64 * size.batches[0]
        share = warmup_fraction(size.batches[-1], size.batches[0], size.warmup)
        assert share == pytest.approx(1 / 5)
        assert all(size.samples % batch == 0 for batch in size.batches)
    assert "64 times the batch" in STUDY.claim


def test_the_gpu_path_runs_at_toy_size(monkeypatch):
    """The Llama arms on the CPU: every metric, micro-batches included, and a run that diverges."""
    model = LabSize("toy", 16, 1, 1, 1, context=8, vocabulary=257)
    stream = torch.arange(2_000) * 7 % 251
    monkeypatch.setitem(lamb.SIZES, "gpu", Size(model, 64, (4, 16), 1 / 80, 9.0, 1, (64, 512)))
    monkeypatch.setattr(lamb, "_tokens", lambda device: (stream, stream))
    monkeypatch.setattr(lamb, "MICRO_BATCH", 8)
    monkeypatch.setattr(lamb, "SMOOTHED", 16)
    large = {"lr": [2e-3], "width": 3.0}
    prepared = {arm: {"base": {"lr": [1e-3]}, "large": large} for arm in STUDY.arms}
    trial = Trial(0, "gpu", CPU, prepared)
    for arm in ("adamw", "sgd", "lamb"):
        found = STUDY.arms[arm](trial)
        losses = {"loss_large", "loss_base", "loss_retuned"}
        assert set(found.metrics) == losses | {"steps_large", "steps_base", "basin"}
        assert all(math.isfinite(value) for value in found.metrics.values())
        assert found.series["batch"] == [4.0, 16.0]
        assert found.series["steps"] == [3.0, 0.0]  # reached by the first mean, of 16 samples
        assert found.metrics["basin"] == 3.0
    final, losses = lamb._train_text("sgd", 1e30, 4, 0, trial)
    assert final == math.inf
    assert losses.shape == (16,)
    assert losses[0].isfinite()


@pytest.mark.parametrize("lost", [math.inf, None], ids=["fresh", "stored"])
def test_the_figure_writes_widths_and_marks_what_was_not_reached(lost):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    tried = {"0.1": [2.5], "0.2": [2.4], "0.4": [lost]}
    size = SIZES["cpu"]
    series = {"batch": size.batches, "loss": [2.0, 2.1, 2.2, lost], "steps": [300, 90, 50, 28]}
    runs = [{"series": series}]
    wide = {"tried": tried, "width": 2.0, "width_is_whole": True}
    bounds = {"lamb": wide, "adamw": wide | {"width": 3.0, "width_is_whole": False}}
    gone = {"tried": {"0.1": [lost]}, "width": math.nan, "width_is_whole": True}
    result = {
        "scale": "cpu",
        "arms": [{"name": arm, "summary": {"loss_large": {}}, "runs": runs} for arm in STUDY.arms],
        "prepared": {"value": {arm: {"large": bounds.get(arm, gone)} for arm in STUDY.arms}},
    }
    STUDY.figure(figure, result)
    _, steps, _ = figure.axes
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"lamb (basin 2.0 ×)", "adamw (basin ≥ 3.0 ×)", "sgd"} < set(texts)
    unreached = [line.get_xydata()[0].tolist() for line in steps.lines if line.get_marker() == "x"]
    assert unreached == [[2048, 28]] * len(STUDY.arms)
    figure.canvas.draw()


def test_digits_are_tuned_by_the_loss_and_judged_by_the_error(monkeypatch):
    def trained(arm, lr, batch, seed, trial):
        return (0.0 if lr < 0.1 else 5.0), abs(math.log2(lr / 0.5))  # errors would say less

    monkeypatch.setattr(lamb, "_train_digits", trained)
    monkeypatch.setattr(lamb, "_train_text", lambda *_: (1.0, torch.ones(1)))
    monkeypatch.setattr(
        lamb, "walk", lambda run, start, **_: {"lr": [0.5], "tried": {}} | {"seen": run(0.25)}
    )
    monkeypatch.setattr(lamb, "basin_width", lambda *_: (1.0, True))
    chosen = STUDY.prepare(Trial(0, "cpu", CPU))
    assert chosen["sgd-cnn"]["base"]["seen"] == [1.0]
    outcome = STUDY.arms["sgd-cnn"](Trial(0, "cpu", CPU, chosen))
    assert outcome.metrics == dict.fromkeys(("error_large", "error_base", "error_retuned"), 5.0)

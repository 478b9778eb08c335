# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from scipy import stats

from batchery.studies.study import (
    FAILS,
    HOLDS,
    UNSHOWN,
    Comparison,
    Metric,
    Outcome,
    Study,
    check_claims,
    compare,
    overall,
)

LOSS = Metric("loss", "loss", "lower")
ACCURACY = Metric("accuracy", "accuracy", "higher")


def test_the_interval_is_the_paired_t_interval():
    arm, baseline = [1.0, 1.3, 0.9, 1.2], [1.5, 1.6, 1.6, 1.4]
    judged = compare(Comparison("a", "b", "loss"), LOSS, arm, baseline)
    low, high = stats.ttest_rel(baseline, arm).confidence_interval(0.95)
    assert judged["interval"] == pytest.approx([low, high], abs=1e-12)
    assert judged["effect"] == pytest.approx(0.425)
    assert judged["relative"] == pytest.approx(0.425 / 1.525)


@pytest.mark.parametrize(
    ("require", "margin", "gains", "verdict"),
    [
        ("superior", 0.0, [1.0, 1.1, 0.9], HOLDS),
        ("superior", 2.0, [1.0, 1.1, 0.9], FAILS),
        ("superior", 1.0, [1.0, 1.1, 0.9], UNSHOWN),
        ("superior", 0.0, [-1.0, -1.1, -0.9], FAILS),
        ("non-inferior", 0.5, [-0.1, 0.1, 0.0], HOLDS),
        ("non-inferior", 0.5, [-1.0, -1.1, -0.9], FAILS),
        ("non-inferior", 0.1, [-0.1, 0.1, -0.2], UNSHOWN),
        ("superior", 0.0, [1.0], UNSHOWN),
    ],
)
@pytest.mark.parametrize("metric", [LOSS, ACCURACY], ids=lambda m: m.better)
def test_verdict_of_a_comparison(require, margin, gains, verdict, metric):
    sign = 1 if metric.better == "higher" else -1
    arm = [10 + sign * gain for gain in gains]
    comparison = Comparison("a", "b", metric.name, require, margin)
    assert compare(comparison, metric, arm, [10.0] * len(gains))["verdict"] == verdict


def test_divergence_decides_against_the_arm_that_diverged():
    comparison = Comparison("a", "b", "loss")
    lost = compare(comparison, LOSS, [math.nan, 1.0], [2.0, 2.0])
    assert (lost["verdict"], lost["reason"]) == (FAILS, "arm diverged")
    other = compare(comparison, LOSS, [1.0, 1.0], [math.inf, 2.0])
    assert (other["verdict"], other["reason"]) == (UNSHOWN, "baseline diverged")


def _judged(verdict, claim=True):
    return {"arm": "a", "baseline": "b", "metric": "m", "verdict": verdict, "claim": claim} | {
        "reason": ""
    }


def test_one_failed_claim_decides_and_information_does_not():
    assert overall("cpu", [_judged(HOLDS), _judged(FAILS, claim=False)]) == (HOLDS, "")
    assert overall("cpu", [_judged(HOLDS), _judged(UNSHOWN)])[0] == UNSHOWN
    assert overall("cpu", [_judged(UNSHOWN), _judged(FAILS)]) == (FAILS, "a vs b on m")
    assert overall("smoke", [_judged(HOLDS)])[0] == UNSHOWN


def _result(verdict, *comparisons, left_out=()):
    bar = {"baseline": "b", "metric": "m", "require": "superior", "margin": 0.0}
    bar |= {"reason": ""}
    rows = [{**bar, "arm": arm, "verdict": v, "claim": claim} for arm, v, claim in comparisons]
    return {"verdict": verdict, "comparisons": rows, "left_out": dict.fromkeys(left_out, "why")}


def test_a_check_asks_for_every_claim_that_held_whatever_the_verdict():
    before = _result(
        UNSHOWN, ("a", HOLDS, True), ("c", HOLDS, True), ("d", UNSHOWN, True), ("e", HOLDS, False)
    )
    now = _result(
        UNSHOWN, ("a", HOLDS, True), ("c", UNSHOWN, True), ("d", FAILS, True), ("e", FAILS, False)
    )
    assert check_claims(before, before)["lost"] == []
    assert check_claims(before, now) == {
        "kept": ["a vs b on m"],
        "lost": ["c vs b on m"],
        "unchecked": [],
    }


def test_a_check_asks_for_the_same_bar_and_for_the_verdict():
    before, now = _result(HOLDS, ("a", HOLDS, True)), _result(HOLDS, ("a", HOLDS, True))
    now["comparisons"][0]["margin"] = -0.1
    assert check_claims(before, now)["lost"] == ["a vs b on m"]
    stricter = _result(UNSHOWN, ("a", HOLDS, True), ("new", UNSHOWN, True))
    assert check_claims(before, stricter)["lost"] == ["the verdict"]


@pytest.mark.parametrize("away", ["c", "b"])
def test_a_claim_of_an_arm_that_is_left_out_is_unchecked(away):
    before = _result(HOLDS, ("c", HOLDS, True))
    now = _result(UNSHOWN, ("c", UNSHOWN, True), left_out=[away])
    names = ["c vs b on m", "the verdict"]
    assert check_claims(before, now) == {"kept": [], "lost": [], "unchecked": names}


def _judged_on(*pairs):
    """A result whose one comparison has these values of arm and baseline, seed by seed."""
    row = compare(Comparison("a", "b", "loss"), LOSS, *map(list, zip(*pairs, strict=True)))
    verdict, reason = overall("cpu", [row])
    return {"verdict": verdict, "reason": reason, "comparisons": [row], "left_out": {}}


def test_a_claim_that_one_seed_cannot_judge_is_unchecked_and_a_diverged_one_is_lost():
    before = _judged_on((1.0, 2.0), (1.1, 2.0))
    assert before["verdict"] == HOLDS
    names = ["a vs b on loss", "the verdict"]
    for value in (1.0, 3.0):
        found = check_claims(before, _judged_on((value, 2.0)))
        assert found == {"kept": [], "lost": [], "unchecked": names}
    for pair in ((math.nan, 2.0), (1.0, math.inf)):
        assert check_claims(before, _judged_on(pair))["lost"] == names


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        (Comparison("x", "b", "loss"), "comparison.arm must be one of 'a', 'b', got 'x'"),
        (Comparison("a", "y", "loss"), "comparison.baseline must be one of 'a', 'b', got 'y'"),
        (Comparison("a", "b", "z"), "comparison.metric must be one of 'loss', got 'z'"),
        (Comparison("a", "b", "loss", claim=False), "must hold at least one claim, got 0"),
    ],
)
def test_a_study_that_cannot_be_judged_is_refused(comparison, message):
    arms = {"a": lambda t: Outcome({}), "b": lambda t: Outcome({})}
    with pytest.raises(ValueError, match=message):
        Study("toy", "claim", "protocol", arms, [LOSS], [comparison], {"cpu": 2})

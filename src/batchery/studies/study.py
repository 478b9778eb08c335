# SPDX-License-Identifier: Apache-2.0
"""What a study is, and how its verdict follows from its numbers.

A study names its arms, the metrics each arm returns, and the comparisons that must hold for the
claim to hold. All of this is written before anything runs; the verdict is computed, never typed.

Every comparison is paired on the seed. With differences d_i (arm minus baseline, signed so that
positive is better) over n seeds, the 95 % interval is mean(d) ± t(0.975, n-1) · sd(d) / sqrt(n).

    superior       holds when the whole interval lies above the margin
    non-inferior   holds when the whole interval lies above minus the margin

An interval wholly on the other side of its bar fails; one that straddles the bar, or a single
seed, cannot show either.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from batchery._core.validate import one_of, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["smoke", "cpu", "gpu"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "gpu")

HOLDS = "holds"
FAILS = "does not hold here"
UNSHOWN = "cannot be shown here"
ONE_SEED = "one seed gives no interval"  # a reason


@dataclass(frozen=True)
class Trial:
    """One run of one arm: what the arm's function is given.

    Attributes:
        seed: 0, 1, 2, …; the same seed gives every arm the same data order and initial weights.
        scale: how large the run may be.
        device: where to compute.
        prepared: what the study's `prepare` returned (for instance the tuned learning rates).
        progress: call `progress(done, total)` now and then; it only feeds the progress bar.
    """

    seed: int
    scale: Scale
    device: torch.device
    prepared: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class Outcome:
    """What one run measured: numbers by metric name, and curves by series name."""

    metrics: dict[str, float]
    series: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A number that arms return under `name`."""

    name: str
    label: str
    better: Literal["higher", "lower"]
    unit: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Comparison:
    """One bar that an arm must clear against a baseline, set before the study runs.

    Attributes:
        arm: name of the arm under test.
        baseline: name of the arm it is measured against.
        metric: name of the metric compared.
        require: `"superior"` or `"non-inferior"`.
        margin: smallest difference that counts (superior) or largest loss allowed (non-inferior),
            in the metric's unit.
        claim: whether the verdict depends on it; otherwise it is reported for information.
    """

    arm: str
    baseline: str
    metric: str
    require: Literal["superior", "non-inferior"] = "superior"
    margin: float = 0.0
    claim: bool = True


@dataclass(frozen=True)
class Study:
    """A claim, the arms that test it, and the bars they must clear.

    Attributes:
        slug: the system's slug; the card of the same name must exist.
        claim: one sentence, with the number that would show it.
        protocol: data, budget, tuning and what is equal between arms, in a few sentences.
        arms: name → function from a `Trial` to an `Outcome`. Order is the order of the tables.
        metrics: what arms return (an arm may leave out one that it has no comparison on); the
            first is the headline.
        comparisons: the bars.
        seeds: how many seeds at each scale.
        data: names of the data sets it needs at each scale (`batchery.datasets`); the harness makes
            sure of them before the first run.
        prepare: runs once before the arms (with seed 0); its JSON-able result reaches every trial
            as `prepared` and is stored. Tuning that is the same for every arm belongs here.
        left_out: tells of a scale which arms cannot run on this machine, and why: for instance for
            want of published weights. The result names them; their comparisons cannot be shown.
        threads: CPU threads to compute with. Operations of small models take less time than two
            threads take to meet; a study of large ones sets None for all there are.
        figure: draws the study's figure from the result's JSON; None draws the headline metric.
    """

    slug: str
    claim: str
    protocol: str
    arms: Mapping[str, Callable[[Trial], Outcome]]
    metrics: Sequence[Metric]
    comparisons: Sequence[Comparison]
    seeds: Mapping[Scale, int]
    data: Mapping[Scale, Sequence[str]] = field(default_factory=dict)
    prepare: Callable[[Trial], dict[str, Any]] | None = None
    left_out: Callable[[Scale], Mapping[str, str]] = lambda scale: {}
    threads: int | None = 1
    figure: "Callable[[Figure, dict[str, Any]], None] | None" = None

    def __post_init__(self) -> None:
        """Refuse comparisons that name no arm or metric of this study."""
        owner = f"Study {self.slug}"
        names = [metric.name for metric in self.metrics]
        claims = sum(comparison.claim for comparison in self.comparisons)
        require(claims > 0, owner, "comparisons", "must hold at least one claim", claims)
        for comparison in self.comparisons:
            one_of(owner, "comparison.arm", comparison.arm, self.arms)
            one_of(owner, "comparison.baseline", comparison.baseline, self.arms)
            one_of(owner, "comparison.metric", comparison.metric, names)

    def metric(self, name: str) -> Metric:
        """Return the metric called `name`."""
        return next(metric for metric in self.metrics if metric.name == name)


def compare(
    comparison: Comparison, metric: Metric, arm: Sequence[float], baseline: Sequence[float]
) -> dict[str, Any]:
    """Judge one comparison from the values of both arms, paired by position (seed).

    Returns:
        A JSON-able record: the comparison's fields, `effect` and `interval` (positive is better),
        `relative` (effect over the baseline's mean), `verdict` and `reason`.
    """
    from scipy.stats import t as student_t

    sign = 1.0 if metric.better == "higher" else -1.0
    gains = [sign * (a - b) for a, b in zip(arm, baseline, strict=True)]
    finite = all(math.isfinite(gain) for gain in gains)
    effect = statistics.fmean(gains) if finite else math.nan
    interval, verdict, reason = None, UNSHOWN, ""
    bar = comparison.margin if comparison.require == "superior" else -comparison.margin
    if not finite:
        # A run that diverged is a result: it decides against the arm that diverged.
        lost = any(not math.isfinite(value) for value in arm)
        verdict, reason = (FAILS if lost else UNSHOWN), f"{'arm' if lost else 'baseline'} diverged"
    elif len(gains) < 2:
        reason = ONE_SEED
    else:
        spread = statistics.stdev(gains) / math.sqrt(len(gains))
        half = float(student_t.ppf(0.975, len(gains) - 1)) * spread
        interval = [effect - half, effect + half]
        if interval[0] > bar:
            verdict = HOLDS
        elif interval[1] < bar:
            verdict = FAILS
        else:
            reason = f"the interval straddles {bar:g} with {len(gains)} seeds"
    base = statistics.fmean(baseline)
    return {
        **vars(comparison),
        "effect": effect,
        "interval": interval,
        "relative": effect / abs(base) if base and math.isfinite(base) else None,
        "verdict": verdict,
        "reason": reason,
    }


def not_compared(comparison: Comparison, reason: str) -> dict[str, Any]:
    """Return the record of a comparison, as of `compare`, one of whose arms did not run."""
    unknown = {"effect": None, "interval": None, "relative": None}
    return {**vars(comparison), **unknown, "verdict": UNSHOWN, "reason": reason}


def check_claims(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sort what held in a stored result by whether it still holds in a new one.

    What held are the comparisons marked as claims, and the verdict. A claim that is no longer
    compared against the same bar is lost; one of an arm that was left out, or of a single seed,
    which gives no interval, is unchecked.

    Returns:
        What is `"kept"`, `"lost"` and `"unchecked"`, by name.
    """

    def bar(item: Mapping[str, Any]) -> tuple[object, ...]:
        return tuple(item[key] for key in ("arm", "baseline", "metric", "require", "margin"))

    def unchecked(item: Mapping[str, Any]) -> bool:
        absent = item["arm"] in now["left_out"] or item["baseline"] in now["left_out"]
        return absent or bar(item) in without_interval

    found: dict[str, list[str]] = {"kept": [], "lost": [], "unchecked": []}
    holding = {bar(item) for item in now["comparisons"] if item["verdict"] == HOLDS}
    without_interval = {bar(item) for item in now["comparisons"] if item["reason"] == ONE_SEED}
    for item in before["comparisons"]:
        if item["claim"] and item["verdict"] == HOLDS:
            state = "kept" if bar(item) in holding else "lost"
            name = f"{item['arm']} vs {item['baseline']} on {item['metric']}"
            found["unchecked" if unchecked(item) else state].append(name)
    if before["verdict"] == HOLDS:
        short = [item for item in now["comparisons"] if item["claim"] and item["verdict"] != HOLDS]
        state = "kept" if not short else "unchecked" if all(map(unchecked, short)) else "lost"
        found[state].append("the verdict")
    return found


def overall(scale: Scale, comparisons: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Combine the claim's comparisons into the study's verdict and its reason."""
    if scale == "smoke":
        return UNSHOWN, "the smoke scale only shows that the study runs"
    claims = [c for c in comparisons if c["claim"]]
    for verdict in (FAILS, UNSHOWN):
        short = [c for c in claims if c["verdict"] == verdict]
        if short:
            what = "; ".join(
                f"{c['arm']} vs {c['baseline']} on {c['metric']}"
                + (f" ({c['reason']})" if c["reason"] else "")
                for c in short
            )
            return verdict, what
    return HOLDS, ""

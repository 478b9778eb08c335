# SPDX-License-Identifier: Apache-2.0
"""Does one WSD run give the losses of many cosine runs, and does a wind tunnel carry over?

Three parts. Schedules: cosine trained once for each budget, beside one stable run with a decaying
branch at each. Transfer: the learning rate found on a narrow model, used along a row of wider ones,
in muP and in standard parametrisation. Scaling law: the losses of a larger model, predicted from
the branches of smaller ones. The last two are in `wind_tunnel.py`.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from batchery.studies.char import CharPerceptron, char_loss, held_out_loss
from batchery.studies.lab import LabSize
from batchery.studies.study import SCALES, Comparison, Metric, Outcome, Scale, Study, Trial
from batchery.studies.tuning import walk
from batchery.studies.wind_tunnel import (
    DECAY,
    TUNING_SEED,
    LlamaTask,
    Run,
    StableRun,
    Task,
    examples,
    law_arm,
    llama,
    prepare_tunnel,
    stable_run,
    transfer_arm,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHORT = 0.025  # share of the steps, of the decay that the paper found too short
CONTEXT = 12  # characters that the perceptron sees


@dataclass(frozen=True)
class PerceptronTask:
    """The perceptron on characters."""

    width: int
    batch: int

    def new_model(self, seed: int) -> nn.Module:
        """Return a model with fresh weights."""
        return CharPerceptron(CONTEXT, self.width, seed)

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Return one group."""
        return [{"params": list(model.parameters()), "lr": lr, "weight_decay": 0.01}]

    def advance(self, run: Run, steps: int) -> None:
        """Train on the examples of steps `run.step` and on."""
        for step in range(run.step, run.step + steps):
            loss = char_loss(run.model, examples(run.seed, step, self.batch, CONTEXT))
            run.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            run.optimizer.step()
            run.schedule.step()

    def held_out(self, model: nn.Module) -> float:
        """Return the loss on windows that are the same for every run."""
        return held_out_loss(model)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """How large the schedules' part is at a scale."""

    size: LabSize | tuple[int, int]  # of the Llama, or width and batch of the perceptron
    budgets: tuple[int, int, int]  # steps
    warmup: int
    start: float  # learning rate at which both walks begin

    def task(self, device: torch.device) -> Task:
        """Return what is trained."""
        if isinstance(self.size, LabSize):
            return LlamaTask(self.size, device)
        return PerceptronTask(*self.size)


PLANS: dict[Scale, Plan] = {
    "smoke": Plan((32, 64), (40, 80, 160), 5, 4e-3),
    "cpu": Plan((192, 128), (400, 800, 1600), 50, 1.6e-2),
    "gpu": Plan(llama(256, 2, batch=64, context=256), (150, 300, 600), 20, 4e-3),
}


def _cosine(optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
    """Linear warm-up, then half a cosine to zero."""

    def factor(step: int) -> float:
        part = (step - warmup) / (steps - warmup)
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(part, 0.0))))

    return LambdaLR(optimizer, factor)


def _cosine_losses(trial: Trial, seed: int, rates: Sequence[float]) -> list[float]:
    """Train once for every budget, each with its own rate."""
    plan = PLANS[trial.scale]
    task = plan.task(trial.device)
    losses = []
    for done, (steps, lr) in enumerate(zip(plan.budgets, rates, strict=True)):
        trial.progress(done, len(plan.budgets))
        schedule = functools.partial(_cosine, warmup=plan.warmup, steps=steps)
        losses.append(Run(task, seed, lr, schedule).advance(steps).loss())
    return losses


@functools.lru_cache(maxsize=1)
def _stable(scale: Scale, device: torch.device, seed: int, lr: float) -> StableRun:
    """Train the stable run that three arms share, with branches of both lengths."""
    plan = PLANS[scale]
    task = plan.task(device)
    return stable_run(task, seed, lr, plan.warmup, plan.budgets, (DECAY, SHORT))


def _prepare(trial: Trial) -> dict[str, Any]:
    """Find the rates: of cosine for every budget, of WSD for all, of the tunnel when narrow."""
    plan = PLANS[trial.scale]
    task = plan.task(trial.device)
    count = len(plan.budgets)

    def cosine(lr: float) -> list[float]:
        return _cosine_losses(trial, TUNING_SEED, [lr] * count)

    def wsd(lr: float) -> list[float]:
        found = stable_run(task, TUNING_SEED, lr, plan.warmup, plan.budgets)
        return [statistics.fmean(found.decayed[DECAY])]

    trial.progress(0, 2)
    if trial.scale == "smoke":  # nothing is judged, so nothing is tuned
        rates = {"cosine": {"lr": [plan.start] * count}, "wsd": {"lr": [plan.start]}}
    else:
        rates = {"cosine": walk(cosine, plan.start), "wsd": walk(wsd, plan.start)}
    trial.progress(1, 2)
    return {**rates, "tunnel": prepare_tunnel(trial)}


def _schedule_outcome(
    trial: Trial,
    losses: Sequence[float],
    steps: int,
    before: Sequence[float] = (),
    times: float = 1.0,
) -> Outcome:
    metrics = {f"loss_{i}": loss for i, loss in enumerate(losses, 1)}
    metrics |= {"loss_mean": statistics.fmean(losses), "steps": float(steps)}
    if before:
        drop = statistics.fmean(before) - statistics.fmean(losses)
        metrics |= {"drop": drop, "drop_bar": drop * times}
    budgets = [float(steps) for steps in PLANS[trial.scale].budgets]
    return Outcome(metrics, {"budget": budgets, "loss": list(losses), "before": list(before)})


def _cosine_arm(trial: Trial) -> Outcome:
    losses = _cosine_losses(trial, trial.seed, trial.prepared["cosine"]["lr"])
    return _schedule_outcome(trial, losses, sum(PLANS[trial.scale].budgets))


def _stable_arm(kind: str) -> Callable[[Trial], Outcome]:
    def run(trial: Trial) -> Outcome:
        budgets = PLANS[trial.scale].budgets
        found = _stable(trial.scale, trial.device, trial.seed, trial.prepared["wsd"]["lr"][0])
        if kind == "stable":
            return _schedule_outcome(trial, found.undecayed, budgets[-1], found.before, times=3.0)
        if kind == "wsd":
            return _schedule_outcome(trial, found.decayed[DECAY], found.steps, found.before)
        lengths = [max(1, round(SHORT * steps)) for steps in budgets]
        steps = budgets[-1] - lengths[-1] + sum(lengths)
        return _schedule_outcome(trial, found.decayed[SHORT], steps)

    return run


def _draw(figure: Figure, result: dict[str, Any]) -> None:
    """Draw the schedules, the transfer and the law, from the first seed."""
    figure.set_size_inches(13, 4)
    schedules, *transfer, law = figure.subplots(1, 4, width_ratios=(3, 2, 2, 3))
    series = {arm["name"]: arm["runs"][0]["series"] for arm in result["arms"]}

    stable, wsd = series["stable"], series["wsd"]
    begins = [(1 - DECAY) * budget for budget in wsd["budget"]]
    trunk = sorted(zip(begins + wsd["budget"], wsd["before"] + stable["loss"], strict=True))
    schedules.plot(*zip(*trunk, strict=True), color="0.6", label="stable run")
    for i, budget in enumerate(wsd["budget"]):
        branch = [wsd["before"][i], wsd["loss"][i]]
        schedules.plot([begins[i], budget], branch, "o-", color="C0", label="" if i else "branch")
    schedules.plot(wsd["budget"], series["cosine"]["loss"], "x", color="C1", label="cosine")
    schedules.set(xlabel="steps", ylabel="held-out loss (nats per character)")
    schedules.legend()

    narrow = result["prepared"]["value"]["tunnel"]["narrow"]
    transfer[1].sharey(transfer[0])
    for axes, arm in zip(transfer, ("sp", "mup"), strict=True):
        _draw_transfer(axes, narrow, series[arm])
        axes.set(title=arm, xlabel="learning rate")
    transfer[1].tick_params(labelleft=False)
    transfer[1].legend(fontsize="small")

    row = series["law"]
    sizes = sorted(set(row["N"]))
    for color, size in enumerate(sizes):
        points = [(d, y) for n, d, y in zip(row["N"], row["D"], row["L"], strict=True) if n == size]
        label = f"{size / 1e6:.2g} M"
        law.plot(*zip(*points, strict=True), "o-", color=f"C{color}", label=label)
        if size == sizes[-1]:
            tokens = [d for d, _ in points]
            law.plot(tokens, row["predicted"], "k--", label="predicted by the law")
            law.plot(tokens, series["plane"]["predicted"], "k:", label="by a plane in logarithms")
    law.set_xscale("log", base=2)
    law.set_xlabel("characters seen")
    law.legend(fontsize="small")


def _draw_transfer(axes: Axes, narrow: dict[str, Any], row: dict[str, list[float]]) -> None:
    """Draw loss against rate, a curve for every width, and the rate that is carried."""
    tried = sorted((float(lr), losses[0]) for lr, losses in narrow["tried"].items())
    if tried:
        label = f"{narrow['width']} wide"
        axes.plot(*zip(*tried, strict=True), "o-", color="0.6", label=label)
    widths = list(dict.fromkeys(row["width"]))
    for color, width in enumerate(widths):
        tried = [
            (lr, loss)
            for at, lr, loss in zip(row["width"], row["lr"], row["loss"], strict=True)
            if at == width
        ]
        axes.plot(*zip(*tried, strict=True), "o-", color=f"C{color}", label=f"{width:g} wide")
    axes.axvline(narrow["lr"][0], color="0.8", zorder=0)
    axes.set_xscale("log", base=2)


STUDY = Study(
    slug="wsd",
    claim=(
        "One WSD run with a 10 % decay at each budget ends within 0.02 nats of cosine trained anew "
        "for each, in 62 % of the steps; muP carries the learning rate to a model 8 times as wide; "
        "the scaling law of its branches predicts a larger model better than a plane in logarithms."
    ),
    protocol=(
        "Characters of Python's standard-library source, last tenth held out. Schedules: a "
        "perceptron (cpu) or a 2-layer Llama (gpu); budgets of 1, 2 and 4 times the steps, equal "
        "data order. The peak rate is found by the same walk in factors of two on a seed that is "
        "not judged: for cosine at every budget, for WSD once, by the mean over the budgets. "
        "'wsd-2.5' decays over 2.5 % of the steps, 'stable' not at all; these two share the stable "
        "run of 'wsd' and its seconds. The arms' steps count what one would train for that arm "
        "alone. Transfer: a Llama without weight decay; the rate is found at the narrow width, "
        "then walked from there at 2, 4 and 8 times the width. Regret, what the carried rate loses "
        "against the best, and factors of two to the best rate are of the widest; 'most over the "
        "widths' is the largest such distance in the row. Batch-size law (gpu): the narrow width "
        "trained with 512 to 8,192 characters per step, five sizes that double, on 2^21 characters "
        "each and all at the rate found; the mean loss of two seeds is read at eight ends from a "
        "twentieth on, each a decayed branch. The best batch is thus the best at this rate. "
        "Law: sizes in muP at that rate, one branch per budget; the largest size is predicted, "
        "not fitted. The plane is log L linear in log N and log D, by least squares."
    ),
    arms={
        "cosine": _cosine_arm,
        "wsd": _stable_arm("wsd"),
        "wsd-2.5": _stable_arm("wsd-2.5"),
        "stable": _stable_arm("stable"),
        "sp": transfer_arm(use_mup=False),
        "mup": transfer_arm(use_mup=True),
        "plane": law_arm(with_floor=False),
        "law": law_arm(with_floor=True),
    },
    metrics=(
        Metric("loss_3", "loss, longest budget", "lower", "nats"),
        Metric("loss_2", "loss, middle budget", "lower", "nats"),
        Metric("loss_1", "loss, shortest budget", "lower", "nats"),
        Metric("loss_mean", "loss, mean over budgets", "lower", "nats"),
        Metric("steps", "steps for all budgets", "lower", "", 0),
        Metric("drop", "drop over the last tenth", "higher", "nats"),
        Metric("drop_bar", "the same, of 'stable' three times", "higher", "nats"),
        Metric("regret", "regret of the carried rate", "lower", "nats"),
        Metric("cells", "factors of two to the best rate", "lower", "", 2),
        Metric("spread", "the same, most over the widths", "lower", "", 2),
        Metric("loss_wide", "loss at the carried rate, wide", "lower", "nats"),
        Metric("law_error", "error on the largest size", "lower", "%", 2),
    ),
    comparisons=(
        Comparison("wsd", "cosine", "loss_1", "non-inferior", 0.02),
        Comparison("wsd", "cosine", "loss_2", "non-inferior", 0.02),
        Comparison("wsd", "cosine", "loss_3", "non-inferior", 0.02),
        Comparison("wsd", "wsd-2.5", "loss_mean"),
        Comparison("wsd", "stable", "loss_mean"),
        Comparison("mup", "sp", "regret"),
        Comparison("mup", "sp", "cells"),
        Comparison("law", "plane", "law_error"),
        Comparison("wsd", "cosine", "steps", claim=False),
        Comparison("wsd", "stable", "drop_bar", claim=False),
        Comparison("mup", "sp", "loss_wide", claim=False),
    ),
    seeds={"smoke": 1, "cpu": 3, "gpu": 3},
    data=dict.fromkeys(SCALES, ("stdlib-text",)),
    prepare=_prepare,
    figure=_draw,
)

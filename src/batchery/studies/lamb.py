# SPDX-License-Identifier: Apache-2.0
"""Does one learning-rate rule carry LAMB, and LARS, to a much larger batch?

Two tasks. A language model on Python's standard-library source, trained on a fixed number of
samples at growing batches: AdamW, SGD and LAMB, each with the learning rate that suits it at the
smallest batch, scaled by the square root; the loss at the end, the updates that a target loss took,
and how far rates at the largest batch may be off. A small convolutional network with batch
normalisation on digits: SGD and LARS, scaled linearly.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from batchery import datasets
from batchery._core.random import initial_weights, new_generator
from batchery.optim import LAMB, LARS, layer_adaptation_groups, scale_lr, warmup_fraction
from batchery.studies import char, lab
from batchery.studies.char import CharPerceptron, char_loss, char_text, windows
from batchery.studies.lab import LabSize
from batchery.studies.study import SCALES, Comparison, Metric, Outcome, Scale, Study, Trial
from batchery.studies.tuning import basin_width, walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TUNING_SEED = 1_000  # apart from the seeds that are judged
BASIN = 0.1  # nats; a learning rate this close to the best belongs to the basin
SMOOTHED = 4_096  # samples in the running mean of the training loss, whatever the batch


@dataclass(frozen=True)
class Size:
    """How large the two tasks are at a scale."""

    model: LabSize | tuple[int, int]  # the lab's Llama, or context and width of the perceptron
    samples: int
    batches: tuple[int, ...]
    warmup: float  # share of the steps at the smallest batch; a fifth at the largest
    target: float  # nats; every optimizer is to reach it at the smallest batch
    epochs: int  # of the digits
    digit_batches: tuple[int, ...]


LLAMA = LabSize("lamb", 1024, 3, 8, 4, context=64)
SIZES: dict[Scale, Size] = {
    "smoke": Size((8, 32), 4_000, (100, 400), 1 / 20, 4.0, 1, (64, 512)),
    "cpu": Size((12, 192), 57_344, (32, 128, 512, 2048), 1 / 320, 2.4, 12, (64, 512)),
    "gpu": Size(LLAMA, 81_920, (64, 512, 4096), 1 / 320, 4.0, 30, (64, 512)),
}
MICRO_BATCH = 512  # sequences of the Llama that go through at once
DIGIT_WARMUP = 1 / 80


Build = Callable[[nn.Module, float], torch.optim.Optimizer]
DECAY = 0.01

OPTIMIZERS: dict[str, tuple[Build, float]] = {
    "adamw": (
        lambda model, lr: torch.optim.AdamW(
            layer_adaptation_groups(model, DECAY), lr=lr, fused=True
        ),
        4e-3,
    ),
    "lamb": (lambda model, lr: LAMB(layer_adaptation_groups(model, DECAY), lr=lr), 2e-2),
    "sgd": (
        lambda model, lr: torch.optim.SGD(
            layer_adaptation_groups(model, 1e-4), lr=lr, momentum=0.9, nesterov=True, fused=True
        ),
        1e-1,
    ),
    "lars-cnn": (
        lambda model, lr: LARS(
            layer_adaptation_groups(model, 1e-4), lr=lr, nesterov=True, trust_coefficient=1e-2
        ),
        1.0,
    ),
    "sgd-cnn": (
        lambda model, lr: torch.optim.SGD(
            layer_adaptation_groups(model, 1e-4), lr=lr, momentum=0.9, nesterov=True, fused=True
        ),
        5e-2,
    ),
}


def _schedule(
    optimizer: torch.optim.Optimizer, steps: int, batch: int, base: int, base_warmup: float
) -> LambdaLR:
    """Linear-epoch warm-up, then linear to zero."""
    warmup = max(1, round(steps * warmup_fraction(batch, base, base_warmup)))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))

    return LambdaLR(optimizer, factor)


def steps_to_target(losses: Tensor, target: float, window: int) -> float:
    """Return how many updates it took until a running mean of the loss reached the target.

    Args:
        losses: of every batch before its update, `(steps,)`, on any device; read once.
        target: the mean is to be at or below it.
        window: losses in the mean.

    Returns:
        The updates made before the last loss of the first such mean; all of them if there is none.
    """
    means = losses.double().cpu().unfold(0, window, 1).mean(1)
    reached = torch.nonzero(means <= target).flatten().tolist()
    return float(window - 1 + reached[0] if reached else len(losses))


def _train_text(arm: str, lr: float, batch: int, seed: int, trial: Trial) -> tuple[float, Tensor]:
    """Train the language model: its held-out loss, and each batch's before its update, in nats."""
    size = SIZES[trial.scale]
    steps = size.samples // batch

    def wire(model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = OPTIMIZERS[arm][0](model, lr)
        return optimizer, _schedule(optimizer, steps, batch, size.batches[0], size.warmup)

    if isinstance(size.model, LabSize):
        context = size.model.context
        tokens, held_out = _tokens(trial.device)
        llama = copy.deepcopy(_llama(size.model, seed, trial.device))
        rows = lab.batches(tokens, batch, context, seed)
        losses = lab.train(
            llama,
            rows,
            *wire(llama),
            steps,
            micro_batch=MICRO_BATCH,
            max_grad_norm=None,
            fuse=True,
        )
        final = lab.held_out_loss(llama, held_out, context)
    else:
        perceptron = CharPerceptron(*size.model, seed)
        optimizer, schedule = wire(perceptron)
        generator = new_generator(seed, "order")
        examples = windows(char_text()[0], steps * batch, perceptron.context, generator)
        found = []
        for picked in torch.split(examples, batch):
            loss = char_loss(perceptron, picked)
            found.append(loss.detach())
            perceptron.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        losses = torch.stack(found)
        final = char.held_out_loss(perceptron)
    return (final if math.isfinite(final) else math.inf), losses


@functools.cache
def _llama(size: LabSize, seed: int, device: torch.device) -> Any:
    """Return the untrained model, made once: drawing its weights takes longer than many steps."""
    return lab.new_model(size, seed).to(device)


@functools.cache
def _tokens(device: torch.device) -> tuple[Tensor, Tensor]:
    text = lab.lab_text(corpus=lab.split_corpus([datasets.load("stdlib-text")]))
    return text.train.to(device), text.held_out


def _digit_model() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _train_digits(arm: str, lr: float, batch: int, seed: int, trial: Trial) -> tuple[float, float]:
    """Train the convolutional network: its test error in per cent, and its test loss in nats."""
    size, data = SIZES[trial.scale], datasets.load("digits")
    arrays = {name: torch.from_numpy(value).to(trial.device) for name, value in data.items()}
    with initial_weights(seed, "weights"):
        model = _digit_model().to(trial.device)
    optimizer = OPTIMIZERS[arm][0](model, lr)
    count = len(arrays["x_train"])
    steps = size.epochs * (count // batch)
    schedule = _schedule(optimizer, steps, batch, size.digit_batches[0], DIGIT_WARMUP)
    generator = new_generator(seed, "order")

    def batches() -> Iterator[Tensor]:
        for _ in range(size.epochs):
            order = torch.randperm(count, generator=generator)
            yield from order[: count // batch * batch].view(-1, batch)

    for picked in batches():
        rows = picked.to(trial.device)
        loss = F.cross_entropy(model(arrays["x_train"][rows]), arrays["y_train"][rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        scores, labels = model(arrays["x_test"]), arrays["y_test"]
    error, loss = (scores.argmax(1) != labels).float().mean(), F.cross_entropy(scores, labels)
    return 100 * float(error), float(loss) if math.isfinite(loss) else math.inf


def _prepare(trial: Trial) -> dict[str, Any]:
    """Tune every optimizer at the smallest batch, and again at the largest, by one rule."""
    size = SIZES[trial.scale]
    chosen: dict[str, Any] = {}
    for done, (arm, (_, start)) in enumerate(OPTIMIZERS.items()):
        trial.progress(done, len(OPTIMIZERS))
        digits = arm.endswith("-cnn")
        batches = size.digit_batches if digits else size.batches
        rule: Literal["linear", "sqrt"] = "linear" if digits else "sqrt"

        def run(lr: float, batch: int, arm: str = arm, digits: bool = digits) -> list[float]:
            if digits:  # by the loss: errors come in steps of one image, and tie
                return [_train_digits(arm, lr, batch, TUNING_SEED, trial)[1]]
            return [_train_text(arm, lr, batch, TUNING_SEED, trial)[0]]

        if trial.scale == "smoke":  # nothing is judged, so nothing is tuned
            chosen[arm] = {"base": {"lr": [start]}, "large": {"lr": [start * 2]}}
            continue
        at_base = walk(functools.partial(run, batch=batches[0]), start)
        scaled = scale_lr(at_base["lr"][0], batches[-1], batches[0], rule)
        basin = 0.0 if digits else BASIN
        at_large = walk(functools.partial(run, batch=batches[-1]), scaled, basin=basin)
        if not digits:
            tried = {float(lr): loss for lr, (loss,) in at_large["tried"].items()}
            at_large["width"], at_large["width_is_whole"] = basin_width(tried, BASIN)
        chosen[arm] = {"base": at_base, "large": at_large}
    return chosen


def _text_arm(arm: str) -> Callable[[Trial], Outcome]:
    def run(trial: Trial) -> Outcome:
        size = SIZES[trial.scale]
        batches, large = size.batches, trial.prepared[arm]["large"]
        base = trial.prepared[arm]["base"]["lr"][0]
        curve, updates = [], []
        for done, batch in enumerate(batches):
            trial.progress(done, len(batches) + 1)
            lr = scale_lr(base, batch, batches[0], "sqrt")
            final, losses = _train_text(arm, lr, batch, trial.seed, trial)
            curve.append(final)
            updates.append(steps_to_target(losses, size.target, max(1, SMOOTHED // batch)))
        best, _ = _train_text(arm, large["lr"][0], batches[-1], trial.seed, trial)
        metrics = {"loss_large": curve[-1], "loss_base": curve[0], "loss_retuned": best}
        metrics |= {"steps_large": updates[-1], "steps_base": updates[0]}
        if "width" in large:  # nothing was tuned at scale smoke
            metrics["basin"] = large["width"]
        series = {"loss": curve, "steps": updates, "batch": [float(b) for b in batches]}
        return Outcome(metrics, series)

    return run


def _digit_arm(arm: str) -> Callable[[Trial], Outcome]:
    def run(trial: Trial) -> Outcome:
        base, large = SIZES[trial.scale].digit_batches
        lr = trial.prepared[arm]["base"]["lr"][0]
        scaled = scale_lr(lr, large, base, "linear")
        retuned = trial.prepared[arm]["large"]["lr"][0]
        return Outcome(
            {
                "error_large": _train_digits(arm, scaled, large, trial.seed, trial)[0],
                "error_base": _train_digits(arm, lr, base, trial.seed, trial)[0],
                "error_retuned": _train_digits(arm, retuned, large, trial.seed, trial)[0],
            }
        )

    return run


def _draw(figure: Figure, result: dict[str, Any]) -> None:
    figure.set_size_inches(8, 4)
    curves, steps, basins = figure.subplots(1, 3)
    size = SIZES[result["scale"]]
    for color, arm in enumerate(a for a in result["arms"] if "loss_large" in a["summary"]):
        series = [run["series"] for run in arm["runs"]]
        for row in series:
            curves.plot(row["batch"], row["loss"], "o-", color=f"C{color}", alpha=0.35)
        width = _draw_basin(basins, result["prepared"]["value"][arm["name"]]["large"], f"C{color}")
        curves.plot([], [], "o-", color=f"C{color}", label=f"{arm['name']}{width}")
        _draw_steps(steps, series, size, f"C{color}")
    budget = [size.samples // batch for batch in size.batches]
    steps.plot(size.batches, budget, ":", color="0.4", label="budget (x: target not reached)")
    steps.plot([], [], "--", color="0.4", label="perfect scaling")
    curves.set_yscale("log")
    steps.set_yscale("log", base=2)
    basins.axhline(BASIN, color="0.4", linewidth=0.8)
    basins.set_ylim(-0.02, 10 * BASIN)
    curves.set(xlabel="batch", ylabel="held-out loss (nats)")
    steps.set(xlabel="batch", ylabel=f"updates to a training loss of {size.target:g}")
    basins.set(xlabel="lr / best, largest batch", ylabel="loss over the best (nats)")
    for axes in (curves, steps, basins):
        axes.set_xscale("log", base=2)
    handles = [*curves.get_legend_handles_labels()[0], *steps.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _draw_steps(axes: Axes, series: list[dict[str, Any]], size: Size, color: str) -> None:
    """Draw the updates to the target of an arm's runs, and the perfect scaling of their mean."""
    for row in series:
        axes.plot(row["batch"], row["steps"], "-", color=color, alpha=0.35)
        for batch, count in zip(row["batch"], row["steps"], strict=True):
            mark = "o" if count < size.samples // int(batch) else "x"
            axes.plot(batch, count, mark, color=color, alpha=0.35)
    mean = statistics.fmean(row["steps"][0] for row in series)
    perfect = [mean * size.batches[0] / batch for batch in size.batches]
    axes.plot(size.batches, perfect, "--", color=color, linewidth=0.8)


def _draw_basin(axes: Axes, found: dict[str, Any], color: str) -> str:
    """Draw the loss of the rates tried at the largest batch; return what the legend says of it."""
    rates = [(float(lr), loss) for lr, (loss,) in found.get("tried", {}).items()]
    known = [(lr, loss) for lr, loss in rates if loss is not None and math.isfinite(loss)]
    if not known:
        return ""
    best, least = min(known, key=lambda pair: pair[1])
    points = [(lr / best, loss - least) for lr, loss in known]
    axes.plot(*zip(*points, strict=True), "o-", color=color)
    return f" (basin {'' if found['width_is_whole'] else '≥ '}{found['width']:.1f} ×)"


STUDY = Study(
    slug="lamb",
    claim=(
        "With the learning rate tuned once at a small batch and scaled by a fixed rule, LAMB ends "
        "below AdamW's loss at 64 times the batch, and LARS below SGD's error at 8 times the batch."
    ),
    protocol=(
        "Fixed number of samples, so that steps fall as the batch grows. Each optimizer's learning "
        "rate is found at the smallest batch by the same walk in factors of two, by the held-out "
        "loss on a seed that is not judged (digits too: errors tie on a single image), then scaled "
        "by the square root of the batch (text) or linearly (digits), with linear-epoch warm-up "
        "and linear decay; 'retuned' repeats the walk at the largest batch. "
        "Basin: over which factor rates of that walk, on its one seed, lose at most 0.1 nats more "
        "than the best, interpolated (the figure marks a lower bound by ≥). Updates to target: at "
        "the fixed rule's rates, until the mean loss of the last 4,096 samples, each before its "
        "update, is at most 2.4 nats (cpu) or 4.0 (gpu); all of the budget's if it never is. It "
        "estimates the loss on new text like the training part's, not the held-out part's; at gpu "
        "the last third of the samples is a second pass. "
        "Text: Python's standard-library source, a tenth held out; a perceptron over 12 characters "
        "(cpu), or a Llama of 37 M parameters over 64 tokens, without gradient clipping (gpu). "
        "Digits: a small network with batch normalisation. Decay and adaptation leave out biases "
        "and norms for every optimizer."
    ),
    arms={
        "adamw": _text_arm("adamw"),
        "sgd": _text_arm("sgd"),
        "lamb": _text_arm("lamb"),
        "sgd-cnn": _digit_arm("sgd-cnn"),
        "lars-cnn": _digit_arm("lars-cnn"),
    },
    metrics=(
        Metric("loss_large", "loss, largest batch", "lower", "nats"),
        Metric("loss_base", "loss, smallest batch", "lower", "nats"),
        Metric("loss_retuned", "loss, largest batch, retuned", "lower", "nats"),
        Metric("steps_large", "updates to target, largest batch", "lower", "", 0),
        Metric("steps_base", "updates to target, smallest batch", "lower", "", 0),
        Metric("basin", "lr basin, largest batch, tuning seed", "higher", "factor", 1),
        Metric("error_large", "error, large batch", "lower", "%", 2),
        Metric("error_base", "error, small batch", "lower", "%", 2),
        Metric("error_retuned", "error, large batch, retuned", "lower", "%", 2),
    ),
    comparisons=(
        Comparison("lamb", "adamw", "loss_large"),
        Comparison("lars-cnn", "sgd-cnn", "error_large"),
        Comparison("lamb", "adamw", "loss_retuned", claim=False),
        Comparison("lamb", "adamw", "loss_base", claim=False),
        Comparison("lars-cnn", "sgd-cnn", "error_retuned", claim=False),
        Comparison("lamb", "sgd", "loss_large", claim=False),
        Comparison("lamb", "adamw", "steps_large", claim=False),
        Comparison("lamb", "adamw", "steps_base", claim=False),
        # None on the basin: measured on one seed, it has no spread to judge it by.
    ),
    seeds={"smoke": 1, "cpu": 5, "gpu": 3},
    data=dict.fromkeys(SCALES, ("stdlib-text", "digits")),
    prepare=_prepare,
    figure=_draw,
)

# SPDX-License-Identifier: Apache-2.0
"""Does one learning-rate rule carry LAMB, and LARS, to a much larger batch?

Two tasks. A language model on Python's standard-library source, trained on a fixed number of
samples at growing batches: AdamW, SGD and LAMB, each with the learning rate that suits it at the
smallest batch, scaled by the square root. A small convolutional network with batch normalisation
on digits: SGD and LARS, scaled linearly.
"""

from __future__ import annotations

import copy
import functools
import math
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
from batchery.studies.tuning import walk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING_SEED = 1_000  # apart from the seeds that are judged
BASIN = 0.1  # nats; a learning rate this close to the best belongs to the basin


@dataclass(frozen=True)
class Size:
    """How large the two tasks are at a scale."""

    model: LabSize | tuple[int, int]  # the lab's Llama, or context and width of the perceptron
    samples: int
    batches: tuple[int, ...]
    warmup: float  # share of the steps at the smallest batch; a fifth at the largest
    epochs: int  # of the digits
    digit_batches: tuple[int, ...]


SIZES: dict[Scale, Size] = {
    "smoke": Size((8, 32), 4_000, (100, 400), 1 / 20, 1, (64, 512)),
    "cpu": Size((12, 192), 81_920, (128, 512, 2048), 1 / 80, 12, (64, 512)),
    "gpu": Size(
        LabSize("lamb", 1024, 3, 8, 4, context=64),
        81_920,
        (64, 512, 4096),
        1 / 320,
        30,
        (64, 512),
    ),
}
MICRO_BATCH = 512  # sequences of the Llama that go through at once
DIGIT_WARMUP = 1 / 80


Build = Callable[[nn.Module, float], torch.optim.Optimizer]
DECAY = 0.01

OPTIMIZERS: dict[str, tuple[Build, float]] = {
    "adamw": (
        lambda model, lr: torch.optim.AdamW(layer_adaptation_groups(model, DECAY), lr=lr),
        4e-3,
    ),
    "lamb": (lambda model, lr: LAMB(layer_adaptation_groups(model, DECAY), lr=lr), 2e-2),
    "sgd": (
        lambda model, lr: torch.optim.SGD(
            layer_adaptation_groups(model, 1e-4), lr=lr, momentum=0.9, nesterov=True
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
            layer_adaptation_groups(model, 1e-4), lr=lr, momentum=0.9, nesterov=True
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


def _train_text(arm: str, lr: float, batch: int, seed: int, trial: Trial) -> float:
    """Train the language model and return its held-out loss, in nats per character or token."""
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
        lab.train(
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
        examples = windows(char_text()[0], size.samples, perceptron.context, generator)
        for step in range(steps):
            loss = char_loss(perceptron, examples[step * batch : (step + 1) * batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        final = char.held_out_loss(perceptron)
    return final if math.isfinite(final) else math.inf


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


def _train_digits(arm: str, lr: float, batch: int, seed: int, trial: Trial) -> float:
    """Train the convolutional network and return its test error, in per cent."""
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
        wrong = model(arrays["x_test"]).argmax(1) != arrays["y_test"]
    return 100 * float(wrong.float().mean())


def _prepare(trial: Trial) -> dict[str, Any]:
    """Tune every optimizer at the smallest batch, and again at the largest, by one rule."""
    size = SIZES[trial.scale]
    chosen: dict[str, Any] = {}
    for done, (arm, (_, start)) in enumerate(OPTIMIZERS.items()):
        trial.progress(done, len(OPTIMIZERS))
        digits = arm.endswith("-cnn")
        batches = size.digit_batches if digits else size.batches
        train = _train_digits if digits else _train_text
        rule: Literal["linear", "sqrt"] = "linear" if digits else "sqrt"

        def run(lr: float, batch: int, arm: str = arm, train: Any = train) -> list[float]:
            return [train(arm, lr, batch, TUNING_SEED, trial)]

        if trial.scale == "smoke":  # nothing is judged, so nothing is tuned
            chosen[arm] = {"base": {"lr": [start]}, "large": {"lr": [start * 2]}}
            continue
        at_base = walk(functools.partial(run, batch=batches[0]), start)
        scaled = scale_lr(at_base["lr"][0], batches[-1], batches[0], rule)
        basin = 0.0 if digits else BASIN
        at_large = walk(functools.partial(run, batch=batches[-1]), scaled, basin=basin)
        chosen[arm] = {"base": at_base, "large": at_large}
    return chosen


def _text_arm(arm: str) -> Callable[[Trial], Outcome]:
    def run(trial: Trial) -> Outcome:
        batches = SIZES[trial.scale].batches
        base = trial.prepared[arm]["base"]["lr"][0]
        curve = []
        for done, batch in enumerate(batches):
            trial.progress(done, len(batches) + 1)
            lr = scale_lr(base, batch, batches[0], "sqrt")
            curve.append(_train_text(arm, lr, batch, trial.seed, trial))
        retuned = trial.prepared[arm]["large"]["lr"][0]
        best = _train_text(arm, retuned, batches[-1], trial.seed, trial)
        metrics = {"loss_large": curve[-1], "loss_base": curve[0], "loss_retuned": best}
        return Outcome(metrics, {"loss": curve, "batch": [float(b) for b in batches]})

    return run


def _digit_arm(arm: str) -> Callable[[Trial], Outcome]:
    def run(trial: Trial) -> Outcome:
        base, large = SIZES[trial.scale].digit_batches
        lr = trial.prepared[arm]["base"]["lr"][0]
        scaled = scale_lr(lr, large, base, "linear")
        retuned = trial.prepared[arm]["large"]["lr"][0]
        return Outcome(
            {
                "error_large": _train_digits(arm, scaled, large, trial.seed, trial),
                "error_base": _train_digits(arm, lr, base, trial.seed, trial),
                "error_retuned": _train_digits(arm, retuned, large, trial.seed, trial),
            }
        )

    return run


def _draw(figure: Figure, result: dict[str, Any]) -> None:
    curves, basins = figure.subplots(1, 2)
    prepared = result["prepared"]["value"]
    for color, arm in enumerate(a for a in result["arms"] if "loss_large" in a["summary"]):
        series = [run["series"] for run in arm["runs"]]
        for row in series:
            known = [
                (b, y) for b, y in zip(row["batch"], row["loss"], strict=True) if y is not None
            ]
            curves.plot(*zip(*known, strict=True), "o-", color=f"C{color}", alpha=0.35)
        curves.plot([], [], "o-", color=f"C{color}", label=arm["name"])
        tried = prepared[arm["name"]]["large"].get("tried", {})
        rates = [(float(lr), loss) for lr, (loss,) in tried.items() if loss is not None]
        if rates:
            best = min(rates, key=lambda pair: pair[1])[0]
            points = [(lr / best, loss) for lr, loss in rates]
            basins.plot(*zip(*points, strict=True), "o-", color=f"C{color}", label=arm["name"])
    curves.set_xscale("log", base=2)
    curves.set(xlabel="batch", ylabel="held-out loss (nats)")
    curves.legend()
    basins.set_xscale("log", base=2)
    basins.set_xlabel("learning rate over the best, largest batch")


STUDY = Study(
    slug="lamb",
    claim=(
        "With the learning rate tuned once at a small batch and scaled by a fixed rule, LAMB ends "
        "below AdamW's loss at 16 times the batch (gpu: 64 times), and LARS below SGD's error at 8 "
        "times the batch."
    ),
    protocol=(
        "Fixed number of samples, so that steps fall as the batch grows. Each optimizer's learning "
        "rate is found at the smallest batch by the same walk in factors of two, on a seed that is "
        "not judged, then scaled by the square root of the batch (text) or linearly (digits), with "
        "linear-epoch warm-up and linear decay; 'retuned' repeats the walk at the largest batch. "
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
    ),
    seeds={"smoke": 1, "cpu": 5, "gpu": 3},
    data=dict.fromkeys(SCALES, ("stdlib-text", "digits")),
    prepare=_prepare,
    figure=_draw,
)

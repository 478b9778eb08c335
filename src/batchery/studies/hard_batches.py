# SPDX-License-Identifier: Apache-2.0
"""Does training on the hardest half of the batches beat ordinary training at equal updates?

Two tasks, each in two versions: as it is, and with one class cut to a fifteenth. The first is
handwritten digits with a small perceptron (cpu), or CIFAR-10 with a ResNet-18 (gpu); the second,
for fewer arms, spoken digits with a small convolutional network. Beside the paper's method stand
what it claims to beat, what it is compared with in the paper, and what a user would otherwise reach
for.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchery._core.random import new_generator
from batchery.select import HardBatchSampler, ResumableBatchSampler
from batchery.studies.graphs import captured
from batchery.studies.hard_batches_tasks import (
    RARE,
    SIZES,
    SPOKEN,
    VERSIONS,
    Net,
    Task,
    task_of,
    untrained,
)
from batchery.studies.study import Comparison, Metric, Outcome, Scale, Study, Trial
from batchery.studies.tuning import walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TUNING_SEED = 1_000  # apart from the seeds that are judged
PAPER_LR = 5e-3

Graphs = dict[torch.Size, Callable[..., Tensor]]  # shape of a batch → its losses


@functools.cache
def _network(net: Net, side: int, device: torch.device) -> tuple[nn.Module, Graphs]:
    """Return the one network that all runs train, each from weights of its own, and its graphs."""
    model = untrained(net, side, 0).to(device)
    return model.to(memory_format=torch.channels_last), {}  # type: ignore[call-overload]


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; the host goes on meanwhile."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class Feed(Protocol):
    """What an arm trains on: batches of indices, pass after pass."""

    def __iter__(self) -> Iterator[list[int]]:
        """Return the batches of one pass."""


class Balanced:
    """Draws classes evenly, examples with replacement."""

    def __init__(self, labels: Tensor, batch: int, seed: int) -> None:
        """Weigh every example by one over the size of its class."""
        labels = labels.cpu()
        self.chances = 1.0 / torch.bincount(labels).double()[labels]
        self.batch = batch
        self.generator = new_generator(seed, "balanced")

    def __iter__(self) -> Iterator[list[int]]:
        """Return as many batches as an ordinary pass has."""
        for _ in range(len(self.chances) // self.batch):
            drawn = torch.multinomial(
                self.chances, self.batch, replacement=True, generator=self.generator
            )
            yield drawn.tolist()


class Pruned:
    """Drops a share of the examples below the mean loss, and gives the rest of them more weight.

    After InfoBatch (Qin et al., arXiv 2303.04947): expected gradients stay those of all data, and
    the last eighth of the updates uses everything.
    """

    def __init__(
        self, labels: Tensor, batch: int, updates: int, seed: int, share: float = 0.5
    ) -> None:
        """Know no loss yet, so that the first pass is whole."""
        self.batch, self.share = batch, share
        self.left, self.whole_from = updates, updates // 8
        self.losses = torch.zeros(len(labels), device=labels.device)
        self.factor = torch.ones(len(labels))
        self.generator = new_generator(seed, "pruned")

    def __iter__(self) -> Iterator[list[int]]:
        """Return the batches of one pass over what is left."""
        scores = self.losses.cpu()
        low = scores < scores.mean()
        if self.left <= self.whole_from:
            low.zero_()
        dropped = low & (torch.rand(len(low), generator=self.generator) < self.share)
        self.factor = torch.where(low, 1 / (1 - self.share), 1.0)
        kept = (~dropped).nonzero().flatten()
        order = kept[torch.randperm(len(kept), generator=self.generator)]
        for rows in torch.split(order, self.batch)[: len(order) // self.batch]:
            self.left -= 1
            yield rows.tolist()

    def update(self, losses: Tensor, indices: list[int]) -> None:
        """Take the losses of examples, without a wait for the device."""
        self.losses[_moved(torch.tensor(indices), losses.device)] = losses

    def weights(self, indices: list[int]) -> Tensor:
        """Return the weight of each example in the batch's mean loss."""
        return self.factor[indices]


Build = Callable[[Tensor, int, int, int], Feed]


def _hard(delta: float, **kinds: Any) -> Build:
    def build(labels: Tensor, batch: int, updates: int, seed: int) -> Feed:
        generator = new_generator(seed, "order")
        return HardBatchSampler(len(labels), batch, delta, generator=generator, **kinds)

    return build


def _shuffled(labels: Tensor, batch: int, updates: int, seed: int) -> Feed:
    generator = new_generator(seed, "order")
    return ResumableBatchSampler(len(labels), batch, drop_last=True, generator=generator)


FEEDS: dict[str, Build] = {
    "shuffled": _shuffled,
    "fixed order": _hard(1.0),
    "batch 0.8": _hard(0.8),
    "batch 0.5": _hard(0.5),
    "batch 0.2": _hard(0.2),
    "sample 0.5": _hard(0.5, mode="sample"),
    "sample 0.3": _hard(0.3, mode="sample"),
    "class-balanced": lambda labels, batch, updates, seed: Balanced(labels, batch, seed),
    "infobatch-like": Pruned,
    "paper 1.0": _hard(1.0, shuffle_partition=False),
    "paper 0.5": _hard(0.5, shuffle_partition=False),
}
# At scale gpu some arms train on one version of the images alone, so that all fit the time.
ONE_VERSION = dict.fromkeys(("fixed order", "batch 0.8", "batch 0.2", "sample 0.5"), "balanced")
ONE_VERSION["class-balanced"] = "imbalanced"
ON_SPEECH = ("shuffled", "batch 0.5", "sample 0.3", "class-balanced", "infobatch-like")


def _accuracies(model: nn.Module, task: Task) -> tuple[float, float]:
    """Return test accuracy and recall of the rare class, in per cent.

    Batch-norm statistics, which in selected batches are those of hard examples, are estimated anew
    on the first training examples, for every arm.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad(), _autocast(task.x_train):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
        if norms:
            for part in torch.split(task.x_train[:2048], 1024):
                model(part)
        model.eval()
        right = torch.cat([model(part).argmax(1) for part in torch.split(task.x_test, 2048)])
        right = right == task.y_test
    model.train()
    return 100 * float(right.float().mean()), 100 * float(right[task.y_test == RARE].float().mean())


def _autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with _autocast(x):
        logits = model(x)
    return F.cross_entropy(logits.float(), y, reduction="none")


SHIFT = 4  # pixels that an image moves by at most


def _padded(x: Tensor) -> Tensor:
    """Return images and, after them, their mirror images, with room to move; made once a run."""
    return F.pad(torch.cat([x, x.flip(3)]), (SHIFT,) * 4)


def _augmented(padded: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return images `rows` of `_padded`: half of them mirrored, all moved alike."""
    side = padded.shape[-1] - 2 * SHIFT
    mirrored = torch.rand(len(rows), generator=generator) < 0.5
    down, right = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
    rows = _moved(rows + mirrored * (len(padded) // 2), padded.device)
    return padded[:, :, down : down + side, right : right + side][rows]


def _train(
    arm: str, name: str, version: str, lr: float, seed: int, trial: Trial, tuning: bool = False
) -> tuple[list[float], list[float]]:
    """Train one arm; return test accuracies and recalls of the rare class along the way."""
    size, paper = SIZES[trial.scale][name], arm.startswith("paper")
    task = task_of(size, version, seed, trial.device, tuning)
    side = task.x_train.shape[-1]
    model, graphs = _network(size.net, side, trial.device)
    model.load_state_dict(untrained(size.net, side, seed).state_dict())
    epoch = len(task.y_train) // size.batch
    updates = epoch * (size.tuning_epochs if tuning else size.epochs)
    every = max(int(epoch / size.evaluations), 1)
    augment = size.augment and not paper
    images = _padded(task.x_train) if augment else task.x_train
    feed = FEEDS[arm](task.y_train, size.batch, updates, seed)
    report, weigh = getattr(feed, "update", None), getattr(feed, "weights", None)
    decay = 0.0 if paper or not size.augment else 5e-4
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=decay, fused=True
    )
    generator = new_generator(seed, "augment")
    curve: list[tuple[float, float]] = []
    stream = itertools.chain.from_iterable(itertools.repeat(feed))
    for step, batch in enumerate(itertools.islice(stream, updates), 1):
        rows = torch.tensor(batch)
        here = _moved(rows, trial.device)
        x = _augmented(images, rows, generator) if augment else images[here]
        y = task.y_train[here]
        if x.shape not in graphs:
            fuse = size.net == "resnet18"  # others are too small to be worth compiling
            graphs[x.shape] = captured(model, _losses, x, y, fuse=fuse)
        losses = graphs[x.shape](x, y)
        loss = losses.mean()
        if weigh is not None:
            loss = (losses * _moved(weigh(batch), losses.device)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if not paper:  # down to zero by updates, whatever the arm calls an epoch
            optimizer.param_groups[0]["lr"] = lr * (updates - step + 1) / updates
        optimizer.step()
        if report is not None:
            report(losses.detach(), batch)
        if step == updates or (step % every == 0 and not tuning):
            curve.append(_accuracies(model, task))
    accuracies, recalls = zip(*curve, strict=True)
    return list(accuracies), list(recalls)


def versions(arm: str, name: str, scale: Scale) -> tuple[str, ...]:
    """Return the versions of a task that an arm is trained on."""
    if name == SPOKEN:
        return VERSIONS if arm in ON_SPEECH else ()
    if arm.startswith("paper"):
        return VERSIONS[:1]
    return (ONE_VERSION[arm],) if scale == "gpu" and arm in ONE_VERSION else VERSIONS


def _prepare(trial: Trial) -> dict[str, Any]:
    """Tune the learning rate of every arm in every version, by one rule, on a held-out fifth."""
    places = [
        (name, version, arm)
        for name in SIZES[trial.scale]
        for arm in FEEDS
        if not arm.startswith("paper")
        for version in versions(arm, name, trial.scale)
    ]
    chosen: dict[str, Any] = {name + version: {} for name, version, _ in places}
    for done, (name, version, arm) in enumerate(places):
        trial.progress(done, len(places))
        size = SIZES[trial.scale][name]

        def error(
            lr: float, name: str = name, version: str = version, arm: str = arm
        ) -> list[float]:
            seeds = range(TUNING_SEED, TUNING_SEED + SIZES[trial.scale][name].tuning_seeds)
            runs = (_train(arm, name, version, lr, seed, trial, tuning=True) for seed in seeds)
            return [100 - statistics.fmean(accuracies[-1] for accuracies, _ in runs)]

        if trial.scale == "smoke":  # nothing is judged, so nothing is tuned
            chosen[name + version][arm] = {"lr": [size.lr]}
        else:
            chosen[name + version][arm] = walk(error, size.lr)
    return chosen


def _arm(arm: str) -> Callable[[Trial], Outcome]:
    def run(trial: Trial) -> Outcome:
        metrics: dict[str, float] = {}
        series: dict[str, list[float]] = {}
        sizes = SIZES[trial.scale]
        places = [(name, version) for name in sizes for version in versions(arm, name, trial.scale)]
        for done, (name, version) in enumerate(places):
            trial.progress(done, len(places))
            paper = arm.startswith("paper")
            lr = PAPER_LR if paper else trial.prepared[name + version][arm]["lr"][0]
            curve, recalls = _train(arm, name, version, lr, trial.seed, trial)
            if version == "imbalanced":
                metrics[f"{name}accuracy_rare"] = curve[-1]
                metrics[f"{name}recall_rare"] = recalls[-1]
                continue
            metrics[f"{name}accuracy"] = curve[-1]
            series[f"{name}accuracy"] = curve
            target = sizes[name].target
            if target is not None:
                reached = [place for place, value in enumerate(curve, 1) if value >= target]
                share = 100 * reached[0] / len(curve) if reached else 100.0
                metrics[f"{name}updates_to_target"] = share
        return Outcome(metrics, series)

    return run


def _draw(figure: Figure, result: dict[str, Any]) -> None:
    arms = result["arms"]
    tasks = [name for name in ("", SPOKEN) if f"{name}accuracy" in arms[0]["summary"]]
    figure.set_size_inches(7.2, 5.8)
    panels = figure.subplots(2, len(tasks), squeeze=False)
    titles = {"digits": "handwritten digits", "cifar10": "CIFAR-10", "fsdd": "spoken digits"}
    for (curves, rare), name in zip(panels.T, tasks, strict=True):
        curves.set(title=titles[SIZES[result["scale"]][name].data], yscale="log")
        curves.set(xlabel="updates (% of the budget)", ylabel="test error (%)")
        rare.set(xlabel="test accuracy (%), one class rare", ylabel="recall of the rare class (%)")
        for place, arm in enumerate(arms):
            _draw_arm(curves, rare, name, arm, f"C{place}")
            if not name:  # each arm's line of the legend, drawn in every panel or not
                curves.plot([], [], _style(arm["name"]), color=f"C{place}", label=arm["name"])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _style(arm: str) -> str:
    return "--" if arm.startswith("paper") else "-"


def _draw_arm(curves: Axes, rare: Axes, name: str, arm: dict[str, Any], color: str) -> None:
    """Draw an arm's mean error along the updates, and where its runs end when a class is rare."""
    if f"{name}accuracy" in arm["summary"]:
        rows = [run["series"][f"{name}accuracy"] for run in arm["runs"]]
        mean = [100 - statistics.fmean(values) for values in zip(*rows, strict=True)]
        share = [100 * (k + 1) / len(mean) for k in range(len(mean))]
        curves.plot(share, mean, _style(arm["name"]), color=color, linewidth=1.2)
    if f"{name}recall_rare" in arm["summary"]:
        keys = (f"{name}accuracy_rare", f"{name}recall_rare")
        x, y = ([run["metrics"][key] for run in arm["runs"]] for key in keys)
        rare.plot(x, y, ".", color=color, alpha=0.25)
        rare.plot(statistics.fmean(x), statistics.fmean(y), "o", color=color)


# Written before anything runs; on the second task, the same ones of the arms that it has.
_COMPARISONS = (
    Comparison("batch 0.5", "shuffled", "accuracy"),
    Comparison("batch 0.5", "shuffled", "recall_rare"),
    Comparison("batch 0.5", "fixed order", "accuracy", claim=False),
    Comparison("batch 0.5", "shuffled", "updates_to_target", claim=False),
    Comparison("batch 0.5", "shuffled", "accuracy_rare", claim=False),
    Comparison("batch 0.5", "class-balanced", "recall_rare", claim=False),
    Comparison("sample 0.3", "shuffled", "accuracy", claim=False),
    Comparison("sample 0.3", "shuffled", "recall_rare", claim=False),
    Comparison("sample 0.3", "class-balanced", "recall_rare", claim=False),
    Comparison("sample 0.3", "class-balanced", "accuracy_rare", claim=False),
    Comparison("sample 0.3", "infobatch-like", "accuracy", claim=False),
    Comparison("paper 0.5", "paper 1.0", "accuracy", claim=False),
)
_SPOKEN_COMPARISONS = tuple(
    replace(comparison, metric=SPOKEN + comparison.metric)
    for comparison in _COMPARISONS
    if {comparison.arm, comparison.baseline} <= set(ON_SPEECH)
    and comparison.metric != "updates_to_target"
)

STUDY = Study(
    slug="hard-batches",
    claim=(
        "On two data sets, at equal updates, training on the half of the fixed mini-batches with "
        "the highest last loss ends at a higher test accuracy than ordinary shuffled training, and "
        "with a higher recall of a class that has a fifteenth of its examples."
    ),
    protocol=(
        "Every arm makes as many updates as ordinary epochs of shuffled training have. SGD with "
        "momentum 0.9, learning rate falling linearly to zero by updates. Its peak is found for "
        "every arm, task and version by the same walk in factors of two, on seeds that are not "
        "judged and a fifth of the training part held out. Imbalanced: class 8 keeps 8 of about "
        "140 digits, 18 of 270 recordings, or 333 of 5,000 images; test parts stay balanced. cpu: "
        "handwritten digits, a perceptron 64-64-10, batch 32, 12 epochs. gpu: CIFAR-10, ResNet-18 "
        "with a stride-2 stem, batch 512, 30 epochs, mirrored and shifted images, weight decay "
        "5e-4; some arms see one version only and tuning runs last 3 epochs, to fit the time. At "
        "both, five of the arms: spoken digits (FSDD, its own split, speakers shared), "
        "log spectrograms of 16 bands by 16 moments of the first half second, two convolutions of "
        "16 and 32 channels and a linear layer, batch 64, 6 epochs. smoke: handwritten digits "
        "stand in for recordings. The arms called paper follow its protocol: learning rate 0.005 "
        "throughout, no decay, no augmentation, batches cut by index. Batch-norm statistics are "
        "estimated anew before every evaluation."
    ),
    arms={name: _arm(name) for name in FEEDS},
    metrics=(
        Metric("accuracy", "test accuracy", "higher", "%", 2),
        Metric("accuracy_rare", "test accuracy, one class rare", "higher", "%", 2),
        Metric("recall_rare", "recall of the rare class", "higher", "%", 1),
        Metric("updates_to_target", "updates to target accuracy", "lower", "% of budget", 0),
        Metric("spoken_accuracy", "spoken: test accuracy", "higher", "%", 2),
        Metric("spoken_accuracy_rare", "spoken: test accuracy, one class rare", "higher", "%", 2),
        Metric("spoken_recall_rare", "spoken: recall of the rare class", "higher", "%", 1),
    ),
    comparisons=(*_COMPARISONS, *_SPOKEN_COMPARISONS),
    # Ten seeds and one more for tuning took 162 s at cpu, eight some 122: the same verdict.
    seeds={"smoke": 1, "cpu": 7, "gpu": 3},
    data={scale: [size.data for size in sizes.values()] for scale, sizes in SIZES.items()},
    prepare=_prepare,
    figure=_draw,
)

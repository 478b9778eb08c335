# SPDX-License-Identifier: Apache-2.0
"""Does training on the hardest half of the batches beat ordinary training at equal updates?

Two versions of one task: as it is, and with one class cut to a fifteenth. Handwritten digits with a
small perceptron (cpu), or CIFAR-10 with a ResNet-18 (gpu). Beside the paper's method stand what it
claims to beat, what it is compared with in the paper, and what a user would otherwise reach for.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchery import datasets
from batchery._core.random import initial_weights, new_generator
from batchery.select import HardBatchSampler, ResumableBatchSampler
from batchery.studies.graphs import captured
from batchery.studies.study import Comparison, Metric, Outcome, Scale, Study, Trial
from batchery.studies.tuning import walk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RARE = 8  # the class that the imbalanced version cuts
VERSIONS = ("balanced", "imbalanced")
TUNING_SEED = 1_000  # apart from the seeds that are judged
PAPER_LR = 5e-3


@dataclass(frozen=True)
class Size:
    """How large the task is at a scale."""

    data: str
    batch: int
    epochs: int  # of ordinary training; every arm makes as many updates
    rare: int  # examples left of the rare class
    target: float  # per cent of test accuracy that "updates to target" waits for
    lr: float  # where tuning starts
    tuning_seeds: int
    tuning_epochs: int
    evaluations: float  # per epoch
    augment: bool


SIZES: dict[Scale, Size] = {
    "smoke": Size("digits", 32, 2, 8, 80.0, 0.05, 1, 1, 2, False),
    "cpu": Size("digits", 32, 12, 8, 95.0, 0.1, 3, 12, 2, False),
    "gpu": Size("cifar10", 512, 20, 333, 85.0, 0.1, 1, 3, 0.5, True),
}


@dataclass(frozen=True)
class Task:
    """Inputs and labels on one device; what is judged is the test part."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@functools.cache
def _arrays(name: str, device: torch.device) -> Task:
    """Return a data set in an order that says nothing; images are normalised, `[n, 3, 32, 32]`."""
    arrays = {key: torch.from_numpy(value) for key, value in datasets.load(name).items()}
    if name == "cifar10":
        for part in ("train", "test"):
            order = torch.randperm(len(arrays[f"y_{part}"]), generator=new_generator(part))
            pixels = arrays[f"x_{part}"][order].permute(0, 3, 1, 2).float() / 127.5 - 1
            arrays[f"x_{part}"] = pixels.contiguous(memory_format=torch.channels_last)
            arrays[f"y_{part}"] = arrays[f"y_{part}"][order]
    return Task(**{key: value.to(device) for key, value in arrays.items()})


def _task(size: Size, version: str, seed: int, device: torch.device, tuning: bool) -> Task:
    """Return a version of the task; when tuning, a fifth of the training part is what is judged."""
    whole = _arrays(size.data, device)
    x, y, x_test, y_test = whole.x_train, whole.y_train, whole.x_test, whole.y_test
    if tuning:
        cut = len(y) * 4 // 5
        x, y, x_test, y_test = x[:cut], y[:cut], x[cut:], y[cut:]
    if version == "imbalanced":
        rare = (y == RARE).nonzero().flatten()
        drawn = torch.randperm(len(rare), generator=new_generator(seed, "rare"))[size.rare :]
        kept = torch.ones_like(y, dtype=torch.bool)
        kept[rare[drawn.to(device)]] = False
        x, y = x[kept], y[kept]
    return Task(x, y, x_test, y_test)


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        self.skip = nn.Sequential()
        if stride > 1:
            self.skip = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet18() -> nn.Module:
    """ResNet-18 with a 3 x 3 stem of stride 2, which suits 32 x 32 pixels."""
    widths = (64, 64, 128, 256, 512)
    blocks: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    for inner, outer in itertools.pairwise(widths):
        blocks += [_Block(inner, outer, 1 if inner == outer else 2), _Block(outer, outer, 1)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _untrained(data: str, seed: int) -> nn.Module:
    with initial_weights(seed, "weights"):
        return resnet18() if data == "cifar10" else _perceptron()


Graphs = dict[torch.Size, Callable[..., Tensor]]  # shape of a batch → its losses


@functools.cache
def _network(data: str, device: torch.device) -> tuple[nn.Module, Graphs]:
    """Return the one network that all runs train, each from weights of its own, and its graphs."""
    model = _untrained(data, 0).to(device)
    return model.to(memory_format=torch.channels_last), {}  # type: ignore[call-overload]


class Feed(Protocol):
    """What an arm trains on: batches of indices, pass after pass."""

    def __iter__(self) -> Iterator[list[int]]:
        """Return the batches of one pass."""


class Balanced:
    """Draws classes evenly, examples with replacement."""

    def __init__(self, labels: Tensor, batch: int, seed: int) -> None:
        """Weigh every example by one over the size of its class."""
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

    def __init__(self, count: int, batch: int, updates: int, seed: int, share: float = 0.5) -> None:
        """Know no loss yet, so that the first pass is whole."""
        self.batch, self.share = batch, share
        self.left, self.whole_from = updates, updates // 8
        self.scores = torch.zeros(count)
        self.factor = torch.ones(count)
        self.generator = new_generator(seed, "pruned")

    def __iter__(self) -> Iterator[list[int]]:
        """Return the batches of one pass over what is left."""
        low = self.scores < self.scores.mean()
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
        """Take the losses of examples."""
        self.scores[indices] = losses.cpu()

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
    "infobatch-like": lambda labels, batch, updates, seed: Pruned(
        len(labels), batch, updates, seed
    ),
    "paper 1.0": _hard(1.0, shuffle_partition=False),
    "paper 0.5": _hard(0.5, shuffle_partition=False),
}
# At scale gpu these are spared the imbalanced version, so that all fit the time.
BALANCED_ONLY = ("fixed order", "batch 0.8", "batch 0.2", "sample 0.5")


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
            for part in torch.split(task.x_train[:8192], 1024):
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


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and move all of them by up to four pixels."""
    mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(9, (2,), generator=generator).tolist()
    return F.pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]


def _train(
    arm: str, version: str, lr: float, seed: int, trial: Trial, tuning: bool = False
) -> tuple[list[float], list[float]]:
    """Train one arm; return test accuracies and recalls of the rare class along the way."""
    size, paper = SIZES[trial.scale], arm.startswith("paper")
    task = _task(size, version, seed, trial.device, tuning)
    model, graphs = _network(size.data, trial.device)
    model.load_state_dict(_untrained(size.data, seed).state_dict())
    epoch = len(task.y_train) // size.batch
    updates = epoch * (size.tuning_epochs if tuning else size.epochs)
    every = max(int(epoch / size.evaluations), 1)
    feed = FEEDS[arm](task.y_train.cpu(), size.batch, updates, seed)
    report, weigh = getattr(feed, "update", None), getattr(feed, "weights", None)
    decay = 0.0 if paper or not size.augment else 5e-4
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=decay, fused=True
    )
    generator = new_generator(seed, "augment")
    curve: list[tuple[float, float]] = []
    stream = itertools.chain.from_iterable(itertools.repeat(feed))
    for step, batch in enumerate(itertools.islice(stream, updates), 1):
        rows = torch.tensor(batch, device=trial.device)
        x = task.x_train[rows]
        if size.augment and not paper:
            x = _augmented(x, generator)
        y = task.y_train[rows]
        if x.shape not in graphs:
            graphs[x.shape] = captured(model, _losses, x, y, fuse=True)
        losses = graphs[x.shape](x, y)
        loss = losses.mean()
        if weigh is not None:
            loss = (losses * weigh(batch).to(losses.device)).mean()
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


def versions(arm: str, scale: Scale) -> tuple[str, ...]:
    """Return the versions of the task that an arm is trained on."""
    spared = arm.startswith("paper") or (scale == "gpu" and arm in BALANCED_ONLY)
    return VERSIONS[:1] if spared else VERSIONS


def _prepare(trial: Trial) -> dict[str, Any]:
    """Tune the learning rate of every arm in both versions, by one rule, on a held-out fifth."""
    size = SIZES[trial.scale]
    tuned = [arm for arm in FEEDS if not arm.startswith("paper")]
    places = [(version, arm) for arm in tuned for version in versions(arm, trial.scale)]
    chosen: dict[str, Any] = {version: {} for version in VERSIONS}
    for done, (version, arm) in enumerate(places):
        trial.progress(done, len(places))

        def error(lr: float, version: str = version, arm: str = arm) -> list[float]:
            seeds = range(TUNING_SEED, TUNING_SEED + size.tuning_seeds)
            runs = (_train(arm, version, lr, seed, trial, tuning=True) for seed in seeds)
            return [100 - statistics.fmean(accuracies[-1] for accuracies, _ in runs)]

        if trial.scale == "smoke":  # nothing is judged, so nothing is tuned
            chosen[version][arm] = {"lr": [size.lr]}
        else:
            chosen[version][arm] = walk(error, size.lr)
    return chosen


def _arm(name: str) -> Callable[[Trial], Outcome]:
    def run(trial: Trial) -> Outcome:
        size, paper = SIZES[trial.scale], name.startswith("paper")
        lr = PAPER_LR if paper else trial.prepared["balanced"][name]["lr"][0]
        curve, _ = _train(name, "balanced", lr, trial.seed, trial)
        trial.progress(1, 2)
        reached = [place for place, value in enumerate(curve, 1) if value >= size.target]
        metrics = {
            "accuracy": curve[-1],
            "updates_to_target": 100 * reached[0] / len(curve) if reached else 100.0,
        }
        if "imbalanced" in versions(name, trial.scale):
            lr = trial.prepared["imbalanced"][name]["lr"][0]
            accuracies, recalls = _train(name, "imbalanced", lr, trial.seed, trial)
            metrics |= {"accuracy_rare": accuracies[-1], "recall_rare": recalls[-1]}
        return Outcome(metrics, {"accuracy": curve})

    return run


def _draw(figure: Figure, result: dict[str, Any]) -> None:
    curves, rare = figure.subplots(1, 2)
    arms = result["arms"]
    for place, arm in enumerate(arms):
        color, name = f"C{place}", arm["name"]
        rows = [run["series"]["accuracy"] for run in arm["runs"]]
        mean = [100 - statistics.fmean(values) for values in zip(*rows, strict=True)]
        share = [100 * (k + 1) / len(mean) for k in range(len(mean))]
        style = "--" if name.startswith("paper") else "-"
        curves.plot(share, mean, style, color=color, label=name, linewidth=1.2)
        points = [run["metrics"] for run in arm["runs"] if "recall_rare" in run["metrics"]]
        if points:
            x, y = ([point[key] for point in points] for key in ("accuracy_rare", "recall_rare"))
            rare.plot(x, y, ".", color=color, alpha=0.25)
            rare.plot(statistics.fmean(x), statistics.fmean(y), "o", color=color)
    curves.set(yscale="log", xlabel="updates (% of the budget)", ylabel="test error (%)")
    curves.legend(fontsize=7, ncols=2)
    rare.set(xlabel="test accuracy (%), one class rare", ylabel="recall of the rare class (%)")


STUDY = Study(
    slug="hard-batches",
    claim=(
        "At equal updates, training on the half of the fixed mini-batches with the highest last "
        "loss ends at a higher test accuracy than ordinary shuffled training, and with a higher "
        "recall of a class that has a fifteenth of its examples."
    ),
    protocol=(
        "Every arm makes as many updates as ordinary epochs of shuffled training have. SGD with "
        "momentum 0.9, learning rate falling linearly to zero by updates. Its peak is found for "
        "every arm and version by the same walk in factors of two, on seeds that are not judged "
        "and a fifth of the training part held out. Imbalanced: class 8 keeps 8 of about 140 "
        "digits, or 333 of 5,000 images; test parts stay balanced. cpu: digits, a perceptron "
        "64-64-10, batch 32, 12 epochs. gpu: CIFAR-10, ResNet-18 with a stride-2 stem, batch 512, "
        "20 epochs, mirrored and shifted images, weight decay 5e-4; some arms see the balanced "
        "version only and tuning runs last 3 epochs, to fit the time. The arms called paper follow "
        "its protocol: "
        "learning rate 0.005 throughout, no decay, no augmentation, batches cut by index. "
        "Batch-norm statistics are estimated anew before every evaluation."
    ),
    arms={name: _arm(name) for name in FEEDS},
    metrics=(
        Metric("accuracy", "test accuracy", "higher", "%", 2),
        Metric("accuracy_rare", "test accuracy, one class rare", "higher", "%", 2),
        Metric("recall_rare", "recall of the rare class", "higher", "%", 1),
        Metric("updates_to_target", "updates to target accuracy", "lower", "% of budget", 0),
    ),
    comparisons=(
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
    ),
    seeds={"smoke": 1, "cpu": 10, "gpu": 3},
    data=("digits",),
    prepare=_prepare,
    figure=_draw,
)

# SPDX-License-Identifier: Apache-2.0
"""The tasks of the study of hard batches: data sets, each in two versions, and their networks.

Handwritten digits for a small perceptron, CIFAR-10 for a ResNet-18, and spoken digits, as pictures
of their sound, for a small convolutional network. How large each is at a scale, `SIZES` says.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchery import datasets
from batchery._core.random import initial_weights, new_generator
from batchery.studies.study import Scale

RARE = 8  # the class that the imbalanced version cuts
VERSIONS = ("balanced", "imbalanced")
Net = Literal["perceptron", "cnn", "resnet18"]


@dataclass(frozen=True)
class Size:
    """How large a task is at a scale."""

    data: str
    net: Net
    batch: int
    epochs: int  # of ordinary training; every arm makes as many updates
    rare: int  # examples left of the rare class
    target: float | None  # per cent of test accuracy that "updates to target" waits for
    lr: float  # where tuning starts
    tuning_seeds: int
    tuning_epochs: int
    evaluations: float  # per epoch
    augment: bool


# A task is named by what stands before the names of its metrics.
SPOKEN = "spoken_"
_RECORDINGS = Size("fsdd", "cnn", 64, 6, 18, None, 0.2, 1, 6, 1, False)
SIZES: dict[Scale, dict[str, Size]] = {
    "smoke": {
        "": Size("digits", "perceptron", 32, 2, 8, 80.0, 0.05, 1, 1, 2, False),
        # Handwritten digits stand in: recordings are not on every machine.
        SPOKEN: Size("digits", "cnn", 64, 1, 8, None, 0.05, 1, 1, 1, False),
    },
    "cpu": {
        "": Size("digits", "perceptron", 32, 12, 8, 95.0, 0.2, 2, 12, 2, False),
        SPOKEN: _RECORDINGS,
    },
    "gpu": {
        "": Size("cifar10", "resnet18", 512, 30, 333, 85.0, 0.025, 1, 3, 1 / 3, True),
        SPOKEN: _RECORDINGS,
    },
}


@dataclass(frozen=True)
class Task:
    """Inputs and labels on one device; what is judged is the test part."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@functools.cache
def arrays_of(name: str, device: torch.device) -> Task:
    """Return a data set in an order that says nothing, as images `[n, channels, side, side]`."""
    data = datasets.load(name)
    if name == "fsdd":
        data = spectrograms(data["waves"], data["labels"], data["test"])
    arrays = {key: torch.as_tensor(value) for key, value in data.items()}
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if name == "digits":  # shuffled already
            arrays[f"x_{part}"] = x.view(-1, 1, 8, 8)
            continue
        order = torch.randperm(len(y), generator=new_generator(part))
        arrays[f"x_{part}"], arrays[f"y_{part}"] = x[order], y[order]
        if name == "cifar10":
            pixels = x[order].permute(0, 3, 1, 2).float() / 127.5 - 1
            # On CUDA what autocast would make of them in every step.
            kind = torch.bfloat16 if device.type == "cuda" else torch.float32
            arrays[f"x_{part}"] = pixels.to(kind, memory_format=torch.channels_last)
    return Task(**{key: value.to(device) for key, value in arrays.items()})


def spectrograms(
    waves: Sequence[np.ndarray], labels: np.ndarray, test: np.ndarray
) -> dict[str, Tensor]:
    """Return log spectrograms of the first half second: 16 bands by 16 moments.

    Each band has mean 0 and variance 1 over the training part.
    """
    sound = torch.zeros(len(waves), 16 * 256)
    for row, samples in zip(sound, waves, strict=True):
        heard = torch.from_numpy(samples[: len(row)] / np.float32(2**15))
        row[: len(heard)] = heard
    window = torch.hann_window(256)
    spectra = torch.stft(sound, 256, 256, window=window, center=False, return_complex=True)
    power = spectra[:, 1:].abs().square().view(-1, 16, 8, 16).mean(2)
    bands = (power + 1e-6).log()
    y, judged = torch.from_numpy(labels), torch.from_numpy(test)
    spread, mean = torch.std_mean(bands[~judged], (0, 2), keepdim=True)
    x = ((bands - mean) / spread)[:, None]
    return {"x_train": x[~judged], "y_train": y[~judged], "x_test": x[judged], "y_test": y[judged]}


def task_of(size: Size, version: str, seed: int, device: torch.device, tuning: bool) -> Task:
    """Return a version of the task; when tuning, a fifth of the training part is what is judged."""
    whole = arrays_of(size.data, device)
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


def _perceptron(side: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(side**2, 64), nn.ReLU(), nn.Linear(64, 10))


def _cnn(side: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise((1, 16, 32)):
        layers += [nn.Conv2d(inner, outer, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 10))


def untrained(net: Net, side: int, seed: int) -> nn.Module:
    """Return a network for images of `side`, with the weights of a seed."""
    with initial_weights(seed, "weights"):
        if net == "resnet18":
            return resnet18()
        return _perceptron(side) if net == "perceptron" else _cnn(side)

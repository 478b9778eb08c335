# SPDX-License-Identifier: Apache-2.0
"""The smallest real language task: the next character of Python's standard-library source.

A perceptron over the last characters trains in seconds on two cores, so that studies of optimizers
and schedules can afford many runs at scale `cpu`. At scale `gpu` they use the model of `lab.py`.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchery import datasets
from batchery._core.random import initial_weights, new_generator

VOCABULARY = 128  # ASCII; any other character reads as "?"
_EMBED = 24
_HELD_OUT_WINDOWS = 8_192


class CharPerceptron(nn.Module):
    """Predicts a character from the `context` characters before it."""

    def __init__(self, context: int, width: int, seed: int) -> None:
        """Initialise as torch does, from `seed` alone."""
        super().__init__()
        self.context = context
        with initial_weights(seed, "weights"):
            self.embed = nn.Embedding(VOCABULARY, _EMBED)
            self.hidden = nn.Linear(_EMBED * context, width)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x_BT: Tensor) -> Tensor:
        """Return logits `(B, VOCABULARY)` for characters `(B, context)`."""
        hidden = self.norm(self.hidden(self.embed(x_BT).flatten(1)))
        return self.head(F.gelu(hidden))  # type: ignore[no-any-return]


@functools.cache
def char_text() -> tuple[Tensor, Tensor]:
    """Return training and held-out characters, int64; the last tenth is held out."""
    codes = datasets.load("stdlib-text").encode("ascii", "replace")
    text = torch.frombuffer(bytearray(codes), dtype=torch.uint8).long()
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def windows(text: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    """Draw `(count, context + 1)` characters: inputs, and the character to predict."""
    starts = torch.randint(len(text) - context, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(context + 1)]


def char_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss in nats of predicting each row's last character."""
    return F.cross_entropy(model(rows[:, :-1]), rows[:, -1])


@torch.no_grad()
def held_out_loss(model: CharPerceptron) -> float:
    """Return the loss in nats on the same held-out windows for every run."""
    rows = windows(char_text()[1], _HELD_OUT_WINDOWS, model.context, new_generator("held out"))
    return float(char_loss(model, rows))

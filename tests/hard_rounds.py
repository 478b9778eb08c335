# SPDX-License-Identifier: Apache-2.0
"""Rounds of hard batches with losses made up for tests."""

import io
import random
from collections import Counter

import torch


def flat(batches):
    return [index for batch in batches for index in batch]


def rounds(sampler, loss, count, indices=False):
    """Train `count` rounds; `loss(examples, visit)` gives a loss for each example."""
    visits, found = Counter(), []
    for _ in range(count):
        found.append([])
        for batch in sampler:
            found[-1].append(batch)
            visits.update(batch)
            losses = torch.tensor([loss(i, visits[i]) for i in batch])
            if indices or sampler.mode == "sample":
                sampler.update(losses, batch)
            else:
                sampler.update(losses.mean())
    return found


def pseudo(example, visit, seed=0):
    """A loss that differs by example and falls with visits, in exact binary fractions."""
    return random.Random(f"{seed} {example} {visit}").randrange(1, 64) / 16 / visit.bit_length()


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)

# SPDX-License-Identifier: Apache-2.0
"""Every object that a card names has a suite for its kind, and a case in it."""

import dataclasses
from pathlib import Path

import pytest
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from batchery.cards import KINDS, load_cards

from .cases import CASES

HERE = Path(__file__).parent
FREE = {"function"}  # plain functions have no life cycle to hold to
HELD = (Optimizer, LRScheduler, Sampler, nn.Module)  # what has a suite of its own


def suite(kind):
    return HERE / f"test_{kind.replace('-', '_')}.py"


def test_every_kind_in_use_has_a_suite():
    used = {kind for card in load_cards() for kind in card.objects.values()} - FREE
    assert used <= set(KINDS)
    assert [kind for kind in sorted(used) if not suite(kind).is_file()] == []


def test_cards_and_cases_name_the_same_objects():
    named = {p for card in load_cards() for p, kind in card.objects.items() if kind not in FREE}
    assert named == set(CASES)


def ways_around(card):
    """What a card calls a function that is one of a kind with a suite."""
    for (path, kind), target in zip(card.objects.items(), card.load_objects(), strict=True):
        held = issubclass(target, HELD) if isinstance(target, type) else isinstance(target, HELD)
        if kind in FREE and held:
            yield path


@pytest.mark.parametrize("card", load_cards(), ids=lambda card: card.slug)
def test_no_card_calls_a_function_what_has_a_suite(card):
    assert list(ways_around(card)) == []


@pytest.mark.parametrize(
    "path",
    [
        "batchery.optim.LAMB",
        "batchery.optim.WSDScheduler",
        "batchery.select.HardBatchSampler",
        "batchery.compress.quant.QuantLinear",
    ],
)
def test_a_way_around_the_suites_is_seen(path):
    card = dataclasses.replace(load_cards()[0], objects={path: "function"})
    assert list(ways_around(card)) == [path]


@pytest.mark.parametrize("card", load_cards(), ids=lambda card: card.slug)
def test_a_card_names_what_there_is(card):
    assert all(callable(target) for target in card.load_objects())
    assert all(target.__doc__ for target in card.load_objects())

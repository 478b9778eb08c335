# SPDX-License-Identifier: Apache-2.0
"""Every object that a card names has a suite for its kind, and a case in it."""

from pathlib import Path

import pytest

from batchery.cards import KINDS, load_cards

from .cases import CASES

HERE = Path(__file__).parent
FREE = {"function"}  # plain functions have no life cycle to hold to


def suite(kind):
    return HERE / f"test_{kind.replace('-', '_')}.py"


def test_every_kind_in_use_has_a_suite():
    used = {kind for card in load_cards() for kind in card.objects.values()} - FREE
    assert used <= set(KINDS)
    assert [kind for kind in sorted(used) if not suite(kind).is_file()] == []


def test_cards_and_cases_name_the_same_objects():
    named = {p for card in load_cards() for p, kind in card.objects.items() if kind not in FREE}
    assert named == set(CASES)


@pytest.mark.parametrize("card", load_cards(), ids=lambda card: card.slug)
def test_a_card_names_what_there_is(card):
    assert all(callable(target) for target in card.load_objects())
    assert all(target.__doc__ for target in card.load_objects())

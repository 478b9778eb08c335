# SPDX-License-Identifier: Apache-2.0
import pytest

from batchery.cards import HEADINGS, UnknownSystem, find_card, load_cards, parse_card, search

GOOD = """---
title: "A paper: its title"
authors: 2
date: 2020-01
arxiv: "2001.00001"
home: collections
objects:
  collections.OrderedDict: function
extra: ""
claim: It is 3 % better.
question: How large?
---
""" + "\n".join(f"## {heading}\ntext" for heading in HEADINGS).replace(
    "## What we measured\ntext", "## What we measured\n<!-- results -->"
)


def test_a_card_is_read_whole():
    card = parse_card("toy", GOOD)
    assert (card.slug, card.authors, card.date) == ("toy", 2, "2020-01")
    assert [target.__name__ for target in card.load_objects()] == ["OrderedDict"]
    page = card.page("THE RESULTS")
    assert page.startswith("# toy\n")
    assert "## What we measured\nTHE RESULTS" in page


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("authors: 2", "authors: two", "toy.md: authors must be of type int, got str"),
        ("claim: It is 3 % better.\n", "", "toy.md: front matter lacks 'claim'"),
        ("extra:", "colour: red\nextra:", "toy.md: front matter has an unknown field 'colour'"),
        (": function", ": gadget", "toy.md: collections.OrderedDict is of unknown kind 'gadget'"),
        ("## Cost\n", "## Price\n", "toy.md: headings must be"),
        ("## Cost\ntext\n", "", "toy.md: headings must be"),
        ("<!-- results -->", "3 %", "toy.md: must hold <!-- results --> once"),
        ("---\ntitle", "title", "toy.md: must begin with front matter"),
        ("authors: 2", "authors: [", "toy.md: front matter is not YAML"),
    ],
)
def test_a_wrong_card_is_refused_by_name(old, new, message):
    assert old in GOOD
    with pytest.raises(ValueError, match=message):
        parse_card("toy", GOOD.replace(old, new, 1))


def test_the_nearest_names_are_offered():
    with pytest.raises(UnknownSystem, match="no system is called 'lambda'; the nearest: lamb"):
        find_card("lambda")
    with pytest.raises(UnknownSystem, match="no system is called 'LAMB'; the nearest: lamb$"):
        find_card("LAMB")
    with pytest.raises(UnknownSystem, match="no system is called 'xyzzy'; there are dp-continual"):
        find_card("xyzzy")
    assert find_card("lamb").slug == "lamb"


def test_search_wants_every_word_and_ignores_case():
    card = find_card("lamb")
    assert card in search(["LARGE", "batch"])
    assert search(["large", "no-such-word"]) == []
    assert search([]) == list(load_cards())

# SPDX-License-Identifier: Apache-2.0
"""The cards, one per system: front matter and a page. They are the only registry.

The command line, the contract suites, the site and the README's table all follow from what is read
here. A card exists only for what works.
"""

import difflib
import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

KINDS = (
    "optimizer",
    "scheduler",
    "sampler",
    "module",
    "loss",
    "estimator",
    "index",
    "mechanism",
    "engine-policy",
    "kernel",
    "function",
)

HEADINGS = (
    "In one sentence",
    "When to use, when not",
    "Minimal example",
    "How it works",
    "Parameters",
    "What we measured",
    "Compared with",
    "Cost",
    "Limits and differences",
    "Reference",
)

RESULTS_MARK = "<!-- results -->"

_FIELDS = ("title", "authors", "date", "arxiv", "home", "objects", "extra", "claim", "question")


class UnknownSystem(LookupError):
    """No card has the slug asked for; the message names the nearest."""


@dataclass(frozen=True)
class Card:
    """One system.

    Attributes:
        slug: its name in the five places and on the command line.
        title: title of the paper.
        authors: how many authors the paper has.
        date: when it appeared, `YYYY-MM`.
        arxiv: arXiv identifier.
        home: module that holds the method.
        objects: public object → kind; the kind decides which contract suite it must pass.
        extra: the extra that its integrations need, or an empty string.
        claim: the paper's claim in one sentence with a number.
        question: the question about the batch that it answers.
        text: the page, with `RESULTS_MARK` where the measured results belong.
    """

    slug: str
    title: str
    authors: int
    date: str
    arxiv: str
    home: str
    objects: Mapping[str, str]
    extra: str
    claim: str
    question: str
    text: str

    def page(self, results: str) -> str:
        """Return the page as Markdown, with `results` put where they belong."""
        month, arxiv = self.date, f"[arXiv {self.arxiv}](https://arxiv.org/abs/{self.arxiv})"
        authors = f"{self.authors} author{'s' if self.authors > 1 else ''}"
        head = f"# {self.slug}\n\n*{self.question}*\n\n{self.title} ({authors}, {month}, {arxiv})."
        return f"{head}\n\n{self.text.replace(RESULTS_MARK, results)}"

    def load_objects(self) -> list[Any]:
        """Import the objects that the card names, in its order."""
        found = []
        for path in self.objects:
            module, name = path.rsplit(".", 1)
            found.append(getattr(importlib.import_module(module), name))
        return found

    def example(self) -> str:
        """Return the code of the minimal example."""
        section = self.text.split("## Minimal example", 1)[1]
        block = re.search(r"```python\n(.*?)```", section, re.S)
        return "" if block is None else block[1]


def parse_card(slug: str, source: str) -> Card:
    """Read one card.

    Raises:
        ValueError: a field or heading is missing, unknown, of the wrong type or out of order; the
            message names the card's file and the field.
    """
    where = f"{slug}.md"
    parts = re.fullmatch(r"---\n(.*?)\n---\n+(.*)", source, re.S)
    if parts is None:
        raise ValueError(f"{where}: must begin with front matter between two lines of '---'")
    try:
        fields = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: front matter is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: front matter must be a mapping")
    for name in _FIELDS:
        if name not in fields:
            raise ValueError(f"{where}: front matter lacks {name!r}")
        kind: type = {"authors": int, "objects": dict}.get(name, str)
        if not isinstance(fields[name], kind):
            got = type(fields[name]).__name__
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}, got {got}")
    for name in fields:
        if name not in _FIELDS:
            raise ValueError(f"{where}: front matter has an unknown field {name!r}")
    for path, kind_name in fields["objects"].items():
        if kind_name not in KINDS:
            raise ValueError(f"{where}: {path} is of unknown kind {kind_name!r}; one of {KINDS}")
    found = tuple(re.findall(r"^## (.+)$", parts[2], re.M))
    if found != HEADINGS:
        raise ValueError(f"{where}: headings must be {HEADINGS} in this order, got {found}")
    if parts[2].count(RESULTS_MARK) != 1:
        raise ValueError(f"{where}: must hold {RESULTS_MARK} once")
    return Card(slug=slug, text=parts[2], **fields)


@functools.cache
def load_cards() -> tuple[Card, ...]:
    """Return all cards, by slug."""
    folder = resources.files(__name__)
    files = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".md"))
    return tuple(
        parse_card(name.removesuffix(".md"), (folder / name).read_text("utf-8")) for name in files
    )


def find_card(slug: str) -> Card:
    """Return the card of a slug.

    Raises:
        UnknownSystem: there is none; the message names the nearest slugs.
    """
    cards = {card.slug: card for card in load_cards()}
    if slug not in cards:
        near = difflib.get_close_matches(slug.lower(), cards, n=3, cutoff=0.4)
        names = (
            f"the nearest: {', '.join(near)}" if near else f"there are {', '.join(sorted(cards))}"
        )
        raise UnknownSystem(f"no system is called {slug!r}; {names}")
    return cards[slug]


def search(words: Sequence[str]) -> list[Card]:
    """Return the cards that hold every word in slug, title, claim, question or objects' names."""
    found = []
    for card in load_cards():
        names = " ".join(path.rsplit(".", 1)[1] for path in card.objects)
        text = f"{card.slug} {card.title} {card.claim} {card.question} {names}".lower()
        if all(word.lower() in text for word in words):
            found.append(card)
    return found

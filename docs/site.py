# SPDX-License-Identifier: Apache-2.0
"""Builds the pages that have their text elsewhere: cards, CONTRIBUTING, CHANGELOG."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from batchery.cards import Card, load_cards
from batchery.studies.report import results_markdown
from batchery.studies.study import SCALES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the nav entries of those that come in numbers."""
    cards = load_cards()
    for card in cards:
        files.append(File.generated(config, f"systems/{card.slug}.md", content=_page(card)))
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text().replace("](docs/", "](")  # as seen from the site
        files.append(File.generated(config, f"{name.lower()}.md", content=text))
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    _fill_nav(
        config.nav,
        {
            "Systems": [{card.slug: f"systems/{card.slug}.md"} for card in cards],
            "Decisions": [f"decisions/{path.name}" for path in decisions],
        },
    )
    return files


def _fill_nav(nav: list[dict[str, Any]], lists: dict[str, list[Any]]) -> None:
    for entry in nav:
        for title in entry:
            if title in lists:
                entry[title] = lists[title]


def _page(card: Card) -> str:
    """Return a card's page: its text, its results with their figures, its reference."""
    figures = [
        f"![Figure of the study at scale {scale}](../results/{card.slug}.{scale}.svg)"
        for scale in SCALES[1:]
        if (RESULTS / f"{card.slug}.{scale}.svg").is_file()
    ]
    text = card.page("\n\n".join([results_markdown(RESULTS, card.slug), *figures]))
    names = [f"::: {target.__module__}.{target.__qualname__}" for target in card.load_objects()]
    return "\n\n".join([text, "## Names", *names]) + "\n"

# SPDX-License-Identifier: Apache-2.0
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from batchery.cards import load_cards
from batchery.studies.harness import run_study
from batchery.studies.report import (
    README_BEGIN,
    README_END,
    arm_rows,
    comparison_rows,
    draw,
    html_report,
    markdown_table,
    number,
    readme_table,
    results_markdown,
    write_readme_table,
)
from batchery.studies.study import Comparison, Metric, Outcome, Study


def _arm(loss):
    return lambda trial: Outcome({"loss": loss + 0.02 * trial.seed}, {"curve": [3.0, loss]})


@pytest.fixture
def study():
    return Study(
        "toy",
        "new beats <old> by 1 nat",
        "equal | everything",
        {"old": _arm(2.0), "new": _arm(1.0), "lost": _arm(float("nan"))},
        [Metric("loss", "loss", "lower", "nats", digits=2)],
        [Comparison("new", "old", "loss"), Comparison("lost", "old", "loss", claim=False)],
        {"smoke": 1, "cpu": 2, "gpu": 2},
    )


@pytest.fixture
def result(study, tmp_path):
    return run_study(study, "cpu", results=tmp_path)


def test_rows_say_what_the_result_says(result):
    header, rows = arm_rows(result)
    assert header[:2] == ["arm", "loss (nats)"]
    assert rows[0][:2] == ["old", "2.01 ± 0.01"]
    assert rows[2][:2] == ["lost", "diverged"]
    _, rows = comparison_rows(result)
    assert rows[0] == ["new vs old", "loss (nats)", "1.00", "1.00 … 1.00", "> 0", "holds"]
    assert rows[1][0] == "lost vs old (for information)"
    assert rows[1][5] == "does not hold here (arm diverged)"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1234.567, 1, "1,234.6"),
        (0.0, 3, "0.000"),
        (1e-5, 3, "1e-05"),
        (0.085, 1, "0.085"),
        (float("nan"), 3, "–"),
    ],
)
def test_numbers(value, digits, text):
    assert number(value, digits) == text


def test_markdown_cells_cannot_break_the_table():
    assert markdown_table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"


def test_the_figure_is_svg_and_repeats_bit_for_bit(study, result, tmp_path):
    first = draw(study, result, tmp_path)
    content = first.read_bytes()
    assert first.name == "toy.cpu.svg"
    assert ElementTree.fromstring(content).tag.endswith("svg")
    assert draw(study, result, tmp_path).read_bytes() == content


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_no_other_file(study, result, tmp_path):
    draw(study, result, tmp_path)
    text = html_report(tmp_path, [("toy", "cpu")], tmp_path / "page").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert any(link.startswith("data:") for link in page.links)
    assert "new beats &lt;old&gt; by 1 nat" in text
    assert re.search(r'class="verdict holds">holds', text)


def test_a_report_of_nothing_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no stored result .*toy\.gpu\.json"):
        html_report(tmp_path, [("toy", "gpu")], tmp_path)


def test_results_as_markdown(result, tmp_path):
    text = results_markdown(tmp_path, "toy")
    assert "### Scale `cpu`: holds" in text
    assert "| new | 1.01 ± 0.01 |" in text
    assert results_markdown(tmp_path, "none") == "No stored result yet."


def test_readme_table_replaces_only_what_is_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{README_BEGIN}\nold\n{README_END}\ntail\n")
    write_readme_table(readme, load_cards(), tmp_path)
    text = readme.read_text()
    assert text.startswith("head\n")
    assert text.endswith(f"{README_END}\ntail\n")
    assert "old\n" not in text
    assert readme_table(load_cards(), tmp_path) in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        write_readme_table(readme, load_cards(), tmp_path)

# SPDX-License-Identifier: Apache-2.0
"""The `batchery` command: `list`, `show`, `study`, `report`, `data`, `release`.

Exit status: 0 done; 1 something failed, a record is bad, or a stored claim no longer holds; 2 wrong
arguments; 3 data are missing; 4 more would be spent than was declared; 130 interrupted (the same
command resumes).
"""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

import batchery
from batchery.cards import RESULTS_MARK, Card, find_card, load_cards, search
from batchery.privacy import release_command

if TYPE_CHECKING:
    import torch

    from batchery.studies.study import Scale, Study

FAILED, USAGE, NO_DATA, INTERRUPTED = 1, 2, 3, 130

console = Console()
errors = Console(stderr=True)


class _Parser(argparse.ArgumentParser):
    """Argument errors in one line."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{self.prog}: {message} (see {self.prog} --help)")
        raise SystemExit(USAGE)


def _complain(message: str) -> None:
    errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="batchery", description=batchery.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"batchery {batchery.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)

    verb = verbs.add_parser("list", help="the systems, or those that match some words")
    verb.add_argument("words", nargs="*", help="words in titles, claims, questions or names")
    verb.set_defaults(run=_list)

    verb = verbs.add_parser("show", help="one system's card")
    verb.add_argument("slug")
    verb.add_argument("--results", type=Path, default=None, help="folder of stored results")
    verb.set_defaults(run=_show)

    verb = verbs.add_parser("study", help="run claims against their true baselines")
    verb.add_argument("slugs", nargs="*", metavar="SLUG")
    verb.add_argument("--all", action="store_true", help="every system's study")
    verb.add_argument("--scale", choices=("smoke", "cpu", "gpu"), default="cpu")
    verb.add_argument(
        "--device", type=device_argument, help="cpu, cuda, cuda:1, … (default: by scale)"
    )
    verb.add_argument("--seeds", type=_positive, help="how many seeds (default: the study's)")
    verb.add_argument("--results", type=Path, default=None, help="folder for the results")
    verb.add_argument("--report", type=Path, metavar="DIR", help="also write DIR/index.html")
    verb.add_argument(
        "--check",
        action="store_true",
        help="compare with the stored result, which stays: exit 1 when a claim that held does not",
    )
    verb.set_defaults(run=_study)

    verb = verbs.add_parser("report", help="one HTML page of the stored results")
    verb.add_argument("folder", nargs="?", type=Path, default=Path("build/report"), metavar="DIR")
    verb.add_argument("--results", type=Path, default=None, help="folder of stored results")
    verb.add_argument(
        "--readme", type=Path, help="instead, rewrite the table of systems in a README"
    )
    verb.set_defaults(run=_report)

    verb = verbs.add_parser("data", help="list the data sets, or fetch some")
    verb.add_argument("names", nargs="*", metavar="NAME")
    verb.set_defaults(run=_data)

    verb = verbs.add_parser(
        "release",
        help="release statistics of a stream of records privately, again and again",
        description=release_command.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    release_command.add_options(verb)
    verb.set_defaults(run=release_command.run)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return value


def device_argument(text: str) -> "torch.device":
    """Return a device for argparse, or say in one line what is wrong with it."""
    import torch

    known = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if known is None:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:0, cuda:1, …, got {text!r}")
    here = torch.cuda.device_count()
    if text != "cpu" and int(known[1] or 0) >= here:
        raise argparse.ArgumentTypeError(f"{text} is not here: CUDA has {here} devices")
    return torch.device(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    from batchery.datasets import CorruptData, MissingData

    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on from here")
        return INTERRUPTED
    except MissingData as error:
        _complain(str(error))
        return NO_DATA
    except (CorruptData, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        _complain(f"batchery {options.verb}: {_first_line(error)}")
        return USAGE if isinstance(error, LookupError | ValueError) else FAILED


def _first_line(error: Exception) -> str:
    # str(KeyError) puts quotes around its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.strip().split("\n")[0] or type(error).__name__


def _results_folder(given: Path | None) -> Path:
    """Return the folder of stored results: the given one, or the project's when we are in it."""
    if given is not None:
        return given
    project = Path("docs/results")
    return project if project.is_dir() else Path("batchery-results")


def _list(options: argparse.Namespace) -> int:
    cards = search(options.words) if options.words else load_cards()
    if not cards:
        _complain(f"batchery list: no card holds {' '.join(options.words)!r}")
        return FAILED
    table = Table("slug", "question", "home", box=None, header_style="bold")
    for card in cards:
        table.add_row(card.slug, card.question, card.home)
    console.print(table)
    return 0


def _show(options: argparse.Namespace) -> int:
    from batchery.studies.harness import load_result
    from batchery.studies.study import SCALES

    card, folder = find_card(options.slug), _results_folder(options.results)
    stored = [load_result(folder, card.slug, scale) for scale in SCALES[1:]]
    before, after = card.page(RESULTS_MARK).split(RESULTS_MARK)
    console.print(Markdown(before))
    for result in stored:
        if result is not None:
            _print_result(result)
    console.print(Markdown(after if any(stored) else f"No stored result yet.\n\n{after}"))
    return 0


def _study(options: argparse.Namespace) -> int:
    from batchery.studies.harness import forget_runs

    if options.all == bool(options.slugs):
        raise ValueError("name one or more systems, or --all")
    slugs = dict.fromkeys(options.slugs)  # one named twice runs once
    cards = load_cards() if options.all else [find_card(slug) for slug in slugs]
    stored = results = _results_folder(options.results)
    before: dict[str, dict[str, Any]] = {}
    missing = 0
    if options.check:
        results = stored / ".check"
        before = _stored(stored, cards, options.scale)
        missing = FAILED if len(before) < len(cards) else 0
        cards = [card for card in cards if card.slug in before]
    if not cards:
        return missing
    finished, status = _run_all(cards, options.scale, options.device, options.seeds, results)
    status = max(status, missing)
    for card in cards:
        forget_runs(results, card.slug, options.scale)
    for result in () if options.all else finished:
        _print_result(result)
    if len(finished) > 1 or (options.all and finished):
        _print_summary(finished)
    if options.all and not options.report:
        console.print("details: name a system, or give --report DIR")
    if options.report and finished:
        from batchery.studies.report import html_report

        entries = [(result["slug"], options.scale) for result in finished]
        console.print(f"report: {html_report(results, entries, options.report)}", highlight=False)
    if options.check:
        for result in finished:
            status = max(status, _check(result, before[result["slug"]]))
    return status


def _stored(folder: Path, cards: Sequence[Card], scale: str) -> dict[str, dict[str, Any]]:
    """Read the cards' stored results; those that have none are named and left out."""
    from batchery.studies.harness import load_result, result_path

    found = {}
    for card in cards:
        result = load_result(folder, card.slug, scale)
        if result is None:
            path = result_path(folder, card.slug, scale)
            _complain(f"{card.slug}: nothing to check against, no stored result {path}")
        else:
            found[card.slug] = result
    return found


def _run_all(
    cards: Sequence[Card], scale: "Scale", device: Any, seeds: int | None, results: Path
) -> tuple[list[dict[str, Any]], int]:
    """Run the cards' studies in turn; one that fails is reported and does not stop the others."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from batchery.datasets import MissingData
    from batchery.studies.harness import kept_runs, load_study, run_study
    from batchery.studies.report import draw

    studies: list[Study] = [load_study(card.slug) for card in cards]
    kept = sum(kept_runs(results, study.slug, scale) for study in studies)
    if kept:
        console.print(f"resuming: {kept} finished runs are here already")
    finished: list[dict[str, Any]] = []
    status = 0
    with ExitStack() as stack:
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        bar = stack.enter_context(Progress(*columns, console=errors))
        task = bar.add_task("", total=len(studies))
        for place, study in enumerate(studies):

            def report(label: str, fraction: float, place: int = place) -> None:
                bar.update(task, description=label, completed=place + fraction)

            try:
                result = run_study(
                    study,
                    scale,
                    results=results,
                    device=device,
                    seeds=seeds,
                    keep_runs=True,
                    on_progress=report,
                )
                draw(study, result, results)
            except MissingData as error:
                _complain(f"{study.slug}: {error}")
                status = max(status, NO_DATA)
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                _complain(f"{study.slug}: {type(error).__name__}: {_first_line(error)}")
                status = max(status, FAILED)
            else:
                finished.append(result)
                errors.print(f"{study.slug}: {result['verdict']}", highlight=False)
        bar.update(task, completed=len(studies), description="done")
    return finished, status


def _print_result(result: dict[str, Any]) -> None:
    from batchery.studies.report import arm_rows, comparison_rows, provenance, verdict_line

    console.print(f"\n[bold]{result['slug']}[/] ({result['scale']}): {escape(result['claim'])}\n")
    console.print(f"protocol: {escape(result['protocol'])}\n")
    for header, rows in (arm_rows(result), comparison_rows(result)):
        _print_table(header, rows)
        console.print()
    console.print(f"verdict: [bold]{escape(verdict_line(result))}[/]")
    console.print(f"{escape(provenance(result))}\n", style="dim", highlight=False)


def _print_summary(results: Sequence[dict[str, Any]]) -> None:
    from batchery.studies.report import verdict_line

    rows = []
    for result in results:
        runs = [run for arm in result["arms"] for run in arm["runs"]]
        seconds = sum(run["seconds"] for run in runs)
        seconds += (result["prepared"] or {"seconds": 0.0})["seconds"]
        counts = (str(len(result["arms"])), str(len(runs)), f"{seconds:.0f}")
        rows.append((result["slug"], *counts, verdict_line(result)))
    console.print()
    _print_table(("system", "arms", "runs", "seconds", "verdict"), rows)
    console.print()


_GAP = 2  # between two columns


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose words and numbers stay whole.

    One that is too wide for the console comes in parts: each has the first column, as many others
    as fit, and the rows that have something in them.
    """
    columns = list(zip(header, *rows, strict=True))
    full = [max(map(len, column)) for column in columns]
    # A line breaks at spaces, but not within "1.0 ± 0.1".
    words = [[re.split(r"(?<!±) (?!±)", cell) for cell in column] for column in columns]
    least = [max(len(word) for cell in column for word in cell) for column in words]
    parts: list[list[int]] = []
    left = 0
    for place, width in enumerate(least[1:], 1):
        if width + _GAP > left:
            parts.append([0])
            left = console.width - least[0] - _GAP
        parts[-1].append(place)
        left -= width + _GAP
    for number, part in enumerate(parts):
        widths = {place: least[place] for place in part}
        for _ in range(console.width - sum(widths.values()) - _GAP * len(part)):
            narrow = [place for place in part if widths[place] < full[place]]
            if narrow:  # what is left goes to the narrowest column that can use it
                widths[min(narrow, key=widths.__getitem__)] += 1
        table = Table(box=None, header_style="bold", padding=(0, _GAP // 2))
        for place in part:
            table.add_column(escape(header[place]), width=widths[place])
        for row in rows:
            if any(row[place] for place in part[1:]):
                table.add_row(*(escape(row[place]) for place in part))
        if number:
            console.print()
        console.print(table)


def _check(result: dict[str, Any], before: dict[str, Any]) -> int:
    from batchery.studies.study import check_claims

    found = check_claims(before, result)
    slug, held = result["slug"], sum(len(names) for names in found.values())
    console.print(f"{slug}: stored {before['verdict']!r}, now {result['verdict']!r}")
    console.print(f"  {len(found['kept'])} of {held} claims that held still hold")
    for name in found["unchecked"]:
        line = f"  unchecked, for want of an arm or of seeds: {name}"
        console.print(line, markup=False, soft_wrap=True)
    for name in found["lost"]:
        _complain(f"{slug}: no longer holds: {name}")
    return FAILED if found["lost"] else 0


def _report(options: argparse.Namespace) -> int:
    from batchery.studies.report import html_report, stored_results, write_readme_table

    results = _results_folder(options.results)
    if options.readme:
        console.print(f"wrote {write_readme_table(options.readme, load_cards(), results)}")
        return 0
    entries = stored_results(load_cards(), results)
    if not entries:
        raise FileNotFoundError(f"no stored results in {results}; run batchery study first")
    console.print(f"wrote {html_report(results, entries, options.folder)}")
    return 0


def _data(options: argparse.Namespace) -> int:
    from batchery import datasets

    if not options.names:
        table = Table("name", "what it is", "licence", box=None, header_style="bold")
        for name in datasets.names():
            entry = datasets.describe(name)
            table.add_row(name, entry.summary, entry.licence)
        console.print(table)
    for name in options.names:
        datasets.fetch(name)
        console.print(f"{name}: ready", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

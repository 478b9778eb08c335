# SPDX-License-Identifier: Apache-2.0
"""The options of `batchery release`, its messages and its exit status.

The engine, with examples, is in `batchery.privacy.release`; it is imported when it runs.
"""

import argparse
import csv
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from batchery.privacy.accounting import Budget

BAD_RECORD, OVERSPENT = 1, 4  # exit status
DESCRIPTION = """\
Read records, and after each, or each batch, release a statistic of all so far, with noise that
hides any one record. Columns, values, range, horizon and budget are declared before the first
record. The same command goes on where it stopped: the ledger keeps the state.

  batchery release views.csv --count --columns page --values home,search --every 1000 \\
      --horizon 10000 --rho 0.5 --ledger views.db --out seen.jsonl
  batchery release log.jsonl --follow --select --columns export,print,share \\
      --horizon none --epsilon 1 --delta 1e-6 --ledger features.db
  shop | batchery release --sum --columns amount --range 0,500 \\
      --horizon 5000 --epsilon 2 --ledger shop.db

What all releases may cost is reserved at the start, and given back at the end if there was none; a
run that is killed before its first keeps it until the stream is opened again. Streams of one ledger
add up: --total keeps them within one budget; without it a second one brings a warning.

THE LEDGER IS AS SENSITIVE AS THE RECORDS, and so are messages about lines."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options to a parser."""
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="records (default: standard input)")
    add("--format", choices=("csv", "jsonl"), help="default: by the file's name, else csv")
    add("--follow", action="store_true", help="at the end of FILE wait for more")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--from-start",
        action="store_true",
        default=True,
        help="the input begins with the stream's first record; consumed ones are skipped (default)",
    )
    start.add_argument(
        "--continue",
        dest="from_start",
        action="store_false",
        help="the input holds new records only: a pipe that goes on, a file begun anew",
    )
    asks = parser.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("count", "records; ones in each of --columns; or records with each of --values"),
        ("sum", "sums of --columns, whole numbers in --range"),
        ("max", "the largest of these counts"),
        ("select", "the name of the largest of these counts"),
    ):
        asks.add_argument(f"--{name}", dest="ask", action="store_const", const=name, help=text)
    add("--columns", type=names, default=(), metavar="A,B", help="that are read")
    add("--values", type=names, default=(), metavar="X,Y", help="all values of the one column")
    of_sum = "of --sum; below 0 with =, as in --range=-5,5"
    add("--range", type=low_high, default=(0, 1), metavar="LOW,HIGH", help=of_sum)
    add("--every", type=whole, default=1, metavar="N", help="records for each release (default: 1)")
    add("--horizon", type=horizon, required=True, metavar="N", help="most releases; or none")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--rho", type=real, help="budget of all releases, zCDP")
    budget.add_argument("--epsilon", type=real, help="the same, with --delta, or pure")
    add("--delta", type=real)
    add("--ledger", type=Path, required=True, metavar="FILE", help="keeps the state")
    add("--stream", default="stream", metavar="NAME", help="name in the ledger (default: stream)")
    total = "most that all streams of the ledger may cost together, in ρ or ε (default: no limit)"
    add("--total", type=real, help=total)
    add("--out", type=Path, metavar="FILE", help="for the releases (default: standard output)")
    published = "releases that have been seen: a ledger behind them is refused (--out tells itself)"
    add("--published", type=whole, default=0, metavar="N", help=published)
    on_bad = "at a bad record, stop before it (default), or count it as zeros"
    add("--on-bad", choices=("stop", "skip"), default="stop", help=on_bad)
    add("--plot", type=Path, metavar="FILE", help="draw all releases at the end")
    add("--test-mode", action="store_true", help="noise that anyone knows: PROTECTS NOBODY")


def names(text: str) -> tuple[str, ...]:
    """Return names with commas between, quoted as in CSV."""
    try:
        return tuple(name.strip() for name in next(csv.reader([text], strict=True)))
    except csv.Error:
        raise _must_be("names with commas between, quoted as in CSV", text) from None


def whole(text: str) -> int:
    """Return a whole number."""
    if not re.fullmatch("[+-]?[0-9]{1,18}", text):
        raise _must_be("a whole number", text)
    return int(text)


def real(text: str) -> float:
    """Return a number."""
    try:
        if "_" in text or not text.isascii():  # 1_0, and digits of any script, are for Python
            raise ValueError
        return float(text)
    except ValueError:
        raise _must_be("a number", text) from None


def low_high(text: str) -> tuple[int, int]:
    """Return two whole numbers with a comma between."""
    try:
        low, high = map(whole, text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise _must_be("two whole numbers with a comma between", text) from None
    return low, high


def horizon(text: str) -> int | None:
    """Return a whole number, or None for "none"."""
    try:
        return None if text == "none" else whole(text)
    except argparse.ArgumentTypeError:
        raise _must_be("a whole number or none", text) from None


def _must_be(what: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"must be {what}, got {text!r}")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from batchery.privacy import BudgetExceeded, HorizonExceeded
    from batchery.privacy.question import BadRecord, Question
    from batchery.privacy.release import Engine
    from batchery.privacy.release_job import Job

    if options.delta is not None and options.epsilon is None:
        raise ValueError("--delta belongs to --epsilon")
    job = Job(
        Question(options.ask, options.columns, options.values, options.range),
        _budget(options, options.epsilon if options.rho is None else options.rho),
        options.horizon,
        options.ledger,
        every=options.every,
        source=options.file,
        format=options.format,
        follow=options.follow,
        from_start=options.from_start,
        out=options.out,
        published=options.published,
        on_bad=options.on_bad,
        stream=options.stream,
        total=None if options.total is None else _budget(options, options.total),
        plot=options.plot,
        test_mode=options.test_mode,
    )
    console = Console(stderr=True)

    def tell(text: str, style: str = "") -> None:
        style = "bold red" if text.isupper() else style
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    # A bar is not drawn into a file of messages, nor over releases on the same screen.
    hidden = not console.is_terminal or (options.out is None and sys.stdout.isatty())
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stdout=False, disable=hidden) as bar:
        task = bar.add_task("", total=options.horizon)

        def show(releases: int, records: int) -> None:
            text = f"{releases} releases of {records} records"
            bar.update(task, description=text, completed=releases)

        try:
            Engine(job, tell, show).run()
        except (BadRecord, BudgetExceeded, HorizonExceeded) as error:
            tell(f"batchery release: {error}", "red")
            return BAD_RECORD if isinstance(error, BadRecord) else OVERSPENT
        except BrokenPipeError:
            # Nobody reads on: what Python still holds for them must not fail when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
    return 0


def _budget(options: argparse.Namespace, amount: float) -> "Budget":
    from batchery.privacy import Budget

    if options.rho is not None:
        return Budget(rho=amount)
    if options.delta is None:
        return Budget.pure(amount)
    return Budget.approx(amount, options.delta)

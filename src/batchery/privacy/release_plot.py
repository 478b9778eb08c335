# SPDX-License-Identifier: Apache-2.0
"""The figure of `batchery release`: releases, the band of their error, in test mode the truth.

The whole is in `batchery.privacy.release`.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchery._core.state import atomic_write
from batchery._core.validate import import_extra, require
from batchery.privacy.ledger_file import Release
from batchery.privacy.release_job import Job

_PLOTTED_BY = ("matplotlib.figure", "study", "batchery release --plot")
_KINDS = ("svg", "png", "pdf")


@dataclass
class Truth:
    """What would be released without noise; for test mode alone.

    Attributes:
        job: says how many records a release has.
        wanted: whether to keep any of it.
        answers: by number of release.
    """

    job: Job
    wanted: bool
    answers: dict[int, Any] = field(default_factory=dict)
    records: int = 0
    sums: list[int] = field(default_factory=list)

    def add(self, row: list[int]) -> None:
        """Add a record."""
        if not self.wanted:
            return
        self.sums = [a + b for a, b in zip(self.sums, row, strict=True)] if self.sums else row
        self.records += 1
        if self.records % self.job.every == 0:
            self.answers[self.records // self.job.every] = self.job.question.answer(self.sums)


def check_plot(path: Path) -> None:
    """Find out that a figure can be drawn into a file, before there is anything to draw.

    Raises:
        ImportError: matplotlib is absent.
        OSError: its folder cannot be made.
        ValueError: it is a folder, or in one that cannot be written, or of another kind.
    """
    import_extra(*_PLOTTED_BY)
    known = _kind(path) in _KINDS
    require(known, "Job", "plot", f"must end in .{', .'.join(_KINDS)}", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    writable = not path.is_dir() and os.access(path.parent, os.W_OK)
    require(writable, "Job", "plot", "must be a file that can be written", str(path))


def draw(job: Job, releases: list[Release], truth: dict[int, Any], bound: float) -> None:
    """Draw releases with the band of their error, and the truth where it is known.

    Args:
        job: says where, and what the releases are.
        releases: all of them.
        truth: what would have been released without noise, by number of release.
        bound: what no release is off by; half the width of the band.

    Raises:
        ImportError: matplotlib is absent.
    """
    path = Path(job.plot or "")
    question, at = job.question, [release.t // job.stride for release in releases]
    figure = import_extra(*_PLOTTED_BY).Figure(layout="constrained")
    off = "behind the leader" if question.ask == "select" else "off"
    title = f"{job.stream}: {question.ask}, {off} by at most {math.ceil(bound)}"
    axes = figure.add_subplot(xlabel="records", title=title)
    values = _columns([release.value for release in releases])
    truths = _columns([truth[t] for t in at if t in truth])
    names = question.labels if len(values) > 1 else ("released",)
    for place, (name, value) in enumerate(zip(names, values, strict=False)):
        records = [t * job.every for t in at]
        axes.step(records, value, where="post", color=f"C{place}", label=name)
        if question.ask != "select":
            band = [v - bound for v in value], [v + bound for v in value]
            axes.fill_between(records, *band, step="post", color=f"C{place}", alpha=0.2, lw=0)
        if truths:
            known = [t * job.every for t in at if t in truth]
            label = "truth" if place == 0 else None
            axes.plot(known, truths[place], "--", color="black", linewidth=1, label=label)
    if question.ask == "select":
        axes.set_yticks(range(len(question.labels)), question.labels)
    if values:
        axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format=_kind(path)))


def _kind(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or "svg"


def _columns(values: list[Any]) -> list[list[float]]:
    rows = [value if isinstance(value, list) else [value] for value in values]
    return [list(column) for column in zip(*rows, strict=True)]

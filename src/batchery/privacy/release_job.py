# SPDX-License-Identifier: Apache-2.0
"""What one run of `batchery release` is told to do, and the lines that come of it.

The whole is in `batchery.privacy.release`.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchery._core.validate import integer, one_of, require
from batchery.privacy.accounting import Budget
from batchery.privacy.ledger_file import Release
from batchery.privacy.mechanism import Mechanism
from batchery.privacy.noise import DiscreteNoise
from batchery.privacy.question import Question
from batchery.privacy.records import Format
from batchery.privacy.stream import Stream


@dataclass(frozen=True)
class Job:
    """What `batchery release` was asked to do.

    Attributes:
        question: what is released.
        budget: of all releases of this stream.
        horizon: number of releases; None for a stream without end.
        ledger: file that keeps the state.
        every: records for each release.
        source: file of records; None for standard input.
        format: of the records; by the name of the file if None.
        follow: wait at the end of the file for more.
        from_start: the source begins with the first record of the stream, so that those consumed
            are skipped; otherwise with the first new one.
        out: file that releases are appended to; None for standard output.
        published: number of releases that the world is known to have seen, beside those in `out`.
        on_bad: what to do at a bad record: `"stop"`, or `"skip"` and count it as zeros.
        stream: name of the stream in the ledger.
        total: what all streams of the ledger together may cost.
        plot: file for a figure of what was released.
        test_mode: noise that anyone can repeat, and the truth beside it; protects nobody.
    """

    question: Question
    budget: Budget
    horizon: int | None
    ledger: Path
    every: int = 1
    source: Path | None = None
    format: Format | None = None
    follow: bool = False
    from_start: bool = True
    out: Path | None = None
    published: int = 0
    on_bad: Literal["stop", "skip"] = "stop"
    stream: str = "stream"
    total: Budget | None = None
    plot: Path | None = None
    test_mode: bool = False

    def __post_init__(self) -> None:
        """Check what does not depend on files."""
        integer("Job", "every", self.every, at_least=1)
        integer("Job", "published", self.published, at_least=0)
        one_of("Job", "on_bad", self.on_bad, ("stop", "skip"))
        file = self.source is not None or not self.follow
        require(file, "Job", "follow", "is for a file", self.follow)
        if self.horizon is not None:
            integer("Job", "horizon", self.horizon, at_least=1)
            largest = max(map(abs, self.question.range)) * self.horizon * self.every
            require(largest < 1 << 62, "Job", "horizon", "must let sums be below 2^62", largest)

    @property
    def stride(self) -> int:
        """Steps of the mechanism for each release."""
        return self.every if self.question.steps_each_record else 1

    def mechanism(self) -> Mechanism:
        """Return a new mechanism."""
        noise = None
        if self.test_mode:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the command has its own, louder warning
                noise = DiscreteNoise(insecure_seed=0)
        return self.question.mechanism(self.horizon, self.every, self.budget, noise)

    def declared(self) -> dict[str, Any]:
        """Return what must stay the same for the stream, beside the mechanism's settings."""
        return self.question.declared() | {"every": self.every, "test_mode": self.test_mode}

    def line(self, release: Release) -> bytes:
        """Return a release as it is published."""
        t = release.t // self.stride
        found = {
            "stream": self.stream,
            "t": t,
            "records": t * self.every,
            "value": self.question.shown(release.value),
            "time": release.time,
        }
        return json.dumps(found | ({"test": True} if self.test_mode else {})).encode() + b"\n"


class Output:
    """Where releases go, one line each.

    Args:
        job: says where.

    Attributes:
        last: the last line of a file that is there already.
        torn: what a crash has left after it.

    Raises:
        ValueError: the file holds something else than releases of this stream.
    """

    def __init__(self, job: Job) -> None:
        """Open the file and find its end; see the class."""
        self.job = job
        self.last = self.torn = b""
        self.file = sys.stdout.buffer if job.out is None else open(job.out, "ab")
        if job.out is not None and job.out.is_file():
            with open(job.out, "rb") as before:
                for line in before:
                    if line.endswith(b"\n"):
                        self.last = line
                    else:
                        self.torn = line

    def published(self) -> int:
        """Return the number of releases that a file holds already."""
        if not self.last:
            return 0
        try:
            found = json.loads(self.last)
            if found["stream"] == self.job.stream:
                return int(found["t"])
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{self.job.out} holds no releases of stream {self.job.stream!r}")

    def fit(self, stream: Stream) -> list[Release]:
        """Return what the ledger has and a file has not, having checked that they agree."""
        if self.job.out is None:
            return stream.pending()
        after = self.published() * self.job.stride
        known = stream.releases(after - 1 if after else 0)
        missing = known[1:] if after else known
        if after and self.job.line(known[0]) != self.last:
            raise ValueError(f"{self.job.out} holds other releases than the ledger has made")
        if self.torn:
            begun = bool(missing) and self.job.line(missing[0]).startswith(self.torn)
            if not begun:
                raise ValueError(f"{self.job.out} ends with something else than a release")
            self.file.truncate(self.file.seek(0, 2) - len(self.torn))
        return missing

    def write(self, releases: list[Release]) -> None:
        """Publish releases, each at once."""
        for release in releases:
            self.file.write(self.job.line(release))
            self.file.flush()

    def close(self) -> None:
        """Close a file."""
        if self.job.out is not None:
            self.file.close()

# SPDX-License-Identifier: Apache-2.0
r"""The engine of `batchery release`: records in, private releases out, crashes between.

    # how often was each page seen so far, after every 1000 of at most ten million views
    batchery release views.csv --count --columns page --values home,search,basket \
        --every 1000 --horizon 10000 --rho 0.5 --ledger views.db --out seen.jsonl

    # the most used of three features, from a log that grows; (ε, δ) = (1, 10⁻⁶)
    batchery release log.jsonl --follow --select --columns export,print,share \
        --horizon none --epsilon 1 --delta 1e-6 --ledger features.db

    # a running sum of amounts from 0 to 500, pure ε, from a pipe
    shop | batchery release --sum --columns amount --range 0,500 --horizon 5000 --epsilon 2 \
        --ledger shop.db

The same command goes on where it stopped, whatever stopped it: the ledger knows how many records
have been consumed, and a digest of them, so that another file in their place is noticed. Records
that do not fill a batch are not consumed. Into a file every release goes once; on standard output
the last ones may come again after a crash, the same lines.

What is private, and what is not. Releases are, at the declared budget, for one record replaced by
another. Their times are not, nor is anything on standard error: line numbers of bad records are
for the owner of the data. With `on_bad="stop"` the stream stops at a bad record, which those who
read the releases notice; nothing of it is consumed, and a mended file goes on. With "skip" a bad
record is a step like any other, with zeros: were it left out, every later record would move up one
step, and one record's being unreadable would change all of them.
"""

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

from batchery.privacy.ledger import Ledger
from batchery.privacy.ledger_file import Release
from batchery.privacy.mechanism import HorizonExceeded
from batchery.privacy.question import BadRecord
from batchery.privacy.records import Position, Records, digest_after, format_of
from batchery.privacy.release_job import Job, Output
from batchery.privacy.release_plot import Truth, check_plot, draw
from batchery.privacy.stream import Stream

_BETA = 0.05  # of the error bound that is told and drawn
_CELLS = 1 << 20  # of rows that are given to the mechanism at once
_SHOWN = 20  # bad lines that are named one by one


@contextmanager
def whole() -> Iterator[None]:
    """Let Ctrl-C wait for the end of what is inside, so that it never falls between its parts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


class Engine:
    """One run of a job.

    Args:
        job: what to do.
        tell: is given lines for the owner of the data.
        progress: is given the numbers of releases and records so far.
    """

    def __init__(
        self, job: Job, tell: Callable[[str], None], progress: Callable[[int, int], None]
    ) -> None:
        """Open nothing yet; see the class."""
        self.job = job
        self.tell = tell
        self.progress = progress
        self.truth = Truth(job, job.test_mode)
        self.position = Position()
        self.bad = 0
        self.name = "standard input" if job.source is None else str(job.source)

    def run(self) -> None:
        """Read, release, and stop at the end of the source.

        Raises:
            BadRecord: at a bad record, with its line, if the job says so.
            BudgetExceeded, HorizonExceeded: more was asked for than was declared.
            KeyboardInterrupt: between two releases; the state is kept.
            LedgerError: see `Ledger`.
            OSError, ValueError: a file cannot be used, or does not fit the ledger.
        """
        job = self.job
        if job.plot is not None:
            check_plot(job.plot)
        if job.test_mode:
            self.tell("TEST MODE: THE NOISE IS KNOWN TO ANYONE. THIS PROTECTS NOBODY.")
        # A law of noise beyond what can be drawn is found here, before the ledger is touched.
        trial = job.mechanism()
        trial.update([0] * job.question.width)
        with ExitStack() as stack:
            file = sys.stdin.buffer
            if job.source is not None:
                file = stack.enter_context(open(job.source, "rb"))
            format = job.format or format_of(job.source)
            records = Records(file, format, job.question.columns, follow=job.follow)
            blocks = iter(records)
            first = next(blocks, [])  # with a header that fits
            output = Output(job)
            stack.callback(output.close)
            ledger = stack.enter_context(Ledger(job.ledger, total=job.total))
            stream = stack.enter_context(
                ledger.open(
                    job.stream,
                    job.mechanism(),
                    declared=job.declared(),
                    published=max(job.published, output.published()) * job.stride,
                )
            )
            self._warn(ledger, stream)
            again = output.fit(stream)
            if again:
                self.tell(f"{len(again)} releases were on disk and not published: here they are")
                with whole():
                    self._publish(stream, output, again)
            try:
                self._consume(stream, output, records, chain([first], blocks))
            finally:
                self._finish(stream)

    def _warn(self, ledger: Ledger, stream: Stream) -> None:
        """Tell of streams that spend beside this one, when no total keeps them together."""
        own = repr(stream.mechanism.cost)
        others = [
            f"{account.reserved!r} of {account.name!r}"
            for account in ledger.accounts()
            if account.name != stream.name and account.reserved.rho > 0
        ]
        if ledger.total is None and others:
            self.tell(
                f"WARNING: stream {stream.name!r} spends {own} beside {' and '.join(others)}: a "
                f"record in all of them loses the sum. --total keeps {self.job.ledger} within one "
                "budget"
            )

    def _consume(
        self,
        stream: Stream,
        output: Output,
        records: Records,
        blocks: Iterator[list[tuple[int, bytes]]],
    ) -> None:
        job, skip = self.job, self._begin(stream)
        position = self.position
        limit = max(1, _CELLS // (job.every * job.question.width)) * job.every
        for block in blocks:
            for number, line in block:
                if skip.records:
                    self._skip(skip, records, line)
                    continue
                if self._full():
                    self._flush(stream, output)
                    raise HorizonExceeded(
                        f"all {job.horizon} releases are made, after {position.records} records; "
                        f"line {number} is not read"
                    )
                try:
                    row = self._row(records, line)
                except BadRecord as error:
                    if job.on_bad == "stop":
                        self._flush(stream, output)
                        raise BadRecord(f"line {number} {error}; it is not consumed") from None
                    row = self._zeros(number, error)
                self.truth.add(row)
                position.add(line, row)
                if len(position.rows) == limit:
                    self._flush(stream, output)
            self._flush(stream, output)
            if job.follow and self._full():
                return
        if skip.records:
            raise ValueError(
                f"{self.name} ends {skip.records} records before what the ledger has consumed: "
                "is it another file, or only what is new (--continue)?"
            )

    def _begin(self, stream: Stream) -> Position:
        """Return what is to be skipped: records consumed before, and their digest."""
        note = stream.note or {"records": 0, "digest": ""}
        before = Position(note["records"], bytes.fromhex(note["digest"]))
        self.progress(stream.t // self.job.stride, before.records)
        if not self.job.from_start:
            self.position = before
            if before.records:
                self.tell(f"{before.records} records were consumed before; all that comes is new")
                if self.truth.wanted:
                    self.truth.wanted = False
                    self.tell("the truth is not drawn: it needs those records too (--from-start)")
            return Position()
        if before.records:
            self.tell(
                f"the first {before.records} records of {self.name} were consumed before and are "
                "skipped; if it holds only new ones, say --continue"
            )
        return before

    def _skip(self, skip: Position, records: Records, line: bytes) -> None:
        self.position.records += 1
        self.position.digest = digest_after(self.position.digest, line)
        skip.records -= 1
        if self.job.test_mode:
            try:
                self.truth.add(self._row(records, line))
            except BadRecord:
                self.truth.add([0] * self.job.question.width)
        if not skip.records and self.position.digest != skip.digest:
            raise ValueError(
                f"{self.name} does not begin with the records that the ledger has consumed: it was "
                "changed, or is another file, or holds only what is new (--continue)"
            )

    def _full(self) -> bool:
        """Say whether the records so far fill the horizon."""
        horizon, position = self.job.horizon, self.position
        known = position.records + len(position.rows)
        return horizon is not None and known >= horizon * self.job.every

    def _row(self, records: Records, line: bytes) -> list[int]:
        return self.job.question.row(records.parse(line))

    def _zeros(self, number: int, error: BadRecord) -> list[int]:
        self.bad += 1
        if self.bad <= _SHOWN:
            self.tell(f"line {number} {error}; it counts as zeros")
        elif self.bad == _SHOWN + 1:
            self.tell("further bad lines are not named")
        return [0] * self.job.question.width

    def _flush(self, stream: Stream, output: Output) -> None:
        """Release all whole batches that wait: on disk first, then published."""
        job, position = self.job, self.position
        used = len(position.rows) // job.every * job.every
        if not used:
            return
        with whole():
            rows = job.question.rows(position.take(used), job.every)
            note = {"records": position.records, "digest": position.digest.hex()}
            releases = stream.update_many(rows, every=job.stride, note=note)
            self._publish(stream, output, releases)

    def _publish(self, stream: Stream, output: Output, releases: list[Release]) -> None:
        output.write(releases)
        stream.confirm(releases[-1].t)
        self.progress(stream.t // self.job.stride, self.position.records)

    def _finish(self, stream: Stream) -> None:
        job, position = self.job, self.position
        bound = stream.mechanism.error_bound(_BETA)
        of = "" if job.horizon is None else f" of {job.horizon}"
        self.tell(f"{stream.t // job.stride}{of} releases, {stream.mechanism.spent!r} spent")
        near = "behind the leader by at most" if job.question.ask == "select" else "off by at most"
        self.tell(f"with probability {1 - _BETA:.0%} every one is {near} {math.ceil(bound)}")
        if position.rows:
            self.tell(f"{len(position.rows)} records wait for a batch of {job.every}; not consumed")
        if self.bad:
            self.tell(f"{self.bad} bad lines count as zeros")
        if job.plot is not None:
            draw(job, stream.releases(), self.truth.answers, bound)
            self.tell(f"drawn: {job.plot}")

# SPDX-License-Identifier: Apache-2.0
"""A mechanism whose every release is on disk before it is returned; one stream of a ledger.

The order of things, and what a crash does to it, is in `batchery.privacy.ledger`.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from batchery._core.validate import integer, require
from batchery.privacy.forks import process
from batchery.privacy.ledger_file import Entry, LedgerConflict, LedgerError, LedgerFile, Release
from batchery.privacy.mechanism import Mechanism, State
from batchery.privacy.saved_state import state_from_bytes, state_to_bytes


class Stream:
    """A mechanism whose every release is on disk before it is returned; from `Ledger.open`.

    Attributes:
        mechanism: what releases; it is not to be updated but through the stream.
        published: the last step whose release was confirmed to have been shown.

    Examples:
        >>> import tempfile
        >>> from batchery.privacy import Budget, Ledger, TreeCounter
        >>> with tempfile.TemporaryDirectory() as folder, Ledger(f"{folder}/clicks.db") as ledger:
        ...     with ledger.open("clicks", TreeCounter(9, budget=Budget(rho=0.5))) as stream:
        ...         shown = [release.value for release in stream.update_many([1, 1, 1])]
        ...         stream.confirm(2)  # and a crash here would leave the third
        ...         [release.t for release in stream.pending()]
        [3]
    """

    def __init__(
        self, file: LedgerFile, entry: Entry, mechanism: Mechanism, lock: sqlite3.Connection
    ) -> None:
        """Keep what `Ledger.open` has found."""
        self.mechanism = mechanism
        self.published: int = entry.head["published"]
        self._file, self._entry, self._lock = file, entry, lock
        self._next = entry
        self._process = process()
        self._lost = False

    @property
    def name(self) -> str:
        """The name of the stream."""
        return str(self._entry.head["name"])

    @property
    def t(self) -> int:
        """Number of steps that are on disk."""
        return int(self._entry.head["t"])

    @property
    def note(self) -> Any:
        """What the caller said with the last update; None before."""
        return self._entry.head["note"]

    def update(self, row: Any, *, note: Any = None) -> Release:
        """Add one row, and return the release once it is on disk.

        Args:
            row: as for the mechanism.
            note: plain values to keep with it, in place of the last ones.

        Raises:
            HorizonExceeded, ValueError: as the mechanism.
            LedgerConflict: another process has moved the stream on; nothing was drawn.
            OSError: the release could not be written.

        Whatever is raised, the stream is where it was, and what was drawn is forgotten.
        """
        with self._transaction():
            value = self.mechanism.update(row)
            return self._persist([(self.mechanism.t, value)], note)[0]

    def update_many(self, rows: Any, *, every: int = 1, note: Any = None) -> list[Release]:
        """Add rows, [n, …], and return their releases once all are on disk, in one transaction.

        Args:
            rows: as for the mechanism.
            every: keep only releases of steps that it divides; the others are never shown.
            note: as for `update`.

        Raises:
            HorizonExceeded, LedgerError, OSError, ValueError: as `update`; no row counts.
        """
        integer("Stream", "every", every, at_least=1)
        with self._transaction():
            values = enumerate(_plain(self.mechanism.update_many(rows)), self.t + 1)
            return self._persist([(t, value) for t, value in values if t % every == 0], note)

    def commit(self, state: State) -> None:
        """Write a state and its last release; for a mechanism that another object updates.

        That is `OnOneRank(stream.mechanism).update(row, commit=stream.commit)`.
        """
        with self._transaction(already=True):
            self._persist([(self.mechanism.t, self.mechanism.last())], self.note, state)

    @contextmanager
    def _transaction(self, *, already: bool = False) -> Iterator[None]:
        """Hold the file and be sure of the entry, then draw and write; or do neither."""
        if self._lost or self._process != process():
            raise LedgerError(f"stream {self.name!r} must be opened again, by one process")
        if (self.mechanism.t != self.t) != already:
            moved = "not moved on" if already else "moved on by itself"
            raise LedgerError(f"the mechanism of stream {self.name!r} was {moved}")
        self._lost = True
        try:
            with self._file.writing():
                self._require_ours()
                yield
            self._entry = self._next
        except BaseException:
            # Whatever it stopped in: what is not on disk must not be shown, nor built upon.
            self.mechanism.load_state_dict(state_from_bytes(self._entry.state))
            self._lost = False
            raise
        self._lost = False

    def _require_ours(self) -> None:
        if self._file.version(self._entry.id) != self._entry.version:
            raise LedgerConflict(f"stream {self.name!r} was moved on by another process")

    def _persist(
        self, values: Sequence[tuple[int, Any]], note: Any, state: State | None = None
    ) -> list[Release]:
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        releases = [Release(t, _plain(value), time) for t, value in values]
        head = self._entry.head | {
            "t": self.mechanism.t,
            "spent": asdict(self.mechanism.spent),
            "published": self.published,
            "releases": self._entry.head["releases"] + len(releases),
            "note": note,
        }
        data = state_to_bytes(state or self.mechanism.state_dict())
        self._next = Entry(self._entry.id, self._entry.version + 1, head, data)
        self._file.write(self._next)
        self._file.add_releases(self._next.id, releases)
        return releases

    def confirm(self, t: int) -> None:
        """Note that all releases up to step `t` have been shown; written with the next update."""
        integer("Stream", "t", t, at_least=0)
        require(t <= self.t, "Stream", "t", f"must be <= {self.t}, where the stream is", t)
        self.published = max(self.published, int(t))

    def releases(self, after: int = 0) -> list[Release]:
        """Return the releases after a step, from the file, at no cost."""
        return self._file.releases(self._entry.id, int(integer("Stream", "after", after)))

    def pending(self) -> list[Release]:
        """Return the releases that are not confirmed: show them first, after a crash."""
        return self.releases(self.published)

    def close(self) -> None:
        """Write what was confirmed, and let others have the stream.

        Before its first step what was reserved for it is given back.
        """
        head = self._entry.head | {"published": self.published}
        if self.t == 0:
            head["cost"] = head["spent"]
        try:
            if head != self._entry.head:
                with suppress(LedgerError), self._transaction():
                    self._next = replace(self._entry, version=self._entry.version + 1, head=head)
                    self._file.write(self._next)
        finally:
            self._lost = True
            self._lock.close()

    def __enter__(self) -> "Stream":
        """Return the stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the stream."""
        self.close()

    def __repr__(self) -> str:
        """Show the name, the position and the mechanism."""
        return f"Stream({self.name!r}, at={self.t}, {self.mechanism!r})"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value

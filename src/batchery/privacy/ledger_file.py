# SPDX-License-Identifier: Apache-2.0
"""The file under a ledger: one SQLite database, made whole, checked when opened, never made anew.

It knows no mechanisms: a stream is an id, a version, a head of plain values and the bytes of a
state. Every row has a seal over its content, since SQLite's own check sees damage to its structure
and not to values.

The journal is "delete", not "wal", whose second file is easily left behind by a copy, and with it
the last releases. Then "extra" is needed, which is "full" with the folder synced too: a journal
whose deletion is lost in a power cut comes back, and undoes a commit that had been published.

Reference: SQLite, "Atomic Commit in SQLite" and "PRAGMA Statements".
"""

import glob
import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_APPLICATION, _FORMAT = 0x42544C47, 1  # in the head of the file
_PATIENCE = 30.0  # seconds that another process's transaction is waited for
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
CREATE TABLE ledger (total TEXT NOT NULL, streams INTEGER NOT NULL, seal TEXT NOT NULL);
CREATE TABLE streams (
    id INTEGER PRIMARY KEY, version INTEGER NOT NULL, head TEXT NOT NULL, state BLOB NOT NULL,
    seal TEXT NOT NULL);
CREATE TABLE releases (
    stream INTEGER NOT NULL, t INTEGER NOT NULL, value TEXT NOT NULL, time TEXT NOT NULL,
    seal TEXT NOT NULL, PRIMARY KEY (stream, t)) WITHOUT ROWID;
"""


class LedgerError(RuntimeError):
    """A ledger cannot be used as it is; nothing has been released.

    Examples:
        >>> issubclass(CorruptLedger, LedgerError), issubclass(LedgerConflict, LedgerError)
        (True, True)
    """


class CorruptLedger(LedgerError):
    """A ledger is damaged, empty, gone, or no ledger. Its content is left as it is.

    Examples:
        >>> from batchery.privacy import Ledger
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     try:
        ...         Ledger(file.name)
        ...     except CorruptLedger as error:
        ...         str(error).replace(file.name, "clicks.db")
        'clicks.db is empty: a ledger never is'
    """


class LedgerConflict(LedgerError):
    """Another process holds a stream, or has moved it on; nothing has been drawn.

    Examples:
        >>> from batchery.privacy import Budget, Ledger, TreeCounter
        >>> def open_in(ledger):
        ...     return ledger.open("clicks", TreeCounter(9, budget=Budget(rho=0.5)))
        >>> with tempfile.TemporaryDirectory() as folder, Ledger(f"{folder}/clicks.db") as ledger:
        ...     with open_in(ledger):
        ...         try:
        ...             open_in(ledger)
        ...         except LedgerConflict as error:
        ...             str(error).replace(f"{folder}/", "")
        "stream 'clicks' of clicks.db is held by another process, or twice by this one"
    """


@dataclass(frozen=True)
class Release:
    """What a ledger has of one release.

    Attributes:
        t: step of the mechanism.
        value: a number, or nested lists of numbers.
        time: when it was written, UTC, ISO 8601.

    Examples:
        >>> Release(3, 17, "2026-01-01T00:00:00.000+00:00").value
        17
    """

    t: int
    value: Any
    time: str


@dataclass(frozen=True)
class Entry:
    """What a ledger has of one stream.

    Attributes:
        id: of the stream in this file.
        version: how often the entry has been written.
        head: plain values: name, parameters, budget, position; `releases` is their number.
        state: of the mechanism, as bytes.
    """

    id: int
    version: int
    head: dict[str, Any]
    state: bytes


class LedgerFile:
    """An open ledger.

    Args:
        path: of the file; it is made when there is none.
        total: plain values that are kept when the file is made.

    Raises:
        CorruptLedger: the file is damaged, empty, or no ledger; or it is gone and locks are left.
        LedgerError: the file has another format.
    """

    def __init__(self, path: str | Path, total: Any) -> None:
        """Open the file, or make it; see the class."""
        self.path = Path(path)
        if not self.path.exists():
            self._create(total)
        if not self.path.stat().st_size:
            raise CorruptLedger(f"{self.path} is empty: a ledger never is")
        self._check_head()
        with self._named():
            self._database = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            try:
                self._check()
            except BaseException:
                self._database.close()
                raise

    def _create(self, total: Any) -> None:
        """Make the file under another name, whole, so that a crash leaves none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        locks = sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.*.lock"))
        if locks:
            raise CorruptLedger(
                f"{self.path} is gone, but its {locks[0].name} is here: a new ledger would spend "
                "the budget again. Remove that file too if this is meant"
            )
        handle, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)  # of mode 0600, which SQLite gives to journals too
        try:
            with self._named():
                database = sqlite3.connect(temporary, isolation_level=None)
                database.executescript(_SCHEMA)
                text = json.dumps(total)
                database.execute("INSERT INTO ledger VALUES (?, 0, ?)", (text, _seal(text, 0)))
                database.close()
            os.link(temporary, self.path)
        except FileExistsError:
            pass  # another process was first
        finally:
            Path(temporary).unlink()

    def _check_head(self) -> None:
        """Look without a trace, since what is no ledger must stay as it is.

        SQLite does it, for to close a file that this process has locked would unlock it.
        """
        address = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
        with self._named(), closing(sqlite3.connect(address, uri=True)) as database:
            application, version = (
                database.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version")
            )
        if application != _APPLICATION:
            raise CorruptLedger(f"{self.path} is damaged, or no ledger")
        if version != _FORMAT:
            raise LedgerError(f"{self.path} has format {version}, and {_FORMAT} is read here")

    def _check(self) -> None:
        if self.path.stat().st_mode & 0o077:
            self.path.chmod(0o600)
        for pragma in ("journal_mode = DELETE", "synchronous = EXTRA", "fullfsync = ON"):
            self._database.execute(f"PRAGMA {pragma}")
        with self.writing():
            found = self._pragma("integrity_check(1)")
            self._require_whole(found == "ok", found)
            _, count = self._own()
            self._require_whole(len(self.entries()) == count, "a stream is missing")

    def _pragma(self, name: str) -> Any:
        return self._database.execute(f"PRAGMA {name}").fetchone()[0]

    def _require_whole(self, whole: bool, what: object) -> None:
        if not whole:
            raise CorruptLedger(
                f"{self.path} is damaged ({what}). It is left as it is; a new ledger would spend "
                "the budget again"
            )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Give SQLite's errors their meaning and the file's name."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text:
                raise LedgerConflict(f"{self.path} is in use by another process") from error
            if any(word in text for word in ("I/O", "full", "readonly", "unable to open")):
                raise OSError(f"{self.path}: {text}") from error
            raise CorruptLedger(f"{self.path} is damaged, or no ledger ({text})") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise CorruptLedger(f"{self.path} is damaged, or no ledger ({error})") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Run what is inside as one transaction; other processes wait for its end."""
        with self._named():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _own(self) -> tuple[Any, int]:
        """Return the total, and the number of streams."""
        rows = self._database.execute("SELECT total, streams, seal FROM ledger").fetchall()
        self._require_whole(len(rows) == 1, "its total is missing")
        text, count, seal = rows[0]
        self._require_whole(seal == _seal(text, count), "its total")
        return json.loads(text), count

    def _write_own(self, total: Any, count: int) -> None:
        text = json.dumps(total)
        own = (text, count, _seal(text, count))
        self._database.execute("UPDATE ledger SET total = ?, streams = ?, seal = ?", own)

    def total(self) -> Any:
        """Return the plain values that the file was made with, or was given since."""
        return self._own()[0]

    def set_total(self, total: Any) -> None:
        """Write other plain values in their place."""
        self._write_own(total, self._own()[1])

    def entries(self) -> list[Entry]:
        """Return all streams in order of opening, each of them checked."""
        rows = self._database.execute("SELECT id, version, head, state, seal FROM streams")
        found = []
        for number, version, text, state, seal in rows.fetchall():
            whole = seal == _seal(number, version, text, state)
            self._require_whole(whole, f"stream {number}")
            head = json.loads(text)
            query = "SELECT COUNT(*) FROM releases WHERE stream = ?"
            count = self._database.execute(query, (number,)).fetchone()[0]
            self._require_whole(count == head["releases"], f"releases of {head['name']!r}")
            found.append(Entry(number, version, head, state))
        return found

    def version(self, number: int) -> int | None:
        """Return the version of a stream."""
        query = "SELECT version FROM streams WHERE id = ?"
        row = self._database.execute(query, (number,)).fetchone()
        return None if row is None else int(row[0])

    def add(self, head: dict[str, Any], state: bytes) -> Entry:
        """Add a stream and return its entry."""
        insert = "INSERT INTO streams (version, head, state, seal) VALUES (0, '', '', '')"
        entry = Entry(int(self._database.execute(insert).lastrowid or 0), 0, head, state)
        self.write(entry)
        total, count = self._own()
        self._write_own(total, count + 1)
        return entry

    def write(self, entry: Entry) -> None:
        """Write the entry of a stream."""
        text = json.dumps(entry.head)
        seal = _seal(entry.id, entry.version, text, entry.state)
        self._database.execute(
            "UPDATE streams SET version = ?, head = ?, state = ?, seal = ? WHERE id = ?",
            (entry.version, text, entry.state, seal, entry.id),
        )

    def add_releases(self, number: int, releases: Sequence[Release]) -> None:
        """Add releases of a stream; one that is there already is an error."""
        rows = []
        for release in releases:
            text = json.dumps(release.value)
            seal = _seal(number, release.t, text, release.time)
            rows.append((number, release.t, text, release.time, seal))
        self._database.executemany("INSERT INTO releases VALUES (?, ?, ?, ?, ?)", rows)

    def releases(self, number: int, after: int) -> list[Release]:
        """Return the releases of a stream after a step, each of them checked."""
        query = "SELECT t, value, time, seal FROM releases WHERE stream = ? AND t > ? ORDER BY t"
        with self._named():
            rows = self._database.execute(query, (number, after)).fetchall()
        for t, text, time, seal in rows:
            self._require_whole(seal == _seal(number, t, text, time), f"release {t}")
        return [Release(t, json.loads(text), time) for t, text, time, _ in rows]

    def lock(self, number: int, name: str) -> sqlite3.Connection:
        """Return a lock on a stream: a transaction on an empty file, which ends with the process.

        Raises:
            LedgerConflict: somebody holds it.
        """
        path = self.path.with_name(f"{self.path.name}.{number}.lock")
        if not path.exists():  # to close a file that this process has locked would unlock it
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        lock = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            lock.close()
            raise LedgerConflict(
                f"stream {name!r} of {self.path} is held by another process, or twice by this one"
            ) from error
        return lock

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _seal(*fields: object) -> str:
    digest = hashlib.sha256()
    for field in fields:
        data = field if isinstance(field, bytes) else str(field).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]

# SPDX-License-Identifier: Apache-2.0
"""Records of a file or a pipe, CSV or JSONL, as many at once as have come.

One line is one record, and an unreadable line is one too: what the next record is must not depend
on what is in this one. So a line break inside quotes is not supported, and an empty line is a bad
record. The first line of CSV is its header.
"""

import csv
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from batchery.privacy.question import BadRecord

Format = Literal["csv", "jsonl"]
_PIECE = 1 << 16  # bytes read at once
_PAUSE = 0.2  # seconds before a file that may grow is looked at again


def format_of(path: Path | None) -> Format:
    """Return the format that a file's name tells; CSV where it tells nothing."""
    suffix = "" if path is None else path.suffix.lower()
    return "jsonl" if suffix in (".jsonl", ".ndjson", ".json") else "csv"


def lines(file: BinaryIO, *, follow: bool = False) -> Iterator[list[bytes]]:
    """Yield the whole lines that are there, again and again, until the end of the file.

    Args:
        file: open for reading; a buffered one.
        follow: wait at its end for more. A last line without a line break is then not whole.

    Raises:
        OSError: a file that is followed has become shorter, or another file has its name.
    """
    rest = b""
    moved = False
    while True:
        piece = file.read1(_PIECE)  # type: ignore[attr-defined]
        if piece:
            *whole, rest = (rest + piece).split(b"\n")
            if whole:
                yield whole
        elif follow:
            if os.fstat(file.fileno()).st_size < file.tell():
                raise OSError(f"{file.name} has become shorter while it was followed")
            if moved:
                raise OSError(
                    f"{file.name} was renamed or replaced while it was followed; the old one is "
                    "read to its end, and the new one holds new records only: --continue"
                )
            moved = not _in_place(file)  # what came before that is still to be read
            if not moved:
                time.sleep(_PAUSE)
        else:
            if rest:
                yield [rest]
            return


def _in_place(file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


class Records:
    r"""The records of a source.

    Args:
        file: open for reading.
        format: `"csv"` or `"jsonl"`.
        columns: those that will be read; a header must have them.
        follow: as for `lines`.

    Examples:
        >>> import io
        >>> records = Records(io.BytesIO(b"city,n\nrome,3\n"), "csv", ["city"])
        >>> [[records.parse(line) for _, line in block] for block in records]
        [[{'city': 'rome'}]]
    """

    def __init__(
        self, file: BinaryIO, format: Format, columns: Sequence[str], *, follow: bool = False
    ) -> None:
        """Read nothing yet; see the class."""
        self.file = file
        self.format = format
        self.columns = list(columns)
        self.follow = follow
        self._places: list[int] = []
        self._cells = 0

    def __iter__(self) -> Iterator[list[tuple[int, bytes]]]:
        """Yield numbered lines as they come; the first block may be empty, and the header read.

        Raises:
            ValueError: there is no header, or it lacks a column.
        """
        number = 0
        for whole in lines(self.file, follow=self.follow):
            block = [(number + i, line.rstrip(b"\r")) for i, line in enumerate(whole, 1)]
            if self.format == "csv" and number == 0:
                self._read_header(block.pop(0)[1])
            number += len(whole)
            yield block
        if self.format == "csv" and number == 0:
            raise ValueError("the CSV has no header")

    def _read_header(self, line: bytes) -> None:
        try:
            header = [name.strip() for name in _cells(line.removeprefix(b"\xef\xbb\xbf"))]
        except BadRecord as error:
            raise ValueError(f"the header {error}") from None
        for column in self.columns:
            if header.count(column) != 1:
                # Without a header this is the first record: its cells must not be shown.
                found = "two columns" if column in header else "no column"
                raise ValueError(f"the header has {found} {column!r}, of {len(header)} in all")
        self._places = [header.index(column) for column in self.columns]
        self._cells = len(header)

    def parse(self, line: bytes) -> dict[str, Any]:
        """Return the record of a line, by column.

        Raises:
            BadRecord: it is none.
        """
        if not line.strip():
            raise BadRecord("is empty")
        if self.format == "jsonl":
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                raise BadRecord("is no JSON") from None
            if not isinstance(found, dict):
                raise BadRecord("is no JSON object")
            return found
        cells = _cells(line)
        if len(cells) != self._cells:
            raise BadRecord(f"has {len(cells)} cells, the header {self._cells}")
        return {column: cells[i] for column, i in zip(self.columns, self._places, strict=True)}


def _cells(line: bytes) -> list[str]:
    try:
        return next(csv.reader([line.decode()], strict=True))
    except UnicodeDecodeError:
        raise BadRecord("is not UTF-8") from None
    except (csv.Error, StopIteration):
        raise BadRecord("is no CSV") from None


@dataclass
class Position:
    """How far a stream has been read, and what is still waiting for a whole batch.

    Attributes:
        records: number consumed.
        digest: of all of them, in their order.
        rows: of records that wait.
        digests: after each of those.
    """

    records: int = 0
    digest: bytes = b""
    rows: list[list[int]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def add(self, line: bytes, row: list[int]) -> None:
        """Let a record wait."""
        last = self.digests[-1] if self.digests else self.digest
        self.rows.append(row)
        self.digests.append(digest_after(last, line))

    def take(self, n: int) -> list[list[int]]:
        """Consume the first `n` of those that wait."""
        taken, self.rows = self.rows[:n], self.rows[n:]
        self.records, self.digest = self.records + n, self.digests[n - 1]
        self.digests = self.digests[n:]
        return taken


def digest_after(digest: bytes, line: bytes) -> bytes:
    """Return the digest of records and one more."""
    return hashlib.sha256(digest + line).digest()

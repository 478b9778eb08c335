# SPDX-License-Identifier: Apache-2.0
"""The file of a ledger: its mode, damage, and what is no ledger."""

import json
import os
import shutil
import sqlite3
import stat
from dataclasses import replace

import numpy as np
import pytest
from ledger_streams import bits, seeded

from batchery.privacy import (
    Budget,
    CorruptLedger,
    Ledger,
    LedgerError,
)

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")


def test_the_file_is_for_its_owner_and_safe_at_every_commit(path):
    mask = os.umask(0)
    try:
        with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:
            stream.update(1)
            with ledger.file.writing():
                ledger.file.write(replace(stream._entry, version=9))
                journal = path.with_name("streams.db-journal")
                assert stat.S_IMODE(journal.stat().st_mode) == 0o600
            assert ledger.file._pragma("journal_mode") == "delete"
            assert ledger.file._pragma("synchronous") == 3  # "extra"
        for found in path.parent.iterdir():
            assert stat.S_IMODE(found.stat().st_mode) == 0o600
    finally:
        os.umask(mask)
    assert sorted(found.name for found in path.parent.iterdir()) == [
        "streams.db",
        "streams.db.1.lock",
    ]
    path.chmod(0o644)  # as a copy may be
    Ledger(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_ledger_is_made_where_one_was(path):
    with Ledger(path) as ledger:
        ledger.open("x", seeded())
    path.unlink()
    with pytest.raises(CorruptLedger, match=r"streams\.db is gone, but its streams\.db\.1\.lock"):
        Ledger(path)
    assert not path.exists()


def refused_and_left(path, error, message):
    """A file is no ledger, and neither it nor what is beside it changes."""
    path.chmod(0o644)

    def there():
        return {
            found.name: (found.read_bytes(), stat.S_IMODE(found.stat().st_mode))
            for found in path.parent.iterdir()
        }

    before = there()
    with pytest.raises(error, match=message):
        Ledger(path)
    assert there() == before


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"not a database" * 100])
def test_what_is_no_ledger_is_named_and_left(content, path):
    path.write_bytes(content)
    refused_and_left(path, CorruptLedger, r"streams\.db is (empty|damaged, or no ledger)")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_other_databases_and_formats_are_named_and_left(mode, path):
    other = sqlite3.connect(path)
    other.execute(f"PRAGMA journal_mode = {mode}")
    other.execute("CREATE TABLE streams (name TEXT)")
    refused_and_left(path, CorruptLedger, "no ledger")  # while its owner has it open
    other.close()
    refused_and_left(path, CorruptLedger, "no ledger")
    assert path.read_bytes()[18] == {"delete": 1, "wal": 2}[mode]
    path.unlink()
    Ledger(path).close()
    later = sqlite3.connect(path)
    later.execute(f"PRAGMA journal_mode = {mode}")
    later.execute("PRAGMA user_version = 2")
    later.close()
    refused_and_left(path, LedgerError, "has format 2, and 1 is read here")


def test_damage_anywhere_is_found_or_harmless(path, tmp_path):
    with Ledger(path, total=Budget(rho=1.0)) as ledger:
        with ledger.open("clicks", seeded(20, 3)) as stream:
            stream.update_many(bits(15, 3), note={"records": 15})
            entries, releases = ledger.file.entries(), stream.releases()
    whole = path.read_bytes()
    broken = tmp_path / "broken.db"
    found = 0
    rng = np.random.default_rng(0)
    used = [at for at, byte in enumerate(whole) if byte]  # most of a page is empty
    for at in [*range(100), *rng.choice(used, 400, replace=False)]:
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        broken.write_bytes(data)
        try:
            with Ledger(broken) as ledger:
                assert ledger.total == Budget(rho=1.0)
                assert ledger.file.entries() == entries
                assert ledger.file.releases(1, 0) == releases
        except LedgerError:
            found += 1
        assert broken.read_bytes() == bytes(data)
        broken.with_name("broken.db-journal").unlink(missing_ok=True)
    assert found > 300
    for length in range(4096, len(whole), 4096):
        broken.write_bytes(whole[:length])
        with pytest.raises(CorruptLedger, match=r"broken\.db is damaged"):
            Ledger(broken)


def test_rows_that_vanish_are_missed(path):
    with Ledger(path) as ledger, ledger.open("x", seeded()) as stream:
        stream.update_many([1, 0, 1])
    for statement, what in (
        ("DELETE FROM releases WHERE t = 2", "releases of 'x'"),
        ("UPDATE releases SET value = 999 WHERE t = 2", "release 2"),
        ("UPDATE streams SET version = 1", "stream 1"),
        ("DELETE FROM streams", "a stream is missing"),
        ("DELETE FROM ledger", "its total is missing"),
        ("UPDATE ledger SET total = 'null '", "its total"),
    ):
        copy = path.with_name("copy.db")
        shutil.copyfile(path, copy)
        with sqlite3.connect(copy) as database:
            database.execute(statement)
        with (
            pytest.raises(CorruptLedger, match=f"copy.db is damaged .{what}"),
            Ledger(copy) as found,
        ):
            found.file.releases(1, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("", seeded()), ValueError, "Ledger: name must not be empty"),
        ((3, seeded()), TypeError, "Ledger: name must be a string, got int"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message, path):
    with Ledger(path) as ledger, pytest.raises(error, match=message):
        ledger.open(*arguments)


def test_a_used_mechanism_and_a_shadowed_setting_are_refused(path):
    used = seeded()
    used.update(1)
    with Ledger(path) as ledger:
        with pytest.raises(ValueError, match="Ledger: mechanism must be new"):
            ledger.open("x", used)
        with pytest.raises(ValueError, match=r"declared must not name .* got \['horizon'\]"):
            ledger.open("x", seeded(), declared={"horizon": 3})
        assert ledger.accounts() == []
        assert repr(ledger).startswith("Ledger('")
        with ledger.open("x", seeded()) as stream:
            assert repr(stream).startswith("Stream('x', at=0, TreeCounter(20")
            assert json.dumps(stream._entry.head)  # plain values alone

"""SQLite on the mount: four processes write at once, with each kind of journal; every committed row is there and right."""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from running import ProgramMount, results, worker

pytestmark = pytest.mark.mount

WRITERS, TRANSACTIONS = 4, 25


def check(database: Path, rows: int) -> None:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = connection.execute("SELECT value, digest FROM item").fetchall()
        assert len(found) == rows
        assert all(hashlib.sha256(value).hexdigest() == digest for value, digest in found)


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_concurrent_writers_lose_nothing(program_mount: ProgramMount, journal: str) -> None:
    database = program_mount.mountpoint / "items.db"
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
        columns = "writer, number, row, value, digest, PRIMARY KEY (writer, number, row)"
        connection.execute(f"CREATE TABLE item ({columns})")
    writers = [worker("sqlite_writer", database, number, TRANSACTIONS) for number in range(WRITERS)]
    rows = sum(int(output) for output in results(writers))
    assert rows > 100
    check(database, rows)
    program_mount.unmount()
    check(program_mount.source / "items.db", rows)

"""A writer that commits transactions to an SQLite database on the mount, and the check that all of them are in it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from contents import stamp
from record import DONE, FAILED, INTENT, WRONG, Entry
from writers import StopFlag, Writer

ROWS, ROWS_A_TRANSACTION, ROW_BYTES_MAX = 151, 4, 6000
CHECKPOINT_PAGES = 60  # often, so that kills fall into checkpoints too
# What SQLite says of a mount that is gone; the last because it cannot see the file under its name any more.
DEAD_WORDS = ("disk I/O error", "unable to open database file", "attempt to write a readonly database")
Row = tuple[int, bytes]


def rows_of(writer: int, transaction: int) -> Iterator[tuple[int, bytes]]:
    """What a transaction puts into the table: {key: value}, a few rows of different lengths."""
    for i in range(ROWS_A_TRANSACTION):
        length = (transaction * 2654435761 + i * 40503) % ROW_BYTES_MAX
        yield (transaction * 31 + i * 7) % ROWS, stamp(writer, i, transaction, 0, length)


class SqliteWriter(Writer):
    """Writes to one database, with one kind of journal and one setting of `synchronous`."""

    def __init__(self, number: int, record_directory: Path, journal: str, synchronous: str) -> None:
        super().__init__(f"sqlite-{journal}-{synchronous}", record_directory)
        self.number, self.journal, self.synchronous = number, journal, synchronous
        self.committed = 0
        self.pending = False
        self.expected: dict[int, Row] = {}  # key -> transaction and value

    def prepare(self, directory: Path) -> None:
        (directory / self.name).mkdir()
        with closing(sqlite3.connect(directory / self.name / "db")) as connection:
            assert connection.execute(f"PRAGMA journal_mode={self.journal}").fetchone() == (self.journal,)
            connection.execute("CREATE TABLE item (key INTEGER PRIMARY KEY, txn INTEGER, value BLOB)")
            connection.execute("CREATE TABLE counter (txn INTEGER)")
            connection.execute("INSERT INTO counter VALUES (0)")
            connection.commit()

    # --- the child -----------------------------------------------------------------------------------------------------

    def work(self, mountpoint: Path, seed: int, stop: StopFlag) -> None:
        try:
            with closing(self._connect(mountpoint / self.name)) as connection:
                transaction = self.committed
                while not stop():
                    transaction += 1
                    self._commit(connection, transaction)
        except sqlite3.Error as error:
            self.record.append(FAILED, str(error))

    def _connect(self, directory: Path) -> sqlite3.Connection:
        # mode=rw: never a new database, least of all beside the mount.
        connection = sqlite3.connect(f"file:{directory}/db?mode=rw", uri=True, isolation_level=None, timeout=30)
        connection.execute(f"PRAGMA synchronous={self.synchronous}")
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        return connection

    def _commit(self, connection: sqlite3.Connection, transaction: int) -> None:
        connection.execute("BEGIN IMMEDIATE")
        rows = [(key, transaction, value) for key, value in rows_of(self.number, transaction)]
        connection.executemany("INSERT OR REPLACE INTO item VALUES (?, ?, ?)", rows)
        connection.execute("UPDATE counter SET txn = ?", (transaction,))
        self.record.append(INTENT, transaction)
        connection.execute("COMMIT")
        self.record.append(DONE, transaction)

    # --- the check -----------------------------------------------------------------------------------------------------

    def join(self) -> list[str]:
        complaints = super().join()
        for what, _, detail in self.record.news():
            if what == INTENT:
                self.pending = True
            elif what == DONE:
                self._happened(detail)
                self.acknowledged += 1
            elif what == WRONG or detail not in DEAD_WORDS:
                complaints.append(f"{self.name}: {detail}")
        return complaints

    def _happened(self, transaction: int) -> None:
        self.committed, self.pending = transaction, False
        for key, value in rows_of(self.number, transaction):
            self.expected[key] = (transaction, value)

    def victims(self) -> set[str]:
        return {f"{self.name}/db{suffix}" for suffix in ("-journal", "-wal", "-shm")}

    def check(self, root: Path, mounted: bool) -> list[str]:
        if mounted:
            return self._check(root / self.name)
        with tempfile.TemporaryDirectory() as copy:  # opening it would change it
            shutil.copytree(root / self.name, copy, dirs_exist_ok=True)
            return self._check(Path(copy))

    def _check(self, directory: Path) -> list[str]:
        try:
            with closing(self._connect(directory)) as connection:
                return self._look(connection)
        except sqlite3.Error as error:
            return [f"{self.name}: {error}"]

    def check_after_cut(self, root: Path, moment_ns: int, entries: Iterable[Entry]) -> list[str]:
        """Complaints about the database as a power cut at that moment left it: with FULL, all that was committed is in it."""
        before = [entry for entry in entries if entry.time_ns < moment_ns]
        self.committed = max((entry.detail for entry in before if entry.what == DONE), default=0)
        asked = max((entry.detail for entry in before if entry.what == INTENT), default=0)
        try:
            with closing(self._connect(root / self.name)) as connection:
                (counter,) = connection.execute("SELECT txn FROM counter").fetchone()
                if not (self.committed if self.synchronous == "FULL" else 0) <= counter <= asked:
                    return [f"{self.name}: the last transaction is {counter}, not between {self.committed} and {asked}"]
                self.expected.clear()
                self.committed = 0
                for transaction in range(1, counter + 1):
                    self._happened(transaction)
                return self._look(connection)
        except sqlite3.Error as error:
            return [f"{self.name}: {error}"]

    def _look(self, connection: sqlite3.Connection) -> list[str]:
        verdict = connection.execute("PRAGMA integrity_check").fetchall()
        if verdict != [("ok",)]:
            return [f"{self.name}: integrity_check says {verdict}"]
        ((counter,),) = connection.execute("SELECT txn FROM counter").fetchall()
        if counter == self.committed + 1 and self.pending:
            self._happened(counter)
        self.pending = False
        if counter != self.committed:
            return [f"{self.name}: the last transaction is {counter}, but {self.committed} was committed"]
        found = {key: (txn, value) for key, txn, value in connection.execute("SELECT * FROM item")}
        wrong = [key for key in found.keys() | self.expected.keys() if found.get(key) != self.expected.get(key)]
        return [f"{self.name}: rows {sorted(wrong)} are not those of the last transactions"] if wrong else []

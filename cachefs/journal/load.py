"""Reading a journal that another process left, whatever state it is in.

LMDB trusts its file: a damaged one may end the process that reads it. So a child reads it first and tells what it found;
where the child fails, the raw file is searched for records (`records_in`). Which of those still counted cannot be told
then: the caller has to treat them as it treats those of before a power cut.
"""

import contextlib
import faulthandler
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field

import lmdb

from cachefs.journal.index import VERSION
from cachefs.journal.records import BadRecord, FileRecord, PagesRecord, records_in, unpack_file, unpack_pages
from cachefs.journal.rows import rows_in

READ_BYTES = 1 << 20


@dataclass(slots=True)
class Found:
    """What an index says. `doubtful`: it is damaged, and these are what could be found in it."""

    meta: dict[bytes, bytes] = field(default_factory=dict)
    files: dict[int, FileRecord] = field(default_factory=dict)
    pages: dict[int, list[PagesRecord]] = field(default_factory=dict)  # {file: ...}
    doubtful: bool = False
    problems: list[str] = field(default_factory=list)  # for people

    @property
    def version(self) -> int:
        try:
            return int(self.meta.get(b"version", str(VERSION).encode()))
        except ValueError:
            return VERSION

    def followed(self) -> "Found":
        """The same, the files with the sizes and times of their latest records."""
        for number, record in self.files.items():
            record.follow(self.pages.get(number, []))
        return self

    def add(self, record: FileRecord | PagesRecord) -> None:
        if isinstance(record, PagesRecord):
            self.pages.setdefault(record.file, []).append(record)
        elif record.file not in self.files or self.files[record.file].seq < record.seq:
            self.files[record.file] = record


def load(path: str, rows: str | None = None) -> Found | None:
    """What the index at `path` says, and the table of rows beside it; None where there is none.

    To be called before there are threads: it forks.
    """
    found = _load(path)
    if found is not None and rows is not None:
        for row in rows_in(rows):
            found.add(row)
    return found.followed() if found is not None else None


def _load(path: str) -> Found | None:
    try:
        if not os.stat(path).st_size:
            return None
    except FileNotFoundError:
        return None
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        _tell(path, writing)  # never returns
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if not status:
        found = pickle.loads(told)
        assert isinstance(found, Found)
        return found
    return salvage(path, f"reading {path} ended with status {os.waitstatus_to_exitcode(status)}")


def _tell(path: str, writing: int) -> None:
    """The child: reads, tells, ends."""
    faulthandler.disable()  # if this process crashes, that is an answer
    status = 1
    with contextlib.suppress(BaseException):
        with open(writing, "wb") as pipe:
            env = lmdb.open(path, subdir=False, lock=False, readonly=True, max_dbs=3)
            pickle.dump(read(env), pipe)
        status = 0
    os._exit(status)


def read(env: lmdb.Environment) -> Found:
    """What a whole index says; raises lmdb.Error, or worse, where it is damaged."""
    found = Found()
    with env.begin() as transaction:
        for name, take in ((b"meta", None), (b"files", unpack_file), (b"pages", unpack_pages)):
            try:
                table = env.open_db(name, txn=transaction, create=False)
            except lmdb.NotFoundError:  # the first transaction never ended: nothing was acknowledged
                continue
            for key, value in transaction.cursor(table):
                if take is None:
                    found.meta[key] = value
                else:
                    _take(found, take, value)
    return found


def _take(found: Found, unpack: object, value: bytes) -> None:
    try:
        found.add(unpack(value))  # type: ignore[operator]
    except BadRecord as error:
        found.doubtful = True
        found.problems.append(str(error))


def salvage(path: str, reason: str) -> Found:
    """Whatever whole records the raw bytes of a damaged index hold."""
    found = Found(doubtful=True, problems=[reason])
    with open(path, "rb") as file:
        found_records: Iterable[FileRecord | PagesRecord] = records_in(file.read())
    seen: set[int] = set()
    for record in found_records:
        if isinstance(record, FileRecord):
            found.add(record)
        elif record.seq not in seen:  # LMDB keeps copies
            seen.add(record.seq)
            found.add(record)
    return found

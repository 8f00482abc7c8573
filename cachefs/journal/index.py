"""The journal's index: an LMDB file that says which files there are, and with `durable` which of their pages.

Opened with a writable map and without sync a transaction costs a microsecond, and what it committed is in the kernel's
pages when it returns: it survives this process, whatever ends it. It does not survive a power cut (the kernel writes
these pages in any order); the index in which fsync keeps its records is opened with `durable` and does.
"""

import errno
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lmdb

from cachefs.journal.slots import JournalFull

VERSION = 1
AHEAD_BYTES = 4 << 20  # room on the disk that is reserved beyond what is in use
ROWS_AHEAD = 32  # changed rows that surely find room in that: 128 KiB each, copies and the longest paths included
ROOM_FOR_SLOT_BYTES = 400  # of the index for each slot: a record, its share of the tree, and copies that LMDB makes
SMALLEST_MAP_BYTES = 16 << 20

Table = Any  # lmdb's handle of a table
Key = tuple[Table, bytes]
Row = tuple[Table, bytes, bytes]  # table, key, value


class Index:
    """Three tables: `meta`, `files` by id, and `pages` by sequence number, which only the durable one uses.

    Raises OSError, and JournalFull where it is full.
    """

    def __init__(self, path: str, slots: int, durable: bool = False) -> None:
        map_bytes = max(SMALLEST_MAP_BYTES, slots * ROOM_FOR_SLOT_BYTES)
        self.path = path
        with _as_os_errors(path):
            self.env = lmdb.open(
                path, map_size=map_bytes, subdir=False, lock=False, max_dbs=3, mode=0o600,
                writemap=not durable, sync=durable, metasync=durable,
            )  # fmt: skip
            self._reserved_bytes = self._unlooked = 0
            self._fd = -1 if durable else os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._map_bytes = map_bytes
            self._reserve()
            self.meta = self.env.open_db(b"meta")
            self.files = self.env.open_db(b"files")
            self.pages = self.env.open_db(b"pages")

    def keys_but(self, files: Container[int]) -> list[Key]:
        """The keys of all files but these."""
        with self.env.begin() as transaction:
            keys = [bytes(key) for key in transaction.cursor(self.files).iternext(values=False)]
        return [(self.files, key) for key in keys if int.from_bytes(key, "big") not in files]

    def commit(self, puts: Sequence[Row] = (), deletes: Sequence[Key] = ()) -> None:
        """One transaction: all of it, or nothing."""
        self._unlooked += len(puts) + len(deletes)
        if self._unlooked > ROWS_AHEAD:
            self._reserve()
        try:
            with self.env.begin(write=True) as transaction:
                for table, key, value in puts:
                    transaction.put(key, value, db=table)
                for table, key in deletes:
                    transaction.delete(key, db=table)
        except lmdb.Error as error:
            raise _as_ours(error) from None

    def _reserve(self) -> None:
        """Has the disk set room aside: a store into a mapped page that the disk cannot hold would kill the process."""
        if self._fd < 0:
            return  # written with calls that report a full disk
        self._unlooked = 0
        in_use_bytes = (self.env.info()["last_pgno"] + 1) * 4096
        wanted_bytes = min(in_use_bytes + 2 * AHEAD_BYTES, self._map_bytes)
        if in_use_bytes + AHEAD_BYTES > self._reserved_bytes and self._reserved_bytes < wanted_bytes:
            os.posix_fallocate(self._fd, 0, wanted_bytes)
            self._reserved_bytes = wanted_bytes

    def close(self) -> None:
        self.env.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _as_ours(error: lmdb.Error) -> Exception:
    if isinstance(error, lmdb.MapFullError):
        return JournalFull()
    return OSError(errno.EIO, f"the journal's index: {error}")


@contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except lmdb.Error as error:
        raise OSError(errno.EIO, f"{path}: {error}") from None

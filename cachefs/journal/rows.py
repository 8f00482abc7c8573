"""The journal's table of rows: one for each slot of the data file, saying which page of which file begins there.

A plain file in a shared mapping. A row is written with one store into memory, and the kernel keeps what was stored: it
survives this process as it stood at its last instruction, in order. A row that was being written when the process ended
fails its checksum; that write had not returned.
"""

import mmap
import os
from collections.abc import Iterator
from dataclasses import replace

from cachefs.journal.records import (
    PAGES_BYTES,
    PAGES_LIVE,
    PAGES_MARK,
    PAGES_SEQ,
    PAGES_SEQ_AT,
    BadRecord,
    PagesRecord,
    unpack_pages,
)

ROW_BYTES = 128
NOTHING = bytes(len(PAGES_MARK))


class Rows:
    """Rows of `slots` slots; `map` has their bytes. Nothing may be stored where `reserve` has not been."""

    def __init__(self, path: str, slots: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        nbytes = max(slots, 1) * ROW_BYTES
        if os.fstat(self.fd).st_size < nbytes:
            os.ftruncate(self.fd, nbytes)
        self.map = mmap.mmap(self.fd, nbytes)

    def reserve(self, slots: int) -> None:
        """Has the disk set room aside: a store into a mapped page that the disk cannot hold would kill the process."""
        os.posix_fallocate(self.fd, 0, slots * ROW_BYTES)

    def set(self, slot: int, row: bytes) -> None:
        """Writes the row of a slot."""
        at = slot * ROW_BYTES
        self.map[at : at + PAGES_BYTES] = row

    def get(self, slot: int) -> PagesRecord:
        """The row of a slot; BadRecord where there is none."""
        at = slot * ROW_BYTES
        return unpack_pages(self.map[at : at + PAGES_BYTES])

    def has(self, row: PagesRecord) -> bool:
        """Whether this row is there, whatever it says of what counts."""
        try:
            return replace(self.get(row.slot), live=row.live) == row
        except BadRecord:
            return False

    def seq(self, slot: int) -> int:
        """The number of the row of a slot that has one."""
        return PAGES_SEQ.unpack_from(self.map, slot * ROW_BYTES + PAGES_SEQ_AT)[0]  # type: ignore[no-any-return]

    def set_live(self, slot: int, live: int) -> None:
        """Says of a row which of its pages count, fewer than before."""
        at = slot * ROW_BYTES + PAGES_LIVE
        self.map[at : at + 32] = live.to_bytes(32, "little")

    def clear(self, slot: int) -> None:
        """The row means nothing any more."""
        at = slot * ROW_BYTES
        self.map[at : at + len(NOTHING)] = NOTHING

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


def rows_in(path: str) -> Iterator[PagesRecord]:
    """Every whole row in the file at `path`."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return
    at = data.find(PAGES_MARK)
    while at >= 0:
        if not at % ROW_BYTES:
            try:
                row = unpack_pages(data[at : at + PAGES_BYTES])
                if row.slot == at // ROW_BYTES:
                    yield row
            except BadRecord:
                pass
        at = data.find(PAGES_MARK, at + 1)

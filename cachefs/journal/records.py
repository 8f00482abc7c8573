"""What the journal writes down: records of files and of pages, as bytes that say themselves whether they are whole.

Each record begins with a mark and ends with a checksum, so that it is recognised wherever it lies: a damaged index can be
searched for records without being understood. Numbers are little-endian, paths are bytes relative to SOURCE.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

from cachefs.cache.page import FIRST, GROUP_PAGES, IN_GROUP

FILE_MARK, PAGES_MARK = b"cfF1", b"cfP1"
_PAGES = struct.Struct("<4sIQQQQQQq")
PAGES_SEQ, PAGES_SEQ_AT = struct.Struct("<Q"), 8  # where its number lies
_FILE = struct.Struct("<4sQQQQQqqQqBBBH")
_CHECKSUM = struct.Struct("<Q")
_LENGTH = struct.Struct("<H")
PAGES_LIVE = _PAGES.size + _CHECKSUM.size  # where the mask of pages that count lies: it changes, so it has no checksum
PAGES_BYTES = PAGES_LIVE + 32
PATHS_MAX = 8  # of the names of a file with many hard links

checksum = xxhash.xxh3_64_intdigest  # 30 us a MiB, where zlib.crc32 takes 250


class BadRecord(ValueError):
    """These bytes are no whole record."""


@dataclass(frozen=True, slots=True)
class PagesRecord:
    """Pages [page, page + count) of a file, whose bytes lie in slots from `slot` on."""

    seq: int  # grows with everything written down: of two records for a page the later one counts
    file: int
    page: int
    slot: int
    count: int
    checksum: int  # of the bytes in the slots
    size: int  # of the file when they were written, as programs see it
    mtime_ns: int
    live: int  # bit i: page + i counts; the others have been written back since, or cut off

    @property
    def pages(self) -> list[int]:
        """The pages that count."""
        return [self.page + i for i in range(self.count) if self.live >> i & 1]

    def pack(self) -> bytes:
        live = self.live.to_bytes(32, "little")
        return pack_pages(
            self.seq, self.file, self.page, self.slot, self.count, self.checksum, self.size, self.mtime_ns, live
        )


@dataclass(slots=True)
class FileRecord:
    """What is known of a file with pages in the journal: which one it is, where it was, and how it looks to programs.

    Size and mtime are those of the latest record: each `PagesRecord` has them too, so that a write needs but one record.
    """

    file: int
    seq: int
    device: int
    number: int  # st_ino
    size: int  # as programs see it
    mtime_ns: int
    signature: tuple[int, int, int]  # of the backing's file when we last looked: mtime, size, ctime
    writing: bool  # writeback of it is under way, so the backing's file may have any signature by now
    cutting: bool  # a truncate to `size`, or a change of times, is under way: the backing's file may have any size and time
    handle: bytes  # name for open_by_handle_at, empty where the backing gives none
    paths: tuple[bytes, ...]

    def follow(self, pages: Iterable["PagesRecord"]) -> None:
        """Takes size and mtime from the latest record, if that is one of `pages`."""
        latest = max(pages, key=lambda found: found.seq, default=None)
        if latest is not None and latest.seq > self.seq:
            self.seq, self.size, self.mtime_ns = latest.seq, latest.size, latest.mtime_ns

    def pack(self) -> bytes:
        return pack_file(self, self.tail())

    def tail(self) -> bytes:
        """The part that changes seldom."""
        parts = [self.handle]
        for path in self.paths[:PATHS_MAX]:
            parts += (_LENGTH.pack(len(path)), path)
        return b"".join(parts)


def pack_pages(
    seq: int, file: int, page: int, slot: int, count: int, data_checksum: int, size: int, mtime_ns: int, live: bytes
) -> bytes:
    """A `PagesRecord` as bytes."""
    head = _PAGES.pack(PAGES_MARK, count, seq, file, page, slot, data_checksum, size, mtime_ns)
    return head + _CHECKSUM.pack(checksum(head)) + live


def unpack_pages(data: bytes) -> PagesRecord:
    """The record at the start of `data`; BadRecord where none is."""
    if len(data) < PAGES_BYTES or data[:4] != PAGES_MARK:
        raise BadRecord("no record of pages")
    if checksum(data[: _PAGES.size]) != _CHECKSUM.unpack_from(data, _PAGES.size)[0]:
        raise BadRecord("a damaged record of pages")
    _, count, seq, file, page, slot, data_checksum, size, mtime_ns = _PAGES.unpack_from(data)
    if not 0 < count <= GROUP_PAGES - (page & IN_GROUP):
        raise BadRecord("a record of pages in more than one group")
    live = int.from_bytes(data[PAGES_LIVE:PAGES_BYTES], "little") & FIRST[count]  # it has no checksum
    return PagesRecord(seq, file, page, slot, count, data_checksum, size, mtime_ns, live)


def pack_file(record: FileRecord, tail: bytes) -> bytes:
    """A `FileRecord` as bytes, with its `tail()` made before."""
    mtime_ns, size, ctime_ns = record.signature
    head = _FILE.pack(
        FILE_MARK, record.file, record.seq, record.device, record.number, record.size, record.mtime_ns,
        mtime_ns, size, ctime_ns, record.writing, record.cutting, min(len(record.paths), PATHS_MAX), len(record.handle),
    )  # fmt: skip
    body = head + tail
    return body + _CHECKSUM.pack(checksum(body))


def unpack_file(data: bytes) -> FileRecord:
    """The record at the start of `data`; BadRecord where none is."""
    if len(data) < _FILE.size or data[:4] != FILE_MARK:
        raise BadRecord("no record of a file")
    _, file, seq, device, number, size, mtime_ns, *signature, writing, cutting, count, handle_bytes = _FILE.unpack_from(data)
    paths, at = [], _FILE.size + handle_bytes
    try:
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            paths.append(bytes(data[at + 2 : at + 2 + length]))
            at += 2 + length
        (found,) = _CHECKSUM.unpack_from(data, at)
    except struct.error:
        raise BadRecord("a cut off record of a file") from None
    if checksum(data[:at]) != found:
        raise BadRecord("a damaged record of a file")
    handle = bytes(data[_FILE.size : _FILE.size + handle_bytes])
    a, b, c = signature
    return FileRecord(file, seq, device, number, size, mtime_ns, (a, b, c), bool(writing), bool(cutting), handle, tuple(paths))


def records_in(data: bytes) -> Iterator[FileRecord | PagesRecord]:
    """Every whole record anywhere in `data`, however it got there."""
    for mark, unpack, longest in ((FILE_MARK, unpack_file, 1 << 16), (PAGES_MARK, unpack_pages, PAGES_BYTES)):
        at = data.find(mark)
        while at >= 0:
            try:
                yield unpack(data[at : at + longest])
            except BadRecord:
                pass
            at = data.find(mark, at + 1)



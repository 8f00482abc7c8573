"""Where pages go that have no file any more: `STATE/recovered/`, each file's in a directory of its own with a note."""

import json
import os
from collections.abc import Sequence

from cachefs.cache.page import PAGE_SHIFT
from cachefs.journal.records import FileRecord, PagesRecord

NOTE_FILE, DATA_FILE = "note.json", "data"


def set_aside(directory: str, slots_fd: int, record: FileRecord, pages: Sequence[PagesRecord], reason: str) -> str:
    """Copies the pages out of the slots, each to its offset in a sparse file, durably; returns the directory made for it.

    The same pages go to the same place, so that doing it twice leaves one copy.
    """
    name = os.fsdecode(record.paths[0].rpartition(b"/")[2]) if record.paths else "file"
    place = os.path.join(directory, f"{name[:80]}-{record.number}-{record.seq}")
    os.makedirs(place, mode=0o700, exist_ok=True)
    _write(os.path.join(place, DATA_FILE), lambda fd: _copy(fd, slots_fd, record, pages))
    note = {
        "path": os.fsdecode(record.paths[0]) if record.paths else None,
        "other_paths": [os.fsdecode(path) for path in record.paths[1:]],
        "inode": record.number,
        "size": record.size,
        "mtime_ns": record.mtime_ns,
        "reason": reason,
        "extents": [{"offset": at, "length": length} for at, length in extents_of(record, pages)],
    }
    _write(os.path.join(place, NOTE_FILE), lambda fd: os.write(fd, json.dumps(note, indent=1).encode()))
    for path in (place, directory):
        sync_directory(path)
    return place


def extents_of(record: FileRecord, pages: Sequence[PagesRecord]) -> list[tuple[int, int]]:
    """The bytes that the pages have of the file, as (offset, length), ascending."""
    numbers = sorted({page for run in pages for page in run.pages})
    found: list[tuple[int, int]] = []
    for number in numbers:
        offset = number << PAGE_SHIFT
        length = min(1 << PAGE_SHIFT, record.size - offset)
        if length > 0 and found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        elif length > 0:
            found.append((offset, length))
    return found


def _copy(fd: int, slots_fd: int, record: FileRecord, pages: Sequence[PagesRecord]) -> None:
    for run in sorted(pages, key=lambda run: run.seq):  # the later one counts
        for page in run.pages:
            data = os.pread(slots_fd, 1 << PAGE_SHIFT, (run.slot + page - run.page) << PAGE_SHIFT)
            os.pwrite(fd, data, page << PAGE_SHIFT)
    os.ftruncate(fd, record.size)


def _write(path: str, fill: object) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fill(fd)  # type: ignore[operator]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    """Makes durable which files a directory has."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

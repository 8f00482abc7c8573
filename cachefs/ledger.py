"""The ledger: which acknowledged bytes are not yet on the backing, by name, since when and why; and what brings them there.

Names are those by which files were last known, relative to SOURCE. Finding a file here asks nothing of the backing, so it
works while that does not answer, and for files that are gone there.
"""

import errno
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager

import trio

from cachefs.cache.page import GROUP_SHIFT, PAGE_SHIFT, Group, runs
from cachefs.files import Files
from cachefs.fs import FileSystem
from cachefs.inode import Inode

ENTRIES_AT_ONCE = 250  # entries of one part of a list: a few milliseconds to make and send
SLICE_SECONDS = 0.005  # and no longer where most of what is looked at is clean
LOOKS_AT_ONCE = 64  # groups between two looks at the clock
FILES_AT_ONCE = 1000  # whose names are looked at before others may run: a few milliseconds
SYNCS_MAX = 16  # files that are made durable side by side


class Ledger:
    """What is unwritten of one mount. A path is bytes relative to SOURCE, b"" = everything."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.files: Files = fs.files
        self.writeback = fs.writeback
        self.root = fs.table.root

    # --- names -------------------------------------------------------------------------------------------------------

    def paths(self, inode: Inode) -> Iterator[bytes]:
        """The names of a file that are known, the oldest first; none for one that has lost them all."""
        for parent, name in inode.names:
            if parent is self.root:
                yield name
            else:
                above = next(self.paths(parent), None)
                if above is not None:
                    yield above + b"/" + name

    def path(self, inode: Inode) -> bytes | None:
        return next(self.paths(inode), None)

    def is_below(self, inode: Inode, path: bytes) -> bool:
        """Whether the file is known to be `path` or to lie below it."""
        return not path or any(known == path or known.startswith(path + b"/") for known in self.paths(inode))

    def may_be_below(self, inode: Inode, path: bytes) -> bool:
        """The same of a file that may have names which are not known."""
        return self.is_below(inode, path) or inode.st.st_nlink > len(inode.names)

    def find_unwritten(self, path: bytes) -> list[Inode]:
        """The files with unwritten data that are known by this very name: more than one if it was replaced in SOURCE."""
        return [inode for inode in self.writeback.dirty if _counts(inode) and path in self.paths(inode)]

    # --- the list ----------------------------------------------------------------------------------------------------

    def parts(self, inodes: Iterable[Inode] | None = None, path: bytes = b"") -> Iterator[list[dict[str, object]]]:
        """What is unwritten, of these files or of all at or below `path`, an entry an extent, in parts.

        A part takes a few milliseconds; between two others may run, and what changes meanwhile may be in the list or not.
        An extent ends where a group does, however it goes on. The parts are in no order.
        """
        part: list[dict[str, object]] = []
        start = time.perf_counter()
        for inode in list(self.writeback.dirty if inodes is None else inodes):
            if not _counts(inode) or not self.is_below(inode, path):
                continue
            about = self._about(inode)
            for looked, group in enumerate(_unwritten_groups(inode), 1):
                part += self._entries(inode, group, about)
                slow = looked % LOOKS_AT_ONCE == 0 and time.perf_counter() - start > SLICE_SECONDS
                if len(part) >= ENTRIES_AT_ONCE or slow:
                    yield part
                    part, start = [], time.perf_counter()
        if part:
            yield part

    def _about(self, inode: Inode) -> dict[str, object]:
        """An entry with what is the same for each extent of a file."""
        path = self.path(inode)
        return {
            "path": None if path is None else os.fsdecode(path),
            "offset": 0, "length": 0,
            "error": self._reason(inode),
            "tries": inode.tries, "age_seconds": 0.0, "next_try_seconds": 0.0, "inode": inode.node,
        }  # fmt: skip

    def _reason(self, inode: Inode) -> str | None:
        watchdog = self.files.io.watchdog
        number = watchdog.errno if watchdog.lost else inode.error_errno if inode.tries else 0
        return errno.errorcode.get(number, str(number)) if number else None

    def _entries(self, inode: Inode, group: Group, about: dict[str, object]) -> Iterator[dict[str, object]]:
        now, file = self.files.cache.clock(), group.file
        age = max(0.0, now - group.dirty_since)
        # A file that fails is tried after its pause, any other when its pages are old, at the latest.
        wait = inode.retry_at - now if inode.tries else self.writeback.expire_seconds - age
        times = {"age_seconds": round(age, 3), "next_try_seconds": round(max(0.0, wait), 3)}
        for first, count in runs(group.dirty | group.writeback):
            offset = (group.index << GROUP_SHIFT | first) << PAGE_SHIFT
            yield about | times | {"offset": offset, "length": min(count << PAGE_SHIFT, file.size - offset)}

    # --- bringing it there -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def selecting(self, path: bytes) -> AsyncIterator[tuple[list[Inode], bool]]:
        """The files at or below a path that something is to be done for until all is durable, and whether it is a directory.

        Files of which not all names are known may be below as well, so they are among them. Raises OSError for a path that
        does not exist.
        """
        async with self.fs.at_path(path) as inode:
            if not inode.is_dir:
                yield ([inode] if inode.is_regular else []), False
                return
            found: list[Inode] = []
            for number, candidate in enumerate(dict.fromkeys((*self.writeback.dirty, *self.files.data.unsynced))):
                if not candidate.unlinked and self.may_be_below(candidate, path):
                    found.append(candidate)
                if number % FILES_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
            yield found, True

    async def sync(self, inodes: list[Inode], tree: bool) -> tuple[list[Inode], list[Inode]]:
        """Writes these files out and has the backing make them durable; returns what could not be written, what not be made so.

        A `tree` is made durable as a whole, with its names and what was forgotten since. A backing far away may keep that to
        itself (FUSE does), so files are synced one by one there too. Raises OSError where the whole cannot be made durable.
        """
        failed = await self.writeback.flush_all(inodes)
        if tree:
            await self.fs.syncfs()
        undurable: list[Inode] = []
        one_by_one = set(inodes) - set(failed) if self.fs.backing.blocking or not tree else set()
        asked = {*inodes, *(self.files.keeper.retiring if tree else ())}.difference(failed)
        outdated = {inode for inode in asked if inode.journaled is not None and inode.journaled.synced}
        todo = iter(one_by_one | outdated)

        async def worker() -> None:
            for inode in todo:
                try:
                    if inode in one_by_one:
                        await self.files.durability.make_durable(inode)
                    if inode in outdated:  # what the journal keeps of an earlier fsync must not come back after a power cut
                        await self.files.durability.keep_durable(inode)
                except OSError:
                    undurable.append(inode)

        async with trio.open_nursery() as nursery:
            for _ in range(SYNCS_MAX):
                nursery.start_soon(worker)
        return failed, undurable


def _counts(inode: Inode) -> bool:
    """Whether the file has data that is to be written; none of an unlinked one is."""
    return inode.unwritten and not inode.unlinked


def _unwritten_groups(inode: Inode) -> Iterator[Group]:
    """Groups with pages newer than the backing. Those that come or go meanwhile may be among them or not."""
    file = inode.file
    if file is None:
        return
    # Only of dirty pages is there a list; of pages in writeback there are few at a time.
    for index in list(file.groups if file.writeback_pages else file.dirty_groups):
        group = file.groups.get(index)
        if group is not None:
            yield group

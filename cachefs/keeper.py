"""What the journal has to know of inodes: which pages, which file, which changes of it.

The keeper is told of every change before it is acknowledged, in the same stretch of plain code that makes it, so that the
journal always holds exactly the unwritten pages (`check`). Without a journal (`--durability none`) it does nothing.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace

import trio

from backing.base import Backing
from cachefs.cache.file import CachedFile
from cachefs.cache.page import GROUP_PAGES, GROUP_SHIFT, IN_GROUP, PAGE_SHIFT, PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.inode import Inode, InodeTable, Name
from cachefs.journal.cover import Masks
from cachefs.journal.journal import Journal, JournalFile
from cachefs.journal.records import PATHS_MAX, FileRecord, PagesRecord
from cachefs.journal.slots import JournalFull
from cachefs.journal.synced import Synced
from cachefs.statistics import JournalStatistics

log = logging.getLogger(__name__)


class Keeper:
    """Keeps unwritten data in `journal`, which is given when recovery is done; None keeps nothing."""

    def __init__(self, cache: PageCache, table: InodeTable, backing: Backing) -> None:
        self.cache = cache
        self._memory = cache.arena.view
        self.table = table
        self.backing = backing
        self.journal: Journal | None = None
        self.synced: Synced | None = None  # with --durability journal: what fsync has made durable there
        self.retiring: set[Inode] = set()  # written back, and named by `synced` still
        self._under_way: set[Inode] = set()  # those that `retire` is about to let go of
        self.make_durable: Callable[[Iterable[Inode]], Awaitable[object]] = _nothing_is_durable  # has the backing do that
        self._syncing = trio.Lock()
        self._moves: list[tuple[Name, Name]] = []  # renames under way: from, to
        self.written_through = 0  # writes that the journal could not take
        self.recovery_seconds = 0.0  # this and what follows is recovery's to count
        self.replayed_bytes = self.replayed_files = self.set_aside_files = self.lost_bytes = 0
        self.failing = False  # it could not take the last write

    # --- writing -----------------------------------------------------------------------------------------------------

    def full(self, nbytes: int) -> bool:
        """Whether so much more may not fit: writers wait for writeback then. It always fits into an empty journal."""
        if self.journal is None:
            return False
        slots = self.journal.slots
        used = slots.used
        return used + (nbytes >> PAGE_SHIFT) + 2 > slots.count and used > 0

    @property
    def behind(self) -> bool:
        """Whether, were we killed now, there might be something of a file of which nothing is unwritten."""
        return self.synced is not None or (self.journal is not None and self.journal.behind)

    def wrote(self, inode: Inode, offset: int, nbytes: int) -> bool:
        """The cache has these bytes. False: the journal does not, so they go to the backing before they are acknowledged."""
        journal, file = self.journal, inode.file
        if journal is None or inode.unlinked or file is None:
            return True
        try:
            kept = inode.journaled or self._add(journal, inode)
            page, last = offset >> PAGE_SHIFT, (offset + nbytes - 1) >> PAGE_SHIFT
            if page == last:
                record = kept.record
                record.size, record.mtime_ns = file.size, inode.mtime_ns
                start = file.groups[page >> GROUP_SHIFT].base + ((page & IN_GROUP) << PAGE_SHIFT)
                journal.put_one(kept, page, self._memory[start : start + PAGE_SIZE])
            else:
                self._put(journal, inode, kept, file, page, last + 1)
        except (OSError, JournalFull) as error:
            self.written_through += 1
            self._say_failing(error)
            return False
        self.failing = False
        return True

    def _put(self, journal: Journal, inode: Inode, kept: JournalFile, file: CachedFile, page: int, stop: int) -> None:
        record = kept.record
        before = record.size if kept.cover else inode.st.st_size
        record.size, record.mtime_ns = file.size, inode.mtime_ns
        while page < stop:
            first = page & IN_GROUP
            count = min(stop - page, GROUP_PAGES - first)
            start = file.groups[page >> GROUP_SHIFT].base + (first << PAGE_SHIFT)
            journal.put(kept, page, self._memory[start : start + (count << PAGE_SHIFT)], before, page + count < stop)
            page += count

    def _add(self, journal: Journal, inode: Inode) -> JournalFile:
        device, number = inode.key
        record = FileRecord(
            0, 0, device, number, 0, 0, inode.signature, False, False, self._handle(inode), self._paths(inode)
        )
        inode.journaled = journal.add(record)
        return inode.journaled

    def _handle(self, inode: Inode) -> bytes:
        """What tells this file from another one that gets its number later; stores that are far away are not asked."""
        fd = max(inode.fd, inode.writer, inode.reader)
        if self.backing.blocking or fd < 0:
            return b""
        try:
            return self.backing.file_handle(fd)
        except OSError:
            return b""

    def _say_failing(self, error: Exception) -> None:
        if not self.failing:
            reason = "it is full" if isinstance(error, JournalFull) else str(error)
            log.warning("the journal cannot take more (%s): each write goes to SOURCE before it is acknowledged", reason)
        self.failing = True

    # --- writing back --------------------------------------------------------------------------------------------------

    def begin(self, inode: Inode) -> int:
        """Writeback of the file begins: from now on its times and size in SOURCE may be of our making."""
        journal, kept = self.journal, inode.journaled
        if journal is None or kept is None:
            return 0
        if not kept.record.writing:
            kept.record.writing = True
            self._note(journal, kept)
        return journal.seq

    def halt(self, inode: Inode) -> None:
        """Writeback has written nothing yet, and something else comes first: what changes meanwhile is not of our making."""
        kept = inode.journaled
        if self.journal is not None and kept is not None:
            kept.record.writing = False
            kept.record.signature = inode.signature
            self._note(self.journal, kept)

    def end(self, inode: Inode, written: Masks, last_seq: int) -> None:
        """The backing has these pages as they were at `last_seq`, the result of `begin`."""
        journal, kept = self.journal, inode.journaled
        if journal is None or kept is None:
            return
        kept.record.writing, kept.record.cutting = inode.unsure, False
        kept.record.signature = inode.signature
        self._remove(journal, inode, kept, written, last_seq)

    # --- making durable ------------------------------------------------------------------------------------------------

    async def sync(self, inode: Inode) -> bool:
        """What is unwritten of the file survives a power cut when this returns; OSError where the disk refuses.

        False, and nothing done, while the backing has something of the file that is not durable there: what the durable index
        says of that part must not go before it is.
        """
        async with self._syncing:
            journal, synced, kept = self.journal, self.synced, inode.journaled
            if inode.unsynced:
                return False
            if journal is None or synced is None or kept is None:
                return True
            record, entries, rows = replace(kept.record, seq=journal.seq), journal.entries_of(kept), journal.rows_of(kept)
            before = kept.synced
            for entry in entries:
                entry.synced = True  # its slots stay, whatever becomes of its pages meanwhile
            kept.synced = before | entries
            try:
                await trio.to_thread.run_sync(_store, journal, synced, record, rows)
            except BaseException:
                journal.unsync(kept, entries - before)
                raise
            journal.unsync(kept, before - entries)
            if not kept.cover and not kept.synced and inode.journaled is kept:
                inode.journaled = None
            return True

    async def unsync(self, inode: Inode) -> None:
        """The durable index lets go of a file: it has lost its name, or the backing has durably what was synced of it."""
        async with self._syncing:
            journal, synced, kept = self.journal, self.synced, inode.journaled
            if journal is not None and synced is not None and kept is not None and kept.synced:
                await self._unsync(journal, synced, [(inode, kept)])

    async def _unsync(self, journal: Journal, synced: Synced, files: list[tuple[Inode, JournalFile]]) -> None:
        await trio.to_thread.run_sync(synced.drop, [kept.record.file for _, kept in files])
        for inode, kept in files:
            journal.unsync(kept, set(kept.synced))
            if not kept.cover and inode.journaled is kept:
                inode.journaled = None
        self.cache.room.unpark_all()  # some may wait for slots

    async def retire(self) -> None:
        """Lets go of what was synced of files that are written back by now, once that is durable on the backing."""
        journal = self.journal
        retiring = [inode for inode in self.retiring if inode.journaled is not None and not inode.journaled.cover]
        self.retiring.clear()
        if journal is None or self.synced is None or not retiring:
            return
        self._under_way.update(retiring)
        try:
            await self._let_go(journal, self.synced, retiring)
        finally:
            self._under_way.difference_update(retiring)

    @property
    def written_back(self) -> set[Inode]:
        """Files that have a record with nothing to be written."""
        return self.retiring | self._under_way

    async def _let_go(self, journal: Journal, synced: Synced, retiring: list[Inode]) -> None:
        old = [(inode, kept, set(kept.synced)) for inode in retiring if (kept := inode.journaled) is not None]
        try:
            await self.make_durable(retiring)
        except OSError as error:
            self.retiring.update(retiring)
            log.warning("SOURCE cannot be made durable (%s): the journal keeps what was synced", error.strerror)
            return
        async with self._syncing:
            same = [(inode, kept) for inode, kept, entries in old if kept.synced == entries and not kept.cover]
            await self._unsync(journal, synced, same)

    async def close(self) -> None:
        """The end. The journal's files are removed if the backing has everything, and has it durably if that was promised."""
        journal, needed = self.journal, False
        if journal is None:
            return
        if self.synced is not None:
            try:
                await self.make_durable(self.retiring)
            except OSError as error:
                needed = bool(len(self.synced))
                log.error("SOURCE cannot be made durable (%s): the journal is kept", error.strerror)
            self.synced.close()
        journal.close(needed)
        self.journal = None

    # --- other changes -------------------------------------------------------------------------------------------------

    def cut(self, inode: Inode, size: int) -> None:
        """The backing's file is about to be truncated: if we end half way, that is completed."""
        journal, kept = self.journal, inode.journaled
        if journal is not None and kept is not None:
            kept.record.size = size
            kept.record.cutting = True
            with self._tolerating():
                journal.remove(kept, kept.cover.masks(_end_page(size)), journal.seq, keep=True)

    def trim(self, inode: Inode, size: int) -> None:
        """Pages behind the end that a predecessor left: it ended while it cut them off, or a power cut brought them back."""
        journal, kept = self.journal, inode.journaled
        if journal is not None and kept is not None and (behind := kept.cover.masks(_end_page(size))):
            with self._tolerating():
                journal.remove(kept, behind, journal.seq, keep=True)

    def cut_done(self, inode: Inode, size: int) -> None:
        """It has been truncated, and so have the cached pages."""
        journal, kept, file = self.journal, inode.journaled, inode.file
        if journal is None or kept is None or file is None:
            return
        kept.record.size = file.size  # and its signature once it was looked at: see `changed`
        self._remove(journal, inode, kept, kept.cover.masks(_end_page(file.size)), journal.seq)
        page, tail = divmod(size, PAGE_SIZE)
        if tail and page in kept.cover:  # what lies behind the end must not come back when the file grows
            self.wrote(inode, page << PAGE_SHIFT, 1)

    def cut_failed(self, inode: Inode) -> None:
        """It could not be truncated: what was given up comes back."""
        journal, kept, file = self.journal, inode.journaled, inode.file
        if journal is not None and kept is not None and file is not None:
            kept.record.cutting = False
            kept.record.size = file.size
            for offset, nbytes in file.dirty_extents():
                self.wrote(inode, offset, nbytes)
            self._remove(journal, inode, kept, {}, journal.seq)  # has the record say so

    def changed(self, inode: Inode) -> None:
        """Its times, or the backing's, are others now, by a change of ours.

        What programs see of it is written down at once, and that a change which was under way is over: what differs from now
        on is somebody else's doing. The rest, a later ctime, may follow.
        """
        kept = inode.journaled
        if self.journal is not None and kept is not None:
            at_once = kept.record.cutting or kept.record.mtime_ns != inode.mtime_ns
            kept.record.mtime_ns = inode.mtime_ns
            kept.record.signature = inode.signature
            kept.record.cutting = False
            if at_once:
                self._note(self.journal, kept)
            else:
                self.journal.note_later(kept)

    def touching(self, inode: Inode, mtime_ns: int | None = None) -> None:
        """Its times are about to be set, maybe its mtime: if we end half way, that is not somebody else's doing."""
        kept = inode.journaled
        if self.journal is not None and kept is not None:
            kept.record.cutting = True
            kept.record.mtime_ns = kept.record.mtime_ns if mtime_ns is None else mtime_ns
            self._note(self.journal, kept)

    def settle(self) -> None:
        """Writes down what was to follow, if nothing has come that it could go along with."""
        if self.journal is not None:
            with self._tolerating():
                self.journal.settle()

    def rebound(self, inode: Inode) -> None:
        """It is another file of the backing from now on, with the contents that it had."""
        kept = inode.journaled
        if self.journal is not None and kept is not None:
            kept.record.device, kept.record.number = inode.key
            kept.record.handle, kept.record.paths = self._handle(inode), self._paths(inode)
            kept.record.signature = inode.signature
            self._note(self.journal, kept)

    def moved(self, inode: Inode) -> None:
        """It was renamed, linked, or lost one of its names."""
        kept = inode.journaled
        if self.journal is not None and kept is not None and kept.record.paths != (paths := self._paths(inode)):
            kept.record.paths = paths
            self._note(self.journal, kept)

    @contextlib.contextmanager
    def moving(self, inodes: Iterable[Inode], old: Name, new: Name) -> Iterator[None]:
        """What is called `old`, one of `inodes` or a directory above them, is about to become `new`.

        Inside, files are looked for under both, whoever writes down their paths meanwhile and for whatever reason.
        """
        move = (old, new)
        self._moves.append(move)
        try:
            for inode in inodes:
                self.moved(inode)
            yield
        finally:
            self._moves.remove(move)

    def _paths(self, inode: Inode) -> tuple[bytes, ...]:
        """Where it is, behind where the moves under way may have taken it by now."""
        known = self.table.paths(inode)
        if not self._moves:
            return known
        moves = [(self.table.path_in(*old), self.table.path_in(*new)) for old, new in self._moves]
        paths = list(known)
        for path in paths:  # those that are found are looked at, too
            for before, after in moves:
                moved = after + path[len(before) :]
                if (path == before or path.startswith(before + b"/")) and moved not in paths and len(paths) < 2 * PATHS_MAX:
                    paths.append(moved)
        return (*paths[len(known) :], *known)

    def forget(self, inode: Inode) -> None:
        """Nobody wants its unwritten data any more: it is gone, or a person gave it up."""
        journal, kept = self.journal, inode.journaled
        if journal is not None and kept is not None:
            self._remove(journal, inode, kept, kept.cover.masks(), journal.seq)

    def _note(self, journal: Journal, kept: JournalFile) -> None:
        with self._tolerating():
            journal.note(kept)

    def _remove(self, journal: Journal, inode: Inode, kept: JournalFile, pages: Masks, last_seq: int) -> None:
        with self._tolerating():
            journal.remove(kept, pages, last_seq)
        if kept.cover:
            return
        if kept.synced:
            self.retiring.add(inode)
        else:
            inode.journaled = None

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        """What cannot be noted is noted with the file's next change; nothing that was acknowledged depends on it."""
        try:
            yield
        except (OSError, JournalFull) as error:
            self._say_failing(error)

    # --- looking at it -------------------------------------------------------------------------------------------------

    def statistics(self) -> JournalStatistics:
        slots = self.journal.slots if self.journal is not None else None
        return JournalStatistics(
            used_bytes=slots.used * PAGE_SIZE if slots is not None else 0,
            size_bytes=slots.count * PAGE_SIZE if slots is not None else 0,
            entries=slots.runs if slots is not None else 0,
            written_through=self.written_through,
            recovery_seconds=self.recovery_seconds,
            replayed_bytes=self.replayed_bytes,
            replayed_files=self.replayed_files,
            set_aside_files=self.set_aside_files,
            lost_bytes=self.lost_bytes,
        )

    def check(self) -> None:
        """Asserts that the journal holds the unwritten pages and no others."""
        if self.journal is None:
            return
        self.journal.check()
        for inode in self.table:
            kept = set(inode.journaled.cover) if inode.journaled is not None else set()
            unwritten: set[int] = set()
            if inode.file is not None and not inode.unlinked:
                for offset, nbytes in inode.file.dirty_extents():
                    unwritten.update(_pages(offset, nbytes))
            assert kept <= unwritten, f"the journal has pages that are not unwritten: {sorted(kept - unwritten)[:5]}"
            assert kept == unwritten or self.written_through, f"not in the journal: {sorted(unwritten - kept)[:5]}"


async def _nothing_is_durable(inodes: Iterable[Inode]) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _store(journal: Journal, synced: Synced, record: FileRecord, rows: list[PagesRecord]) -> None:
    if rows:
        journal.data.sync()
        synced.store(record, rows)
    else:
        synced.drop([record.file])


def _pages(offset: int, nbytes: int) -> range:
    return range(offset >> PAGE_SHIFT, (offset + nbytes + PAGE_SIZE - 1) >> PAGE_SHIFT)


def _end_page(size: int) -> int:
    """The first page that lies wholly behind `size`."""
    return (size + PAGE_SIZE - 1) >> PAGE_SHIFT

"""Writeback: which dirty extents go to the backing when, and how writers are held back.

Two thresholds and two clocks, as Linux has them. Above `dirty_background_bytes` the oldest files are written; what has
been dirty for `dirty_expire_seconds` is written at the next tick, every `writeback_interval_seconds`. Between half way to
`dirty_limit_bytes` and that limit writers are slowed to a falling multiple of the speed at which the backing takes data,
so there is no cliff; the limit itself is never passed (`PageCache.write` refuses).

A batch is some extents of one file, written by one call into the writeback thread: a file has one batch at a time
(`inode.lock`), up to `BATCHES_MAX` files are written side by side. Pages that are written to meanwhile stay dirty. A batch
that fails leaves its pages dirty; the file is tried again after a pause that doubles, and other files go on. While the backing
is lost nothing is tried, and when it is back everything at once.
"""

import errno
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable

import trio

from cachefs.cache import leaving
from cachefs.cache.file import CachedFile
from cachefs.cache.page import GROUP_SHIFT, GROUP_SIZE, PAGE_SHIFT, PAGE_SIZE, Group, runs
from cachefs.cache.pagecache import PageCache
from cachefs.inode import Inode
from cachefs.keeper import Keeper
from cachefs.statistics import WritebackStatistics
from cachefs.watchdog import Watchdog

log = logging.getLogger(__name__)

BATCH_BYTES = 8 << 20  # what one call writes: enough to be worth a thread switch, little enough to see progress
BATCH_EXTENTS = 1024
BATCHES_MAX = 4
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS))  # others are refused to write while a file fails with these
RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS = 0.5, 30.0
PAUSE_MOST_SECONDS = 0.2  # longest single pause of a writer below the limit

Batch = list[tuple[int, list[memoryview], list[tuple[Group, int]]]]  # extents: offset, buffers, pages


class Writeback:
    """Owns the list of files with unwritten data. `settled` is told of each that is clean."""

    def __init__(
        self,
        cache: PageCache,
        keeper: Keeper,
        *,
        limit_bytes: int,
        background_bytes: int,
        expire_seconds: float,
        interval_seconds: float,
        settled: Callable[[Inode], None] = lambda inode: None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.cache = cache
        self.keeper = keeper
        self.set_limits(limit_bytes, background_bytes)
        self.expire_seconds = expire_seconds
        self.interval_seconds = interval_seconds
        self.settled = settled
        self.watchdog = watchdog or Watchdog(None, math.inf, lambda: None)
        self.watchdog.came_back = self._try_everything
        self.dirty: dict[Inode, int] = {}  # {inode with unwritten data: page where its next batch begins}
        self.refused: dict[Inode, int] = {}  # {inode whose last batch found no room: errno}
        self.written_bytes = 0
        self.errors: Counter[str] = Counter()  # {errno name: batches that failed}
        self.retries = 0  # batches of files whose batch before had failed
        self.throttle_seconds = 0.0
        self._speed = 0.0  # bytes a second that batches reached lately, 0 = unknown
        self._under_way = 0
        self._oldest: dict[Inode, float] = {}  # {inode with a batch under way: when its oldest page became dirty}
        self._write_soon = False  # somebody waits for room: thresholds and ages do not matter
        self._wake = trio.Event()
        self._asleep = False  # nothing has been dirty for a while: the first file that is has to wake the task

    def set_limits(self, limit_bytes: int, background_bytes: int) -> None:
        """How much may be unwritten, and how much is before writeback begins; those who wait look again."""
        self.limit_pages = self.cache.dirty_limit_pages = limit_bytes // PAGE_SIZE
        self.background_pages = background_bytes // PAGE_SIZE
        self.free_pages = (self.background_pages + self.limit_pages) // 2  # unwritten ones beyond which writers are slowed
        self.cache.room.unpark_all()

    # --- writers ---------------------------------------------------------------------------------------------------

    @property
    def unwritten_pages(self) -> int:
        return self.cache.dirty_pages + self.cache.writeback_pages

    def note(self, inode: Inode) -> None:
        """To be called after every write to the file."""
        if inode not in self.dirty:
            self.dirty[inode] = 0
            if self._asleep:
                self.kick()
        if self.cache.dirty_pages > self.background_pages:
            self.kick()

    def kick(self) -> None:
        self._wake.set()

    def must_throttle(self, nbytes: int) -> bool:
        cache, free = self.cache, self.free_pages
        if cache.dirty_pages + cache.writeback_pages + (nbytes >> PAGE_SHIFT) > free and self._level_after(nbytes) > free:
            return True
        return self.keeper.full(nbytes)

    def _level_after(self, nbytes: int) -> int:
        """Unwritten pages once `nbytes` more are written; of long writes the first piece counts, see `Filler.write`."""
        cache = self.cache
        return cache.dirty_pages + cache.writeback_pages + min(nbytes >> PAGE_SHIFT, self.limit_pages // 4)

    async def throttle(self, nbytes: int) -> None:
        """Holds a writer of `nbytes` back in proportion to how near the limit is; raises what stops writeback for good."""
        start = self.cache.clock()
        free = self.free_pages
        self.kick()
        while (level := self._level_after(nbytes)) > free or self.keeper.full(nbytes):
            if level > self.limit_pages or self.keeper.full(nbytes):
                self.need_room()
                await self.cache.room.park()
                continue
            left = self._pause_seconds(nbytes, level - free, self.limit_pages - free) - (self.cache.clock() - start)
            with trio.move_on_after(max(0.0, left)) as pause:  # or until a batch is done: the level is another one then
                await self.cache.room.park()
            if pause.cancelled_caught:
                break
        self.throttle_seconds += self.cache.clock() - start

    def _pause_seconds(self, nbytes: int, above: int, most: int) -> float:
        """For a writer of `nbytes`: twice the backing's speed where throttling begins, falling to nothing at the limit."""
        if not self._speed:
            return 0.0
        return min(nbytes / (2 * self._speed * (most - above + 1) / (most + 1)), PAUSE_MOST_SECONDS)

    def check_stuck(self) -> None:
        """Raises the error that keeps the data of every dirty file from being written, if that is so."""
        if self._under_way or not self.dirty:
            return
        if all(inode.retry_seconds for inode in self.dirty):
            worst = max(self.dirty, key=lambda inode: inode.error_count)
            raise OSError(worst.error_errno, os.strerror(worst.error_errno))

    def need_room(self) -> None:
        """Somebody waits for pages that are dirty: write, whatever the thresholds say."""
        self.check_stuck()
        self.write_soon()

    def write_soon(self) -> None:
        """Everything dirty is to be written now, in the background."""
        self._write_soon = True
        self.kick()

    # --- the task ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Writes what is due until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                with trio.move_on_after(math.inf if self._asleep else self.interval_seconds) as pause:
                    await self._wake.wait()
                self._wake = trio.Event()
                self._asleep = pause.cancelled_caught and not self.dirty
                if self.watchdog.lost:
                    continue
                # Batches that hang must not keep other files from being written.
                for inode in self._due(BATCHES_MAX - self._under_way + self.watchdog.overdue("write")):
                    self._under_way += 1
                    nursery.start_soon(self._write_one, inode)

    def _try_everything(self) -> None:
        """The backing is back: what failed or was not tried need not wait out its pause."""
        for inode in self.dirty:
            inode.retry_at = 0.0
        self.kick()

    def _due(self, most: int) -> list[Inode]:
        """The files to write next, those whose turn was longest ago first."""
        now = self.cache.clock()
        everything = self._write_soon or self.cache.dirty_pages > self.background_pages
        due: list[Inode] = []
        passed_by = False
        for inode in list(self.dirty):
            if len(due) >= most:
                break
            file = inode.file
            if file is None or not file.unwritten:
                self._clean(inode)
            elif inode.locked:
                passed_by = True
            elif not file.dirty_pages or now < inode.retry_at:
                continue
            elif everything or inode in self.refused or now - file.dirty_since >= self.expire_seconds:
                due.append(inode)
        else:
            self._write_soon = self._write_soon and passed_by
        return due

    async def _write_one(self, inode: Inode) -> None:
        try:
            async with inode.lock:
                await self.write_batch(inode, self.dirty.get(inode, 0))
        finally:
            self._under_way -= 1
            self.cache.room.unpark_all()
            if self.dirty:
                self.kick()

    # --- one file ----------------------------------------------------------------------------------------------------

    async def flush(self, inode: Inode) -> None:
        """Writes what is dirty of one file now, waits for what is under way, and raises what went wrong."""
        async with inode.lock:
            await self.flush_locked(inode)

    async def flush_locked(self, inode: Inode) -> None:
        """The same by a caller that holds `inode.lock`.

        One sweep from the first page to what is the last one now: it meets everything that is dirty now, and ends on a
        file in heavy use. Pages dirtied behind it, and behind the end, may stay.
        """
        file = inode.file
        if file is None:
            return
        page, end_page = 0, file.end_page
        while page < end_page and file.dirty_pages:
            page, error = await self.write_batch(inode, page)
            if error is not None:
                raise error
        if not file.unwritten:
            self._clean(inode)

    async def flush_all(self, inodes: Iterable[Inode] | None = None) -> list[Inode]:
        """Writes everything that is dirty now, or of these files, several at a time; returns those that could not be written."""
        failed: list[Inode] = []
        todo = iter(list(self.dirty if inodes is None else inodes))

        async def worker() -> None:
            for inode in todo:
                await trio.lowlevel.checkpoint()  # a short batch of a local file is written without one
                try:
                    await self.flush(inode)
                except OSError:
                    failed.append(inode)

        async with trio.open_nursery() as nursery:
            for _ in range(BATCHES_MAX):
                nursery.start_soon(worker)
        return failed

    async def write_batch(self, inode: Inode, from_page: int) -> tuple[int, OSError | None]:
        """Writes the next extents of a file behind `from_page`, under `inode.lock`.

        Returns the page where it ended, and what went wrong, which is noted on the inode too.
        """
        file = inode.file
        batch = self.take_batch(file, from_page) if file is not None else []
        if file is None or not batch:
            self._go_on_from(inode, 0)
            return sys.maxsize, None
        last_group, last_mask = batch[-1][2][-1]
        end_page = (last_group.index << GROUP_SHIFT) + last_mask.bit_length()
        since = file.groups[batch[0][2][0][0].index].dirty_since
        self._oldest[inode] = min(group.dirty_since for _, _, pages in batch for group, _ in pages)
        self.retries += bool(inode.tries)
        start = self.cache.clock()
        last_seq = self.keeper.begin(inode)
        done, error = 0, None
        try:
            done, error = await file.source.write([(offset, buffers) for offset, buffers, _ in batch])
        finally:
            del self._oldest[inode]
            self.keeper.end(inode, _masks(batch[:done]), last_seq)
            for i, (_, _, pages) in enumerate(batch):
                for group, mask in pages:
                    self.cache.finish_writeback(group, mask, None if i < done else since)
            self._account(batch[:done], self.cache.clock() - start)
            if inode.unlinked and not inode.opens:
                leaving.discard(self.cache, file)
            self._go_on_from(inode, end_page)
            self._note_result(inode, error)
        return end_page, error

    def _go_on_from(self, inode: Inode, page: int) -> None:
        """Where the next batch begins: were it always the first page, those behind a busy one would never be written."""
        if inode in self.dirty:
            self.dirty[inode] = page

    def take_batch(self, file: CachedFile, from_page: int) -> Batch:
        """Makes the next dirty extents of `file` WRITEBACK, ascending; neighbours in the file are one extent."""
        batch: Batch = []
        size = 0
        for index in sorted(index for index in file.dirty_groups if index >= from_page >> GROUP_SHIFT):
            group = file.groups[index]
            skip = max(0, from_page - (index << GROUP_SHIFT))
            for first, count in runs(group.dirty >> skip << skip):
                offset = (index << GROUP_SHIFT | first) << PAGE_SHIFT
                stop = min(offset + (count << PAGE_SHIFT), file.size)
                start = group.base + (offset - index * GROUP_SIZE)
                view = self.cache.arena.view[start : start + stop - offset]
                mask = ((1 << count) - 1) << first
                self.cache.start_writeback(group, mask)
                _append(batch, offset, view, group, mask)
                size += count << PAGE_SHIFT
                if size >= BATCH_BYTES or len(batch) >= BATCH_EXTENTS:
                    return batch
        return batch

    def _account(self, written: Batch, seconds: float) -> None:
        nbytes = sum(len(buffer) for _, buffers, _ in written for buffer in buffers)
        self.written_bytes += nbytes
        if nbytes >= 64 * PAGE_SIZE:
            speed = nbytes / max(seconds, 1e-6) * max(1, self._under_way)
            self._speed = speed if not self._speed else 0.8 * self._speed + 0.2 * speed

    def _note_result(self, inode: Inode, error: OSError | None) -> None:
        if error is None:
            inode.retry_at = inode.retry_seconds = 0.0
            inode.tries = 0
            self.refused.pop(inode, None)
            if not inode.unwritten:
                self._clean(inode)
            elif inode in self.dirty:
                self.dirty[inode] = self.dirty.pop(inode)  # now it is the others' turn
            return
        number = error.errno or errno.EIO
        name = errno.errorcode.get(number, str(number))
        self.errors[name] += 1
        if not inode.retry_seconds:
            log.error("cannot write to the backing: %s (inode %d); the data is kept and tried again", name, inode.node)
        inode.tries += 1
        inode.error_count += 1
        inode.error_errno = number
        if number in NO_ROOM:
            self.refused[inode] = number
        else:
            self.refused.pop(inode, None)
        inode.retry_seconds = min(max(RETRY_FIRST_SECONDS, 2 * inode.retry_seconds), RETRY_MOST_SECONDS)
        inode.retry_at = self.cache.clock() + inode.retry_seconds

    def retry(self, number: int) -> None:
        """What failed with this errno may succeed now: the pauses of these files are over."""
        for inode, why in self.refused.items():
            if why == number:
                inode.retry_at = 0.0
        self.kick()

    def given_up(self, inode: Inode) -> None:
        """The file's dirty pages are gone, unwritten: its failures do not matter any more."""
        inode.retry_at = inode.retry_seconds = 0.0
        inode.tries = 0
        if not inode.unwritten:
            self._clean(inode)

    def _clean(self, inode: Inode) -> None:
        self.refused.pop(inode, None)
        if self.dirty.pop(inode, None) is not None:
            self.settled(inode)

    def statistics(self, through_bytes: int = 0) -> WritebackStatistics:
        waiting = (i.file.dirty_since for i in self.dirty if i.file and i.file.dirty_pages)
        oldest = min((*waiting, *self._oldest.values()), default=math.inf)
        return WritebackStatistics(
            dirty_bytes=(self.unwritten_pages - self.cache.redirtied_pages) * PAGE_SIZE,
            dirty_limit_bytes=self.limit_pages * PAGE_SIZE,
            dirty_expire_seconds=self.expire_seconds,
            oldest_dirty_seconds=max(0.0, self.cache.clock() - oldest) if oldest < math.inf else 0.0,
            written_bytes=self.written_bytes,
            through_bytes=through_bytes,
            errors=dict(self.errors),
            failing_files=sum(1 for inode in self.dirty if inode.tries),
            retries=self.retries,
            throttle_seconds=self.throttle_seconds,
        )


def _masks(batch: Batch) -> dict[int, int]:
    """{group index: mask} of its pages."""
    masks: dict[int, int] = {}
    for _, _, pages in batch:
        for group, mask in pages:
            masks[group.index] = masks.get(group.index, 0) | mask
    return masks


def _append(batch: Batch, offset: int, view: memoryview, group: Group, mask: int) -> None:
    """Adds pages to the last extent if they follow it in the file, or begins another."""
    if batch:
        start, buffers, pages = batch[-1]
        if start + sum(len(buffer) for buffer in buffers) == offset:
            buffers.append(view)
            pages.append((group, mask))
            return
    batch.append((offset, [view], [(group, mask)]))

"""Open files: read, write, truncate, fsync and close, between programs and the page cache.

A hit goes `read` -> `PageCache.lookup` and back with no await that could give the turn to somebody else.
"""

import contextlib
import errno
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from time import clock_gettime_ns

import trio

from cachefs.backingio import BackingIO
from cachefs.cache import leaving
from cachefs.cache.file import CachedFile
from cachefs.cache.fill import Filler
from cachefs.cache.page import PAGE_SHIFT, PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.cache.readahead import Window
from cachefs.cache.wishes import drop_transient
from cachefs.conflicts import Conflicts
from cachefs.descriptors import Descriptors
from cachefs.handle import Handle
from cachefs.inode import Inode, patched, signature_of
from cachefs.keeper import Keeper
from cachefs.process import name_of
from cachefs.source import DataDescriptors, FileSource
from cachefs.space import Space
from cachefs.watchdog import Unreachable
from cachefs.writeback import Writeback

CLOCK_REALTIME_COARSE = 5  # linux/time.h: the clock of file times, so that ours and the backing's do not cross
CLOCK_AHEAD_NS = 20_000_000  # more than a tick of the coarse clock
EXTEND_AT_ONCE_BYTES = 1 << 40  # a write that ends beyond this finds out now whether the backing can hold such a file
DIRTY_CLOSED_MAX = 2048  # files closed but not written out yet; each keeps a descriptor
STAT_TRIES = 3
SET_ID = stat.S_ISUID | stat.S_ISGID
NO_GROUPS: frozenset[int] = frozenset()


def now_ns(inode: Inode) -> int:
    """The time of a change to the file now, not before that of its last one.

    The backing may take times from a finer clock; CLOCK_AHEAD_NS bounds what of that is not a clock that was set back.
    """
    now, shown, theirs = clock_gettime_ns(CLOCK_REALTIME_COARSE), inode.ctime_shown[1], inode.st.st_ctime_ns
    last = shown if shown > theirs else theirs
    return last if now < last < now + CLOCK_AHEAD_NS else now


@dataclass(frozen=True, slots=True)
class Opened:
    """What the kernel needs to know of a new handle."""

    number: int
    unchanged: bool  # since the kernel may last have cached pages of it
    attributes_changed: bool  # since the kernel may last have been told


class Files:
    """All open files. `changed(inode)` is called when the backing turned out to have other contents than the cache had.

    `gone(parent, name)` is called when a file turned out to have another name, `opened(inode)` at each first open.
    """

    def __init__(
        self,
        io: BackingIO,
        descriptors: Descriptors,
        cache: PageCache,
        filler: Filler,
        writeback: Writeback,
        keeper: Keeper,
        readahead_max_bytes: int,
        metadata_ttl_seconds: float,
        changed: Callable[[Inode], None],
        gone: Callable[[Inode, bytes], None],
    ) -> None:
        self.io = io
        self.descriptors = descriptors
        self.cache = cache
        self.filler = filler
        self.writeback = writeback
        self.keeper = keeper
        self.data = DataDescriptors(io, descriptors)
        self.space = Space(io, descriptors, writeback)
        self.conflicts = Conflicts(io, descriptors, self.data, self._noticed, gone)
        self.data.keep_theirs = self._keep_theirs
        self.data.keep_ours = self._keep_ours
        self.data.looked = self.absorb
        self.opened: Callable[[Inode], None] = lambda inode: None
        self.handles: dict[int, Handle] = {}
        self.changed = changed
        self.advise: Callable[[Handle, str], None] = lambda handle, program: None  # told of new handles, and whose they are
        self.handed: Callable[[Handle], None] = lambda handle: None  # the same, when it is known how they will be used
        self.ttl_seconds = metadata_ttl_seconds
        self.ahead: tuple[CachedFile, Window] | None = None  # what the hit that is being answered asks for
        self._last_handle = 0
        self._readahead_max_bytes = readahead_max_bytes
        self.window_pages = 0
        self._measure()

    # --- attributes --------------------------------------------------------------------------------------------------

    def absorb(self, inode: Inode, st: os.stat_result, fresh: bool = False) -> None:
        """Takes in attributes just read from the backing. If somebody else changed the file, its clean pages leave.

        While anything of ours is unwritten, size and times are ours to tell, and who writes it will keep both versions.
        Unless they are known to be `fresh`, we may have changed the file since they were read.
        """
        file = inode.file
        if not fresh and self._may_be_stale(inode, st):
            return
        if file is not None and file.writeback_pages:
            return  # the times may be those of our own write, before it has restored them
        inode.st = st
        inode.checked_at = trio.current_time()
        if file is None or inode.locked:
            return
        if not file.unwritten:
            inode.unsure = False
            if signature_of(st) != inode.signature:
                self._changed_underneath(inode, file, st)
        elif not inode.unsure and signature_of(st)[:2] not in (inode.signature[:2], inode.noticed):
            inode.noticed = signature_of(st)[:2]
            self._noticed(inode)

    def _changed_underneath(self, inode: Inode, file: CachedFile, st: os.stat_result) -> None:
        inode.signature = signature_of(st)
        inode.changes += 1
        leaving.invalidate(self.cache, file)
        leaving.truncate(self.cache, file, st.st_size)
        self.changed(inode)

    def _noticed(self, inode: Inode) -> None:
        """Somebody else has changed a file that we have unwritten data of: what is clean leaves, what is ours stays ours."""
        if inode.file is not None:
            inode.changes += 1
            leaving.invalidate(self.cache, inode.file)
            self.changed(inode)

    def _may_be_stale(self, inode: Inode, st: os.stat_result) -> bool:
        """Whether what we know is as new as `st`, read in a thread that may have been overtaken by a change of our own."""
        if not self.io.backing.blocking or inode.file is None:
            return False
        known_ns = max(inode.st.st_ctime_ns, inode.signature[2])
        return st.st_ctime_ns < known_ns or (st.st_ctime_ns == known_ns and signature_of(st) != inode.signature)

    def adopt(self, inode: Inode, st: os.stat_result, contents: bool = False) -> None:
        """Takes in attributes after a change of our own, one of `contents` and mtime or one that leaves these alone."""
        inode.epoch += 1
        inode.st = st
        inode.done += 1
        inode.checked_at = trio.current_time()
        file, signature = inode.file, signature_of(st)
        if contents:
            inode.unsure = False
        elif file is not None and signature[:2] != inode.signature[:2]:
            if file.unwritten:  # by our writeback, which is not done yet, or by somebody else: writeback will see
                signature = (*inode.signature[:2], signature[2])
            else:
                self._changed_underneath(inode, file, st)  # by somebody else, just before
        inode.signature = signature
        if inode.journaled is not None:
            self.keeper.changed(inode)

    def believed(self, inode: Inode) -> bool:
        """Whether the attributes need not be read: a backing far away was asked for them a short time ago."""
        return self.io.backing.blocking and trio.current_time() - inode.checked_at < self.ttl_seconds

    async def refresh(self, inode: Inode) -> None:
        """Reads the attributes, again if we changed the file meanwhile. What we change all the time, we know well enough."""
        for _ in range(STAT_TRIES):
            epoch = inode.epoch
            st = await self._stat(inode)
            if epoch == inode.epoch:
                return self.absorb(inode, st, fresh=True)

    def refresh_now(self, inode: Inode) -> bool:
        """The same of a local backing, in plain code; False, and nothing done, where it may have to wait."""
        fd = max(inode.reader, inode.writer, inode.fd)
        if fd < 0:
            return False
        self.absorb(inode, self.io.call_now("stat", self.io.backing.fstat, fd), fresh=True)
        return True

    async def notice_locked(self, inode: Inode) -> None:
        """Notices somebody else's change before one of ours to contents or mtime makes it look like ours.

        By a caller that holds `inode.lock`, right before its change. If we have unwritten data, that version is kept.
        """
        file = inode.file
        if file is None:
            return
        if not (file.unwritten and (inode.unsure or inode.unlinked or self.believed(inode))):
            epoch = inode.epoch
            st = await self._stat(inode)
            if file.unwritten:
                if signature_of(st)[:2] != inode.signature[:2]:
                    await self.conflicts.keep_theirs(inode)
            elif epoch == inode.epoch and signature_of(st) != inode.signature:
                self._changed_underneath(inode, file, st)
        inode.unsure = True  # until what the change has made of the file was seen

    async def readopt(self, inode: Inode, contents: bool = False, **known: int) -> bool:
        """Reads the attributes after a change of our own, again if there was one more meanwhile; whether that worked.

        The change is done, whatever becomes of the look at it. Where that fails, the attributes that the change is `known`
        to have left (by their names in os.stat_result) are shown until the next look, which is due at once.
        """
        try:
            for _ in range(STAT_TRIES):
                epoch = inode.epoch
                st = await self._stat(inode)
                if epoch == inode.epoch:
                    self.adopt(inode, st, contents)
                    return True
            self.adopt(inode, st, contents or not inode.unwritten)  # too busy to tell somebody else's change from ours
            return True
        except OSError:
            inode.epoch += 1
            inode.st = patched(inode.st, **known)
            inode.checked_at = -math.inf
            if contents:
                inode.signature = (inode.st.st_mtime_ns, inode.st.st_size, inode.signature[2])
            return False

    async def _stat(self, inode: Inode) -> os.stat_result:
        fd = max(inode.reader, inode.writer)
        if fd < 0:
            return await self.descriptors.at("stat", inode, self.io.backing.fstat)
        inode.busy += 1
        try:
            return await self.io.call("stat", self.io.backing.fstat, fd)
        finally:
            inode.busy -= 1
            self.data.settle(inode)

    async def _keep_theirs(self, inode: Inode) -> None:
        """For writeback, which has begun and written nothing."""
        self.keeper.halt(inode)
        await self.conflicts.keep_theirs(inode)
        self.keeper.begin(inode)

    async def _keep_ours(self, inode: Inode) -> None:
        if await self.conflicts.keep_ours(inode) is not None:
            self.keeper.rebound(inode)

    # --- open and close ------------------------------------------------------------------------------------------------

    def open_known(self, inode: Inode, flags: int, uid: int, gids: frozenset[int] = NO_GROUPS, pid: int = 0) -> Opened | None:
        """A handle on a file far away, with no look at the backing; None where one is needed, whatever is known."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if flags & os.O_TRUNC or (writable and inode.writer < 0):
            return None
        inode.opens += 1
        return self._opened(inode, inode.file is not None, False, flags, uid, gids, pid)

    def open_now(self, inode: Inode, flags: int, uid: int, gids: frozenset[int] = NO_GROUPS, pid: int = 0) -> Opened | None:
        """A handle to read a local file, in plain code; None, and nothing done, where it may have to wait."""
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            return None
        before, known = signature_of(inode.st), inode.file is not None
        if inode.reader >= 0:
            self.refresh_now(inode)
        elif not self.data.reader_now(inode):
            return None
        inode.opens += 1
        return self._opened(inode, known, before != signature_of(inode.st), flags, uid, gids, pid)

    async def open(self, inode: Inode, flags: int, uid: int, gids: frozenset[int] = NO_GROUPS, pid: int = 0) -> Opened:
        """A handle. On a backing far away, a file whose attributes are fresh is opened there when it is first needed."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        inode.opens += 1
        try:
            if writable:
                await self.data.writer(inode)
            elif not self.io.backing.blocking:
                await self.data.reader(inode)
            before, known = signature_of(inode.st), inode.file is not None
            if not self.believed(inode):
                await self.refresh(inode)
            changed = before != signature_of(inode.st)
            self.ensure_file(inode)
            if flags & os.O_TRUNC:
                await self.truncate(inode, 0, uid, gids)
        except BaseException:
            inode.opens -= 1
            self.data.settle(inode)
            raise
        return self._opened(inode, known, changed, flags, uid, gids, pid)

    def _opened(
        self, inode: Inode, known: bool, changed: bool, flags: int, uid: int, gids: frozenset[int], pid: int
    ) -> Opened:
        self.ensure_file(inode)
        # A look-up may have noticed a change before, and the kernel's pages may not be gone yet.
        self.opened(inode)
        told = inode.changes == inode.changes_told
        inode.changes_told = inode.changes
        return Opened(self._new_handle(inode, flags, uid, gids, pid), known and told, changed or not told)

    def open_created(
        self, inode: Inode, fd: int, flags: int, uid: int, gids: frozenset[int] = NO_GROUPS, pid: int = 0
    ) -> Opened:
        """A handle on a file just created, with the descriptor it was created with."""
        inode.opens += 1
        inode.made = True
        self.data.created(inode, fd)
        self.ensure_file(inode)
        self.opened(inode)
        return Opened(self._new_handle(inode, flags, uid, gids, pid), True, False)

    def ensure_file(self, inode: Inode) -> CachedFile:
        """The cached file of an inode, new if there is none."""
        if inode.file is None:
            inode.file = self.cache.add_file(FileSource(inode, self.data), inode.st.st_size)
            inode.signature = signature_of(inode.st)
        return inode.file

    def _new_handle(self, inode: Inode, flags: int, uid: int, gids: frozenset[int], pid: int) -> int:
        self._last_handle += 1
        program = name_of(pid)
        handle = self.handles[self._last_handle] = Handle(inode, flags, uid, gids, self.cache.accounts.open(program, uid))
        self.advise(handle, program)
        self.handed(handle)
        return self._last_handle

    async def flush(self, number: int) -> None:
        """close(2): on a backing far away the data goes there now, unless the journal is to be enough.

        Errors are reported to who could write: `cat` has nothing to do with what became of somebody else's data.
        """
        handle = self.handles[number]
        if self.io.backing.blocking and self.keeper.synced is None and handle.writable and handle.inode.unwritten:
            await self.io.ask(self._write_out, handle.inode)
        if handle.writable:
            self._report(handle)

    def release_now(self, number: int) -> bool:
        """The same in plain code; False, and nothing done, where it may have to wait."""
        inode = self.handles[number].inode
        if inode.unwritten and inode.opens == 1 and len(self.writeback.dirty) > DIRTY_CLOSED_MAX // 2:
            return False
        self._released(self.handles.pop(number))
        return True

    async def release(self, number: int) -> None:
        inode = self.handles[number].inode
        self._released(self.handles.pop(number))
        if inode.opens or not inode.unwritten:
            return
        closed = len(self.writeback.dirty) - len(self.handles)
        if closed > DIRTY_CLOSED_MAX // 2:
            self.writeback.write_soon()  # side by side, while programs go on
        if closed > DIRTY_CLOSED_MAX:
            with contextlib.suppress(Unreachable):
                await self.io.ask(self._write_out, next(iter(self.writeback.dirty)))

    def _released(self, handle: Handle) -> None:
        self.cache.accounts.close(handle.account)
        inode = handle.inode
        inode.opens -= 1
        if handle.readahead.transient and inode.file is not None:
            drop_transient(self.cache, inode.file, unread_too=True)
        if inode.opens:
            return
        if inode.unlinked and inode.file is not None:
            leaving.discard(self.cache, inode.file)
        self.data.settle(inode)

    async def _write_out(self, inode: Inode) -> None:
        """Flushes; what goes wrong is remembered on the inode, for each handle to report."""
        try:
            await self.writeback.flush(inode)
        except OSError:
            return

    def _report(self, handle: Handle) -> None:
        """Raises an error of writeback that this handle has not reported yet."""
        inode = handle.inode
        if handle.errors_seen != inode.error_count:
            handle.errors_seen = inode.error_count
            raise OSError(inode.error_errno, os.strerror(inode.error_errno))

    # --- data ----------------------------------------------------------------------------------------------------------

    def read_now(self, number: int, offset: int, size: int) -> memoryview | bytes | None:
        """The bytes there are in [offset, offset + size) if all are in the cache; None, and nothing is changed, if not.

        The view is good until the next await. What is to be fetched ahead then is `ahead`, for after the reply.
        """
        handle = self.handles[number]
        file: CachedFile = handle.inode.file  # type: ignore[assignment]  # a handle's inode has a file
        view = self.cache.lookup(file, offset, size, handle.last_page, handle.account)
        if view is not None:
            first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
            handle.last_page = last
            window = handle.readahead.on_read(first, last - first + 1, False, file.end_page, self.window_pages)
            if window is not None:
                self.ahead = (file, window)
        return view

    async def read(self, number: int, offset: int, size: int) -> memoryview | bytes:
        """The bytes there are in [offset, offset + size). The view is good until the next await."""
        view = self.read_now(number, offset, size)
        if view is not None:
            if self.ahead is not None:
                self.filler.nursery.start_soon(self._prefetch_soon, self.ahead)
                self.ahead = None
            return view
        handle = self.handles[number]
        file: CachedFile = handle.inode.file  # type: ignore[assignment]
        first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
        window = handle.readahead.on_read(first, last - first + 1, True, file.end_page, self.window_pages)
        transient = handle.readahead.transient
        if transient:
            drop_transient(self.cache, file, first, handle.last_page + 1)
        handle.last_page = last
        view = await self.filler.read(file, offset, size, window, handle.account, transient)
        self._measure()
        return view

    def prefetch(self) -> None:
        """Starts what is `ahead`. After the reply: to make room could take the pages from under the view."""
        if self.ahead is not None:
            (file, window), self.ahead = self.ahead, None
            if window.transient:
                drop_transient(self.cache, file)
            self.filler.prefetch(file, window)
            self._measure()

    async def _prefetch_soon(self, ahead: tuple[CachedFile, Window]) -> None:
        self.ahead = ahead
        self.prefetch()

    @property
    def readahead_max_pages(self) -> int:
        """The largest window: none may push out what the one before it brought."""
        return min(self._readahead_max_bytes >> PAGE_SHIFT, self.cache.capacity_pages // 8)

    def _measure(self) -> None:
        if self._readahead_max_bytes:
            self.window_pages = self.io.speed.window_pages(self.readahead_max_pages)

    async def write(self, number: int, offset: int, data: bytes | memoryview) -> int:
        """Copies `data` into the cache; it is dirty, and acknowledged, when this returns. Only part of it on a full backing."""
        handle = self.handles[number]
        inode, file = handle.inode, handle.inode.file
        if file is None or not data:
            return 0
        if not self.space.has_room(offset, len(data), file.size, not handle.uid):
            data = data[: await self.io.ask(self.space.admit, inode, offset, len(data), file.size, not handle.uid)]
        if handle.uid and inode.st.st_mode & SET_ID:
            await self.io.ask(self.kill_set_id, inode, handle.gids)
        if offset + len(data) > EXTEND_AT_ONCE_BYTES and offset + len(data) > inode.st.st_size:
            await self.io.ask(self._extend, inode, offset + len(data))
        if self.writeback.must_throttle(len(data)):
            with self.io.watchdog.patience():
                await self.writeback.throttle(len(data))
        safe = True

        def dirtied(at: int, nbytes: int) -> None:
            nonlocal safe
            safe = self._wrote(inode, at, nbytes) and safe

        await self.filler.write(file, offset, data, dirtied, handle.account, handle.readahead.transient)
        if not safe:
            await self.io.ask(self.writeback.flush, inode)
        if handle.synchronous:
            await self.io.ask(self.fsync, number, True)
        return len(data)

    def write_now(self, number: int, offset: int, data: memoryview) -> bool:
        """`write` in plain code. False where it may have to wait: then all of it is to be written again."""
        handle = self.handles[number]
        inode, nbytes = handle.inode, len(data)
        file: CachedFile = inode.file  # type: ignore[assignment]  # a handle's inode has a file
        if (
            not 0 < nbytes <= self.filler.piece_bytes - offset % PAGE_SIZE
            or offset + nbytes > EXTEND_AT_ONCE_BYTES
            or handle.synchronous
            or (handle.uid and inode.st.st_mode & SET_ID)
            or self.writeback.must_throttle(nbytes)
            or not self.space.has_room(offset, nbytes, file.size, not handle.uid)
            or not self.cache.write_now(file, offset, data, handle.account, handle.readahead.transient)
        ):
            return False
        return self._wrote(inode, offset, nbytes)

    def _wrote(self, inode: Inode, offset: int, nbytes: int) -> bool:
        """The cache has these bytes. False: they have to go to the backing before they are acknowledged."""
        now = now_ns(inode)
        inode.mtime_ns, inode.ctime_shown = now, (inode.ctime_shown[0], now)
        inode.epoch += 1
        self.writeback.note(inode)
        return self.keeper.wrote(inode, offset, nbytes)

    async def _extend(self, inode: Inode, size: int) -> None:
        async with inode.lock:
            if size > inode.st.st_size:  # else somebody has gone further while we waited
                await self._truncate_backing(inode, max(size, inode.file.size if inode.file else 0))

    async def truncate(self, inode: Inode, size: int, uid: int, gids: frozenset[int]) -> None:
        async with inode.lock:
            await self.truncate_locked(inode, size)
        if uid and inode.st.st_mode & SET_ID:
            await self.kill_set_id(inode, gids)

    async def truncate_locked(self, inode: Inode, size: int) -> None:
        """Cuts or grows the file, the backing's at once. Under `inode.lock`, so nothing of it is in writeback."""
        if inode.atime_ns is not None:  # nothing unwritten may be left that it could go with
            await self.descriptors.at("utime", inode, self.io.backing.utime, inode.atime_ns, None)
            inode.atime_ns = None
        await self._truncate_backing(inode, size)
        if inode.file is not None:
            inode.mtime_ns = inode.st.st_mtime_ns
            inode.ctime_shown = (inode.ctime_shown[0], inode.st.st_ctime_ns)
            self.keeper.changed(inode)

    async def _truncate_backing(self, inode: Inode, size: int) -> None:
        await self.notice_locked(inode)
        backing = self.io.backing
        self.keeper.cut(inode, size)
        inode.busy += 1
        try:
            if inode.writer >= 0:
                await self.io.call("truncate", backing.truncate, inode.writer, size)
            else:
                await self.descriptors.at("truncate", inode, backing.truncate, size)
        except BaseException:
            self.keeper.cut_failed(inode)
            raise
        finally:
            inode.busy -= 1
        if inode.file is not None:  # at once: the backing has it, whatever becomes of the look at its attributes
            leaving.truncate(self.cache, inode.file, size)
            inode.done += 1
            self.keeper.cut_done(inode, size)
        await self.readopt(inode, contents=True, st_size=size, st_mtime_ns=now_ns(inode))

    async def kill_set_id(self, inode: Inode, gids: frozenset[int]) -> None:
        """A write or truncate by somebody who is not root takes set-user-id away, and set-group-id as well.

        Not from a file that is no program if the writer is in its group (setattr_should_drop_sgid in the kernel's fs/attr.c).
        """
        mode = inode.st.st_mode
        drop = mode & stat.S_ISUID
        if mode & stat.S_IXGRP or inode.st.st_gid not in gids:
            drop |= mode & stat.S_ISGID
        if drop:
            await self.descriptors.at("chmod", inode, self.io.backing.chmod, stat.S_IMODE(mode & ~drop))
            await self.readopt(inode, st_mode=mode & ~drop)

    async def fsync(self, number: int, datasync: bool) -> None:
        """Everything written to the file so far is on the backing, and durable there, when this returns without error."""
        handle = self.handles[number]
        inode = handle.inode
        # A file without a name is not looked for after a power cut, but its name may come back with it.
        on_the_backing = self.keeper.synced is None or inode.unlinked
        if on_the_backing:
            await self._write_out(inode)
        self._report(handle)
        try:
            if on_the_backing:
                await self.make_durable(inode, datasync)
                await self.keeper.unsync(inode)
            else:
                await self.keep_durable(inode, datasync)
        except OSError:
            handle.errors_seen = inode.error_count
            raise

    async def keep_durable(self, inode: Inode, datasync: bool = False) -> None:
        """What has been written to a file is durable when this returns without error: on the backing, or in the journal.

        The journal is enough for what is in it, and the backing has to have the rest before that is said there.
        """
        while True:
            if inode.unsynced:
                await self.make_durable(inode, datasync)
            if await self.keeper.sync(inode):
                return

    async def make_durable(self, inode: Inode, datasync: bool = False) -> None:
        """What has been written back of a file is durable on the backing when this returns without error."""
        self.data.unsynced.pop(inode, None)  # what is written from now on is not this call's
        inode.busy += 1
        try:
            await self.data.renew(inode)
            fd = inode.writer if inode.writer >= 0 else await self.data.reader(inode)
            done = inode.done
            await self.io.in_thread("fsync", self.io.backing.fsync, fd, datasync)
            inode.durable = max(inode.durable, done)
        except BaseException as error:
            inode.done += 1  # whatever another call meanwhile may have covered: it is asked for again
            if self.io.backing.blocking:
                self.data.unsynced[inode] = None
            if isinstance(error, OSError):  # the backing tells each descriptor once, and all handles share ours
                self.data.doubt(inode, error)
                inode.error_count += 1
                inode.error_errno = error.errno or errno.EIO
            raise
        finally:
            inode.busy -= 1
            self.data.settle(inode)

    async def discard_unwritten(self, inode: Inode) -> int:
        """Gives up what is dirty of one file, which then shows what the backing has; returns how many bytes were given up.

        The lock keeps writeback and truncate out, so nothing of it is being written. Open handles stay.
        """
        async with inode.lock:
            try:
                st = await self._stat(inode)
            except OSError:  # it cannot even be looked at: what it was when it could
                st = inode.st
            # From here on nothing waits: programs see the file change at once.
            file = inode.file
            if file is None or not file.dirty_pages:
                return 0
            given_up = leaving.give_up(self.cache, file)
            inode.atime_ns = None
            self.keeper.forget(inode)
            if signature_of(st) != inode.signature:
                leaving.invalidate(self.cache, file)
            leaving.truncate(self.cache, file, st.st_size)
            self.adopt(inode, st, contents=True)
            inode.mtime_ns = st.st_mtime_ns
            inode.ctime_shown = (st.st_ctime_ns, now_ns(inode))  # for whoever compares: the contents have changed, now
            inode.changes += 1
            self.changed(inode)
            self.writeback.given_up(inode)
            return given_up

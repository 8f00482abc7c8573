"""Open files: read, write, fsync and close, between programs and the page cache.

A hit goes `read` -> `PageCache.lookup` and back with no await that could give the turn to somebody else.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from cachefs.attributes import AttributeCache, now_ns
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
from cachefs.durability import Durability
from cachefs.handle import Handle
from cachefs.inode import Inode, signature_of
from cachefs.keeper import Keeper
from cachefs.process import name_of
from cachefs.setattr import SET_ID, AttributeSetter
from cachefs.source import DataDescriptors, FileSource
from cachefs.space import Space
from cachefs.watchdog import Unreachable
from cachefs.writeback import Writeback
from cachefs.writethrough import WriteThrough

EXTEND_AT_ONCE_BYTES = 1 << 40  # a write that ends beyond this finds out now whether the backing can hold such a file
DIRTY_CLOSED_MAX = 2048  # files closed but not written out yet; each keeps a descriptor
NO_GROUPS: frozenset[int] = frozenset()


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
        write_through: bool = False,
    ) -> None:
        self.io = io
        self.descriptors = descriptors
        self.cache = cache
        self.filler = filler
        self.writeback = writeback
        self.keeper = keeper
        self.data = DataDescriptors(io, descriptors)
        self.space = Space(io, descriptors, writeback)
        self.attributes = AttributeCache(io, descriptors, self.data, cache, keeper, metadata_ttl_seconds, changed)
        self.conflicts = Conflicts(io, descriptors, self.data, self.attributes.noticed, gone)
        self.attributes.keep_theirs = self.conflicts.keep_theirs
        self.data.keep_theirs = self._keep_theirs
        self.data.keep_ours = self._keep_ours
        self.data.looked = self.attributes.absorb
        self.setter = AttributeSetter(io, descriptors, cache, writeback, keeper, self.attributes)
        self.durability = Durability(io, self.data, cache, writeback, keeper, self.attributes)
        self.through = WriteThrough(io, self.data, cache, keeper, self.attributes, write_through)
        self.opened: Callable[[Inode], None] = lambda inode: None
        self.handles: dict[int, Handle] = {}
        self.advise: Callable[[Handle, str], None] = lambda handle, program: None  # told of new handles, and whose they are
        self.handed: Callable[[Handle], None] = lambda handle: None  # the same, when it is known how they will be used
        self.ahead: tuple[CachedFile, Window] | None = None  # what the hit that is being answered asks for
        self._last_handle = 0
        self._readahead_max_bytes = readahead_max_bytes
        self.window_pages = 0
        self._measure()

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
            self.attributes.refresh_now(inode)
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
            if not self.attributes.believed(inode):
                await self.attributes.refresh(inode)
            changed = before != signature_of(inode.st)
            self.ensure_file(inode)
            if flags & os.O_TRUNC:
                await self.setter.truncate(inode, 0, uid, gids)
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

        It is not for a file without a name that may have another one, see `links.py`. Errors are reported to who could
        write: `cat` has nothing to do with what became of somebody else's data.
        """
        handle = self.handles[number]
        inode = handle.inode
        enough = self.keeper.synced is not None and (inode.made or not inode.unlinked)  # the journal
        if self.io.backing.blocking and handle.writable and inode.unwritten and not enough:
            await self.io.ask(self.durability.write_out, inode)
        if handle.writable:
            self.durability.report(handle)

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
                await self.io.ask(self.durability.write_out, next(iter(self.writeback.dirty)))

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

    # --- data ----------------------------------------------------------------------------------------------------------

    def read_now(self, number: int, offset: int, size: int) -> memoryview | bytes | None:
        """The bytes there are in [offset, offset + size) if all are in the cache; None, and nothing is changed, if not.

        The view is good until the next await. What is to be fetched ahead then is `ahead`, for after the reply.
        """
        handle = self.handles[number]
        file: CachedFile = handle.inode.file  # type: ignore[assignment]  # a handle's inode has a file
        view = self.cache.lookup(file, offset, size, handle.last_page, handle.account)
        if view is not None:
            first, handle.last_page = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
            stop = handle.last_page + 1
            if handle.readahead.is_event(first, stop):
                window = handle.readahead.on_read(first, stop - first, False, file.end_page, self.window_pages)
                if window is not None:
                    self.ahead = (file, window)
        return view

    async def read(self, number: int, offset: int, size: int) -> memoryview | bytes:
        """The bytes there are in [offset, offset + size). The view is good until the next await."""
        view = self.read_now(number, offset, size)
        if view is not None:
            if self.ahead is not None:
                self.filler.nursery.start_soon(self._prefetch_soon, *self.ahead)
                self.ahead = None
            return view
        handle = self.handles[number]
        file: CachedFile = handle.inode.file  # type: ignore[assignment]
        first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
        window = handle.readahead.on_read(first, last - first + 1, True, file.end_page, self.window_pages)
        transient = handle.readahead.transient
        if transient:
            drop_transient(self.cache, file, first, last + 1)
        handle.last_page = last
        view = await self.filler.read(file, offset, size, window, handle.account, transient)
        self._measure()
        return view

    def prefetch(self) -> None:
        """Starts what is `ahead`. After the reply: to make room could take the pages from under the view."""
        if self.ahead is not None:
            (file, window), self.ahead = self.ahead, None
            self._prefetch(file, window)

    async def _prefetch_soon(self, file: CachedFile, window: Window) -> None:
        self._prefetch(file, window)

    def _prefetch(self, file: CachedFile, window: Window) -> None:
        if window.transient:
            drop_transient(self.cache, file)
        self.filler.prefetch(file, window)
        self._measure()

    @property
    def readahead_max_pages(self) -> int:
        """The largest window: none may push out what the one before it brought."""
        return min(self._readahead_max_bytes >> PAGE_SHIFT, self.cache.capacity_pages // 8)

    def _measure(self) -> None:
        if self._readahead_max_bytes:
            self.window_pages = self.io.speed.window_pages(self.readahead_max_pages)

    def place(self, number: int, offset: int) -> int:
        """Where a write(2) through O_APPEND belongs: at the end, which others may have moved since the kernel looked."""
        inode = self.handles[number].inode
        file = inode.file
        if file is None or offset >= file.size:
            return offset
        self.attributes.changed(inode)  # the kernel knows an old size, and may keep what is written as pages of another place
        return file.size

    async def write(self, number: int, offset: int, data: bytes | memoryview) -> int:
        """Copies `data` into the cache; it is dirty, and acknowledged, when this returns. Only part of it on a full backing."""
        handle = self.handles[number]
        inode, file = handle.inode, handle.inode.file
        if file is None or not data:
            return 0
        if not self.space.has_room(offset, len(data), file.size, not handle.uid):
            data = data[: await self.io.ask(self.space.admit, inode, offset, len(data), file.size, not handle.uid)]
        if handle.uid and inode.st.st_mode & SET_ID:
            await self.io.ask(self.setter.kill_set_id, inode, handle.gids)
        if offset + len(data) > EXTEND_AT_ONCE_BYTES and offset + len(data) > inode.st.st_size:
            await self.io.ask(self.setter.extend, inode, offset + len(data))
        if not self.through.write(handle, offset, memoryview(data)):
            await self._write_dirty(handle, inode, file, offset, data)
        if handle.synchronous:
            await self.io.ask(self.durability.fsync, handle, True)
        return len(data)

    async def _write_dirty(
        self, handle: Handle, inode: Inode, file: CachedFile, offset: int, data: bytes | memoryview
    ) -> None:
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

    def write_now(self, number: int, offset: int, data: memoryview) -> bool:
        """`write` in plain code. False where it may have to wait: then all of it is to be written again."""
        handle = self.handles[number]
        inode, nbytes = handle.inode, len(data)
        file: CachedFile = inode.file  # type: ignore[assignment]  # a handle's inode has a file
        in_page = offset % PAGE_SIZE
        if (
            not nbytes
            or (in_page + nbytes > PAGE_SIZE and nbytes > self.filler.piece_bytes - in_page)
            or offset + nbytes > EXTEND_AT_ONCE_BYTES
            or handle.synchronous
            or self.keeper.failing
            or (handle.uid and inode.st.st_mode & SET_ID)
            or self.writeback.must_throttle(nbytes)
            or not self.space.has_room(offset, nbytes, file.size, not handle.uid)
        ):
            return False
        if self.through.write(handle, offset, data):
            return True
        if handle.appends and offset < file.size:  # not where it belongs, see `place`
            return False
        if not self.cache.write_now(file, offset, data, handle.account, handle.readahead.transient):
            return False
        if self._wrote(inode, offset, nbytes):
            return True
        handle.account.write_bytes -= nbytes  # it is counted again
        self.keeper.written_through -= 1
        return False

    def _wrote(self, inode: Inode, offset: int, nbytes: int) -> bool:
        """The cache has these bytes. False: they have to go to the backing before they are acknowledged."""
        now = now_ns(inode)
        inode.mtime_ns, inode.ctime_shown = now, (inode.ctime_shown[0], now)
        inode.epoch += 1
        inode.through = 0  # for when it is clean again
        self.writeback.note(inode)
        return self.keeper.wrote(inode, offset, nbytes)

    async def fsync(self, number: int, datasync: bool) -> None:
        """Everything written to the file so far is durable when this returns without error."""
        await self.durability.fsync(self.handles[number], datasync)

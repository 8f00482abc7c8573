"""What becomes of a file's unwritten data when somebody asks: written out, made durable, or given up; and who hears of errors."""

import errno
import os

from cachefs.attributes import AttributeCache, now_ns
from cachefs.backingio import BackingIO
from cachefs.cache import leaving
from cachefs.cache.pagecache import PageCache
from cachefs.handle import Handle
from cachefs.inode import Inode, signature_of
from cachefs.keeper import Keeper
from cachefs.source import DataDescriptors
from cachefs.writeback import Writeback


class Durability:
    """Brings files to the backing and makes them durable, there or in the journal."""

    def __init__(
        self,
        io: BackingIO,
        data: DataDescriptors,
        cache: PageCache,
        writeback: Writeback,
        keeper: Keeper,
        attributes: AttributeCache,
    ) -> None:
        self.io = io
        self.data = data
        self.cache = cache
        self.writeback = writeback
        self.keeper = keeper
        self.attributes = attributes

    async def write_out(self, inode: Inode) -> None:
        """Flushes; what goes wrong is remembered on the inode, for each handle to report."""
        try:
            await self.writeback.flush(inode)
        except OSError:
            return

    def report(self, handle: Handle) -> None:
        """Raises an error of writeback that this handle has not reported yet."""
        inode = handle.inode
        if handle.errors_seen != inode.error_count:
            handle.errors_seen = inode.error_count
            raise OSError(inode.error_errno, os.strerror(inode.error_errno))

    async def fsync(self, handle: Handle, datasync: bool) -> None:
        """Everything written to the file so far is on the backing, and durable there, when this returns without error."""
        inode = handle.inode
        # A file without a name is not looked for after a power cut, but its name may come back with it.
        on_the_backing = self.keeper.synced is None or inode.unlinked
        if on_the_backing:
            await self.write_out(inode)
        self.report(handle)
        try:
            if on_the_backing:
                await self.make_durable(inode, datasync)
                await self.keeper.unsync(inode)
                inode.through = 0  # what is synced after each few writes gains nothing from waiting
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
            await self.io.fsync(fd, datasync)
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
                st = await self.attributes.look(inode)
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
            self.attributes.adopt(inode, st, contents=True)
            inode.mtime_ns = st.st_mtime_ns
            inode.ctime_shown = (st.st_ctime_ns, now_ns(inode))  # for whoever compares: the contents have changed, now
            inode.changes += 1
            self.attributes.changed(inode)
            self.writeback.given_up(inode)
            return given_up

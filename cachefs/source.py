"""File data between cache and backing: the descriptors it goes through, and times that writeback must not change."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence

from backing.base import Backing
from cachefs.backingio import BackingIO, write_fully
from cachefs.descriptors import Descriptors
from cachefs.inode import Inode, signature_of

START_SYNC_BYTES = 1 << 20  # extents from this size on go to the disk at once, or all of a long write would be left to fsync

Extents = Sequence[tuple[int, list[memoryview]]]


class DataDescriptors:
    """Opens and closes the descriptors that carry file data: at most a reader and a writer an inode, often one for both.

    They stay open while the file is open, has unwritten data (so that it can be written whatever happens to its name) or
    has calls under way.
    """

    def __init__(self, io: BackingIO, descriptors: Descriptors) -> None:
        self.io = io
        self.descriptors = descriptors
        self.noticed: Callable[[Inode], None] = lambda inode: None  # told of files that somebody else has changed
        self.count = 0

    async def reader(self, inode: Inode) -> int:
        if inode.reader < 0:
            self._keep(inode, await self._open(inode, os.O_RDONLY), True, False)
        return inode.reader

    async def writer(self, inode: Inode) -> int:
        if inode.writer < 0:
            try:
                self._keep(inode, await self._open(inode, os.O_RDWR), True, True)
            except PermissionError:  # not root, and the file may be written but not read
                self._keep(inode, await self._open(inode, os.O_WRONLY), False, True)
        return inode.writer

    def created(self, inode: Inode, fd: int) -> None:
        """Takes over the descriptor, open for reading and writing, that the file was created with."""
        self._keep(inode, fd, True, True)
        self.count += 1

    def settle(self, inode: Inode) -> None:
        """Closes what is not needed any more."""
        if inode.opens or inode.busy or inode.unwritten or inode.reader == inode.writer == -1:
            return
        fds = {inode.reader, inode.writer} - {-1}
        inode.reader = inode.writer = -1
        for fd in fds:
            self._close(fd)

    async def _open(self, inode: Inode, flags: int) -> int:
        fd = -1
        if inode.fd < 0:
            fd = await self._open_by_name(inode, flags)
        if fd < 0:
            fd = await self.descriptors.at("open", inode, self.io.backing.reopen, flags)
        self.count += 1
        return fd

    async def _open_by_name(self, inode: Inode, flags: int) -> int:
        """One call instead of two where the first name is still right; -1 where it is not."""
        for parent, name in inode.names:
            try:
                fd, st = await self.descriptors.at("open", parent, self.io.backing.open_stat, name, flags)
            except PermissionError:
                raise
            except OSError:
                break
            if (st.st_dev, st.st_ino) == inode.key and stat.S_ISREG(st.st_mode):
                return fd
            self.io.backing.close(fd)
            break
        return -1

    def _keep(self, inode: Inode, fd: int, readable: bool, writable: bool) -> None:
        """Makes `fd` the inode's reader, writer or both, where it has none."""
        kept = False
        if writable and inode.writer < 0:
            inode.writer, kept = fd, True
        if readable and inode.reader < 0:
            inode.reader, kept = fd, True
        if not kept:
            self._close(fd)

    def _close(self, fd: int) -> None:
        self.count -= 1
        self.io.backing.close(fd)


class FileSource:
    """The backing's side of one cached file, as `cachefs.cache.file.Source` has it."""

    __slots__ = ("data", "inode")

    def __init__(self, inode: Inode, data: DataDescriptors) -> None:
        self.inode = inode
        self.data = data

    def read_now(self, buffers: Sequence[memoryview], offset: int) -> int:
        io, fd = self.data.io, self.inode.reader
        if io.backing.blocking or fd < 0:
            raise BlockingIOError
        return io.read_now(fd, list(buffers), offset)

    async def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        inode = self.inode
        inode.busy += 1
        try:
            fd = await self.data.reader(inode)
            assert inode.file is not None
            return await self.data.io.read(fd, list(buffers), offset, inode.file.size - offset)
        finally:
            inode.busy -= 1
            self.data.settle(inode)

    async def write(self, extents: Extents) -> tuple[int, OSError | None]:
        """Writes, restores the mtime that programs see, and notes what the backing shows now. Under `inode.lock`."""
        inode, io, seen = self.inode, self.data.io, self.inode.st
        inode.busy += 1
        try:
            fd = await self.data.writer(inode)
            done, error, before, st = await io.in_thread("write", write_extents, io.backing, fd, extents, inode.mtime_ns)
            if st is not None and inode.st is not seen:  # a rename or the like of ours has read them after the thread did
                st = await io.call("stat", io.backing.fstat, fd)
        except OSError as problem:
            return 0, problem
        finally:
            inode.busy -= 1
        if before is not None and signature_of(before)[:2] != inode.signature[:2] and inode.st is seen:
            self.data.noticed(inode)  # somebody else's change, which ours would hide
        if st is not None:
            inode.ctime_shown = (st.st_ctime_ns, inode.attributes().ctime_ns)  # what was shown goes on being shown
            inode.st = st
            inode.signature = signature_of(st)
            inode.epoch += 1
            inode.unsynced = True
        return done, error


def write_extents(
    backing: Backing, fd: int, extents: Extents, mtime_ns: int
) -> tuple[int, OSError | None, os.stat_result | None, os.stat_result | None]:
    """Runs in the writeback thread: (extents written, what stopped it, attributes before, attributes afterwards)."""
    done, problem, before = 0, None, None
    try:
        before = backing.fstat(fd)
        for offset, buffers in extents:
            write_fully(backing, fd, buffers, offset)
            done += 1
            size = sum(len(buffer) for buffer in buffers)
            if size >= START_SYNC_BYTES and not backing.blocking:
                backing.start_sync(fd, offset, size)
    except OSError as error:
        problem = error if error.errno else OSError(errno.EIO, str(error))
    try:
        with contextlib.suppress(PermissionError):  # not root, and somebody else's file that we may write
            backing.utime(fd, None, mtime_ns)
        return done, problem, before, backing.fstat(fd)
    except OSError as error:
        return done, problem or error, before, None

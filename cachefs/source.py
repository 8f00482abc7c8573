"""File data between cache and backing: the descriptors it goes through, and times that writeback must not change."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from backing.base import Backing
from cachefs.backingio import BackingIO, write_fully
from cachefs.descriptors import Descriptors
from cachefs.inode import Inode, signature_of
from cachefs.watchdog import GONE, getting_on

READS_MAX = 3  # of a range that comes back short although the file goes on
LEASE_PATIENCE_SECONDS = 0.03  # for somebody who has the file open in SOURCE: most are done by then
CONFLICTS_IN_A_ROW = 3  # versions of others that are kept before a batch gives up and is tried again later
AT_ONCE_BYTES, AT_ONCE_EXTENTS = 64 << 10, 16  # a batch of no more goes to a local file with no thread, which would cost more
# What takes that long is a wait for a disk, and hits wait with it: for a fiftieth of the time at most, and for so many seconds
# before that counts. Beyond that all goes to threads.
SLOW_SECONDS, CAREFUL_TIMES, PATIENCE_SECONDS = 0.002, 50, 0.01
START_SYNC_BYTES = 1 << 20  # extents from this size on go to the disk at once, or all of a long write would be left to fsync
DEAD = GONE | {errno.EIO, errno.EBADF, errno.ESTALE}  # what descriptors of a lost connection give

Extents = Sequence[tuple[int, list[memoryview]]]


class DataDescriptors:
    """Opens and closes the descriptors that carry file data: at most a reader and a writer an inode, often one for both.

    They stay open while the file is open, has unwritten data (so that it can be written whatever happens to its name) or
    has calls under way.
    """

    def __init__(self, io: BackingIO, descriptors: Descriptors) -> None:
        self.io = io
        self.descriptors = descriptors
        self.unsynced: dict[Inode, None] = {}  # files far away that were written to since their last fsync, as far as known
        self.looked: Callable[[Inode, os.stat_result], None]  # told of attributes that came with a descriptor
        # How both versions of a file are kept, see `cachefs.conflicts`.
        self.keep_theirs: Callable[[Inode], Awaitable[object]]
        self.keep_ours: Callable[[Inode], Awaitable[object]]
        self.count = 0
        self.at_once_bytes = AT_ONCE_BYTES
        self._careful_until = 0.0

    def writes_at_once(self, extents: Extents) -> bool:
        """Whether a batch is written in the trio thread, as other changes of a local file are."""
        return len(extents) <= AT_ONCE_EXTENTS and self.takes_at_once(sum(len(b) for _, buffers in extents for b in buffers))

    def takes_at_once(self, nbytes: int) -> bool:
        """Whether so much may be written to a file in the trio thread: it is local, and has not been slow lately."""
        return nbytes <= self.at_once_bytes and not self.io.backing.blocking and time.perf_counter() >= self._careful_until

    def took(self, seconds: float) -> None:
        """How long such a batch was under way."""
        if seconds > SLOW_SECONDS:  # a leaky bucket, kept as the time at which it is empty
            forgiven = time.perf_counter() - CAREFUL_TIMES * PATIENCE_SECONDS
            self._careful_until = max(self._careful_until, forgiven) + CAREFUL_TIMES * seconds

    async def reader(self, inode: Inode) -> int:
        if inode.reader < 0:
            self._keep(inode, await self._open(inode, os.O_RDONLY), True, False)
        return inode.reader

    def reader_now(self, inode: Inode) -> bool:
        """Opens a reader by the first name of a local file, in plain code; False, and nothing done, where that is not it."""
        for parent, name in inode.names:
            if parent.fd < 0 or inode.fd >= 0:
                break
            fd, st = self.io.call_now("open", self.io.backing.open_stat, parent.fd, name, os.O_RDONLY)
            if (st.st_dev, st.st_ino) != inode.key or not stat.S_ISREG(st.st_mode):
                self.io.close(fd)
                break
            self.looked(inode, st)
            self.count += 1
            self._keep(inode, fd, True, False)
            return True
        return False

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

    def doubt(self, inode: Inode, error: OSError) -> None:
        """Something went wrong with a descriptor: it may be one of a connection that is lost, and never work again."""
        if self.io.backing.blocking and error.errno in DEAD:
            inode.doubtful = True

    async def renew(self, inode: Inode) -> None:
        """Opens doubtful descriptors anew, by a caller that is counted in `inode.busy`: while others use them, they stay.

        They stay as well if that cannot be: the file may have no name any more.
        """
        if not inode.doubtful or inode.busy > 1:
            return
        reader, writer = inode.reader, inode.writer
        inode.reader = inode.writer = -1
        try:
            if writer >= 0:
                await self.writer(inode)
            else:
                await self.reader(inode)
            inode.doubtful = False
        except OSError:
            return
        finally:  # those that are needed no more are closed
            for fd in {reader, writer} - {-1}:
                self._keep(inode, fd, fd == reader, fd == writer)

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
            if stat.S_ISREG(st.st_mode) and self.descriptors.is_it(inode, st):
                if (st.st_dev, st.st_ino) == inode.key:
                    self.looked(inode, st)
                return fd
            self.io.close(fd)
            break
        return -1

    def _keep(self, inode: Inode, fd: int, readable: bool, writable: bool) -> None:
        """Makes `fd` the inode's reader, writer or both, where it has none."""
        kept = False
        if writable and inode.writer < 0:
            inode.writer, kept = fd, True
            if readable and inode.reader >= 0 and not inode.busy and not self.io.backing.blocking:
                self._close(inode.reader)  # a second one of ours would be in the way of leases
                inode.reader = -1
        if readable and inode.reader < 0:
            inode.reader, kept = fd, True
        if not kept:
            self._close(fd)

    def _close(self, fd: int) -> None:
        self.count -= 1
        self.io.close(fd)


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
            await self.data.renew(inode)
            fd = await self.data.reader(inode)
            assert inode.file is not None
            for _ in range(READS_MAX):
                wanted = offset + min(sum(map(len, buffers)), inode.st.st_size - offset)
                nbytes = await self.data.io.read(fd, list(buffers), offset, inode.file.size - offset)
                if not self.data.io.backing.blocking or await self._ends(fd, offset + nbytes, wanted):
                    return nbytes
            raise OSError(errno.EIO, "SOURCE gives fewer bytes than it has")
        except OSError as problem:
            self.data.doubt(inode, problem)
            raise
        finally:
            inode.busy -= 1
            self.data.settle(inode)

    async def _ends(self, fd: int, end: int, wanted: int) -> bool:
        """Whether a read that got to `end` got all there was up to `wanted`: sshfs, for one, gives less when out of touch.

        Our own writeback may have made the file longer meanwhile: then another read gets it all.
        """
        io = self.data.io
        return end >= wanted or end >= min(wanted, await io.call("stat", io.backing.size, fd))

    async def write(self, extents: Extents) -> tuple[int, OSError | None]:
        """Writes, restores the mtime that programs see, and notes what the backing shows now. Under `inode.lock`.

        What somebody else has changed meanwhile is kept first.
        """
        inode, io = self.inode, self.data.io
        inode.busy += 1
        try:
            await self.data.renew(inode)
            for _ in range(CONFLICTS_IN_A_ROW):
                written = await self._write(extents)
                if not written.changed:
                    break
                await self.data.keep_theirs(inode)
            if written.problem is None and not (inode.st.st_nlink or inode.unlinked or inode.losing):
                await self.data.keep_ours(inode)
        except OSError as problem:
            self.data.doubt(inode, problem)
            return 0, problem
        finally:
            inode.busy -= 1
        if io.backing.blocking:
            self.data.unsynced[inode] = None
        if written.changed:
            return 0, OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if written.problem is None:
            return written.done, None
        io.count_error(written.problem)
        self.data.doubt(inode, written.problem)
        return written.done, io.told(written.problem)

    async def _write(self, extents: Extents) -> "Written":
        inode, io, seen = self.inode, self.data.io, self.inode.st
        fd = await self.data.writer(inode)
        unsure, known = inode.unsure, None if inode.unsure or inode.unlinked else inode.signature[:2]
        inode.unsure = True
        try:
            # A reader of our own beside the writer would be in the way of a lease as any other is.
            patience_seconds = LEASE_PATIENCE_SECONDS if inode.reader in (-1, fd) else 0.0
            arguments = (io.backing, fd, extents, (inode.atime_ns, inode.mtime_ns), known)
            written = await self._write_now(arguments) if self.data.writes_at_once(extents) else None
            if written is None:
                written = await io.in_thread("write", write_extents, *arguments, patience_seconds)
        except BaseException:  # refused, or given up before its turn: nothing was begun
            inode.unsure = unsure
            raise
        finally:
            inode.done += 1  # not before: an fsync meanwhile does not cover it, and leaves its pages to the journal
        if written.st is None:
            inode.unsure = unsure or written.touched
            return written
        inode.signature, inode.unsure = (*written.signature, written.st.st_ctime_ns), False
        inode.atime_ns = None
        if inode.st is seen:
            st = written.st
        else:  # a rename or the like of ours has read them after the thread did
            st = await io.call("stat", io.backing.fstat, fd)
            inode.signature = (*inode.signature[:2], st.st_ctime_ns)
        inode.ctime_shown = (st.st_ctime_ns, inode.attributes().ctime_ns)  # what was shown goes on being shown
        inode.st = st
        inode.epoch += 1
        return written

    async def _write_now(self, arguments: tuple[Any, ...]) -> "Written | None":
        start = time.perf_counter()
        try:
            return await self.data.io.call("write", write_unshared, *arguments)
        finally:
            self.data.took(time.perf_counter() - start)


class Written(NamedTuple):
    """What became of a batch."""

    done: int  # extents that were written
    problem: OSError | None  # what stopped it
    st: os.stat_result | None  # what the backing shows afterwards; None where that could not be read
    signature: tuple[int, int] = (0, 0)  # mtime and size that it shows if nobody but us has written to the file meanwhile
    touched: bool = True  # maybe something of the file is another now
    changed: bool = False  # nothing was written: somebody else has changed the file


def write_extents(
    backing: Backing,
    fd: int,
    extents: Extents,
    times_ns: tuple[int | None, int],
    known: tuple[int, int] | None,
    patience_seconds: float,
) -> Written:
    """Runs in the writeback thread. `times_ns` are the atime (None: leave it) and mtime that programs see.

    `known` are mtime and size that the backing should have; None: whatever it has.
    Where it can, it lets nobody open the file meanwhile: what others write then could not be told from ours. It waits for
    `patience_seconds` for those who have it open.
    """
    leased = backing.lease(fd, patience_seconds)
    try:
        return _write_extents(backing, fd, extents, times_ns, known)
    finally:
        if leased:
            backing.unlease(fd)


def write_unshared(
    backing: Backing, fd: int, extents: Extents, times_ns: tuple[int | None, int], known: tuple[int, int] | None
) -> Written | None:
    """The same with no thread and no waiting; None, and nothing done, where somebody else has the file open."""
    if not backing.lease(fd):
        return None
    try:
        return _write_extents(backing, fd, extents, times_ns, known)
    finally:
        backing.unlease(fd)


def _write_extents(
    backing: Backing, fd: int, extents: Extents, times_ns: tuple[int | None, int], known: tuple[int, int] | None
) -> Written:
    done, problem = 0, None
    try:
        before = backing.fstat(fd)
    except OSError as error:
        return Written(0, error, None, touched=False)
    if known is not None and signature_of(before)[:2] != known:
        return Written(0, None, None, touched=False, changed=True)
    try:
        for offset, buffers in extents:
            write_fully(backing, fd, buffers, offset)
            done += 1
            size = sum(len(buffer) for buffer in buffers)
            if size >= START_SYNC_BYTES and not backing.blocking:
                backing.start_sync(fd, offset, size)
    except OSError as error:
        problem = error if error.errno else OSError(errno.EIO, str(error))
    if done and backing.blocking:
        try:
            getting_on(sum(len(buffer) for _, buffers in extents[:done] for buffer in buffers))
            backing.flush(fd)
        except OSError as error:
            done, problem = 0, error
    restored = False
    try:
        with contextlib.suppress(PermissionError):  # not root, and somebody else's file that we may write
            backing.utime(fd, *times_ns)
            restored = True
        st = backing.fstat(fd)
    except OSError as error:
        return Written(done, problem or error, None)
    # A later mtime and a larger size are others' doing since then; an earlier mtime is ours where the store has coarser steps.
    mtime_ns = min(st.st_mtime_ns, times_ns[1]) if restored else st.st_mtime_ns
    end = max(before.st_size, extents[-1][0] + sum(map(len, extents[-1][1])))
    return Written(done, problem, st, (mtime_ns, min(st.st_size, end)))

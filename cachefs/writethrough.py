"""Small writes to a local file that go to SOURCE at once, with no dirty page, no journal and no writeback.

A file with unwritten data costs a record in the journal, which is written several times, and a batch of its own: as much as
some thirty calls that write to a local file. Most files are written by fewer, and never again. So a file's first writes go
through; who writes on has a dirty file, until it is written back. That no more than twice the cheaper way is paid, whatever a
program does, is the ski-rental bound (Karlin et al., Competitive Snoopy Caching, 1988).

A write goes through only where nothing of the file is unwritten, so that the journal and SOURCE never disagree on an order, and
only where SOURCE has fine times: others see it at once, and what they answer in the same tick of a coarse clock would look like
what we wrote.
"""

import errno
import os
from typing import NamedTuple

from backing.base import Backing
from cachefs.attributes import AttributeCache
from cachefs.backingio import BackingIO
from cachefs.cache import leaving
from cachefs.cache.file import CachedFile
from cachefs.cache.page import GROUP_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.handle import Handle
from cachefs.inode import Inode, signature_of
from cachefs.keeper import Keeper
from cachefs.source import DataDescriptors

THROUGH_MOST = 32  # writes until a file is dirty: what that costs, in calls


class WriteThrough:
    """Decides which writes go through, and does them. Not `wanted`: none do."""

    def __init__(
        self, io: BackingIO, data: DataDescriptors, cache: PageCache, keeper: Keeper, attributes: AttributeCache, wanted: bool
    ) -> None:
        self.io = io
        self.data = data
        self.cache = cache
        self.keeper = keeper
        self.attributes = attributes
        self.wanted = wanted and not io.backing.blocking
        self.written_bytes = 0
        self._fine: bool | None = None  # whether SOURCE has fine times, once looked at

    def write(self, handle: Handle, offset: int, data: memoryview) -> bool:
        """Writes to SOURCE and into the cache; False, and it is to be written to the cache as dirty, where it cannot be so."""
        inode, file = handle.inode, handle.inode.file
        if file is None or file.dirty_pages or file.writeback_pages or file.filling_pages or not self.wanted:
            return False
        if inode.through >= THROUGH_MOST or not self._may(handle, offset, len(data)):
            return False
        written = self._write(handle, data, offset)
        if written is None:
            return False
        self._take_in(inode, file, offset, data[: written.nbytes], written)
        if written.nbytes < len(data):
            return False
        inode.through += 1
        self.written_bytes += len(data)
        handle.account.write_bytes += len(data)
        return True

    def _may(self, handle: Handle, offset: int, nbytes: int) -> bool:
        """Whether such a write may, to a file of which nothing is unwritten or on its way."""
        inode = handle.inode
        return not (
            self.keeper.behind
            or inode.writer < 0
            or inode.unlinked
            or inode.losing
            or inode.unsure
            or inode.locked
            or handle.readahead.transient
            or offset // GROUP_SIZE != (offset + nbytes - 1) // GROUP_SIZE
            or not self.data.takes_at_once(nbytes)
            or not self._has_fine_times(inode)
        )

    def _has_fine_times(self, inode: Inode) -> bool:
        if self._fine is None:
            self._fine = self.io.backing.has_fine_times()
        return self._fine and inode.st.st_dev == self.data.descriptors.table.root.st.st_dev  # else another one, mounted inside

    def _write(self, handle: Handle, data: memoryview, offset: int) -> "Written | None":
        start, inode = self.cache.clock(), handle.inode
        arguments = (self.io.backing, inode.writer, data, offset, handle.appends)
        inode.unsure = True
        try:
            written = self.io.call_now("write", write_between_looks, *arguments)
        except OSError:  # it could not be looked at afterwards: what the cache has of it may be old
            self._drop(inode)
            return None
        finally:
            self.data.took(self.cache.clock() - start)
        if written is None:
            inode.unsure = False
        return written

    def _take_in(self, inode: Inode, file: CachedFile, offset: int, data: memoryview, written: "Written") -> None:
        """The backing has these bytes, and shows what is in `written`."""
        if signature_of(written.before) != inode.signature:
            self.attributes.changed_underneath(inode, file, written.before)
        self.attributes.adopt(inode, written.after, contents=True)
        inode.ctime_shown = (inode.ctime_shown[0], written.after.st_ctime_ns)
        if data:
            self.cache.write_clean(file, offset, data)
        if written.problem is not None:
            self.io.count_error(written.problem)
            self._drop(inode)

    def _drop(self, inode: Inode) -> None:
        if inode.file is not None:
            leaving.invalidate(self.cache, inode.file)


class Written(NamedTuple):
    """What became of a write, and what the backing showed before and after it."""

    nbytes: int
    problem: OSError | None
    before: os.stat_result
    after: os.stat_result


def write_between_looks(backing: Backing, fd: int, data: memoryview, offset: int, appends: bool) -> Written | None:
    """Writes while nobody else has the file open, so that what is between the two looks is ours.

    None, and nothing is written, where somebody has it open, or has removed it: what is written then is kept by writeback.
    Nothing, where it `appends` and the end is not there: the kernel does not know what others have appended.
    """
    if not backing.lease(fd):
        return None
    try:
        before = backing.fstat(fd)
        if not before.st_nlink:
            return None
        if appends and offset != before.st_size:
            return Written(0, None, before, before)
        nbytes, problem = 0, None
        try:
            nbytes = backing.pwritev(fd, [data], offset)
        except OSError as error:
            problem = error if error.errno else OSError(errno.EIO, str(error))
        return Written(nbytes, problem, before, backing.fstat(fd))
    finally:
        backing.unlease(fd)

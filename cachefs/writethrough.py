"""Small writes to a local file that go to SOURCE at once, with no dirty page, no journal and no writeback.

A file with unwritten data costs a record in the journal, which is written several times, and a batch of its own: as much as
some thirty calls that write to a local file. Most files are written by fewer, and never again. So a file's first writes go
through; who writes on has a dirty file, until it is written back. That no more than twice the cheaper way is paid, whatever a
program does, is the ski-rental bound (Karlin et al., Competitive Snoopy Caching, 1988).

A write goes through only where nothing of the file is unwritten, so that the journal and SOURCE never disagree on an order.
"""

import os
from typing import NamedTuple

from backing.base import Backing
from cachefs.attributes import AttributeCache
from cachefs.backingio import BackingIO
from cachefs.cache import leaving
from cachefs.cache.page import GROUP_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.handle import Handle
from cachefs.inode import Inode, signature_of
from cachefs.keeper import Keeper
from cachefs.source import DataDescriptors

THROUGH_MOST = 32  # writes in a row: what a dirty file costs, in calls


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
        self.wanted = wanted
        self.written_bytes = 0

    def write(self, handle: Handle, offset: int, data: memoryview) -> bool:
        """Writes to SOURCE and into the cache; False, and it is to be written to the cache as dirty, where it cannot be so."""
        inode = handle.inode
        if not self._may(inode, handle, offset, len(data)):
            return False
        inode.unsure = True
        start = self.cache.clock()
        try:
            written = self.io.call_now("write", write_unshared, self.io.backing, inode.writer, data, offset)
        except OSError:  # some of it may be there: what the cache has of the file may be old
            self._drop(inode)
            return False
        finally:
            self.data.took(self.cache.clock() - start)
        if written is None:
            inode.unsure = False
            return False
        self._take_in(inode, offset, data[: written.nbytes], written)
        if written.nbytes < len(data):
            return False
        inode.through += 1
        self.written_bytes += len(data)
        handle.account.write_bytes += len(data)
        return True

    def _may(self, inode: Inode, handle: Handle, offset: int, nbytes: int) -> bool:
        file = inode.file
        if file is None or file.dirty_pages or file.writeback_pages or file.filling_pages or not self.wanted:
            return False
        if inode.through >= THROUGH_MOST:
            inode.through = 0  # for when it is clean again
            return False
        return not (
            self.keeper.synced is not None
            or inode.writer < 0
            or inode.unlinked
            or inode.losing
            or inode.unsure
            or inode.locked
            or handle.readahead.transient
            or offset // GROUP_SIZE != (offset + nbytes - 1) // GROUP_SIZE
            or not self.data.takes_at_once(nbytes)
        )

    def _drop(self, inode: Inode) -> None:
        if inode.file is not None:
            leaving.invalidate(self.cache, inode.file)

    def _take_in(self, inode: Inode, offset: int, data: memoryview, written: "Written") -> None:
        """The backing has these bytes, and shows what is in `written`."""
        file = inode.file
        assert file is not None
        if signature_of(written.before) != inode.signature:
            self.attributes.changed_underneath(inode, file, written.before)
        self.attributes.adopt(inode, written.after, contents=True)
        self.cache.write_clean(file, offset, data)


class Written(NamedTuple):
    nbytes: int
    before: os.stat_result
    after: os.stat_result


def write_unshared(backing: Backing, fd: int, data: memoryview, offset: int) -> Written | None:
    """Writes while nobody else has the file open, so that what is between the two looks is ours.

    None, and nothing is written, where somebody has it open, or has removed it: what is written then is kept by writeback.
    """
    if not backing.lease(fd):
        return None
    try:
        before = backing.fstat(fd)
        if not before.st_nlink:
            return None
        nbytes = backing.pwritev(fd, [data], offset)
        return Written(nbytes, before, backing.fstat(fd))
    finally:
        backing.unlease(fd)

"""Whether the backing has room for what is about to be written, so that a full one is an error of write(2) and not of later.

Two things are known early. What the backing says is free (statvfs), less what is unwritten and lies behind the ends of its
files, is by how much files may grow. And a file whose writeback fails for want of room says that there is none: until it has
been written or is gone, files of its file system do not grow. In either case only what is not yet acknowledged is refused;
what is, stays dirty and is written when there is room.
"""

import errno
import os
import sys
from collections.abc import Awaitable, Callable

import trio

from cachefs.backingio import BackingIO
from cachefs.cache.page import PAGE_SIZE
from cachefs.descriptors import Descriptors
from cachefs.inode import Inode
from cachefs.writeback import Writeback

LOOKS = 4  # before a write is refused, while others are being written
KEPT_BLOCKS, KEPT_SHARE = 4096, 50  # ext4 keeps so many for itself, at most 2 %: they are in f_bfree, and not even for root
SAMPLE_SECONDS = 1.0  # between two looks at the backing while files grow; a refusal never goes without a look of its own


class SpaceBudget:
    """By how many bytes files may still grow. Pure: it is told what the backing says, and how much of that is spoken for.

    Between two samples `left_bytes` stays right whatever is written back: what files grew by is either unwritten or has
    become less free space. Only what others write or remove is noticed late.
    """

    def __init__(self) -> None:
        self.left_bytes = sys.maxsize  # nothing is known
        self.reserve_bytes = 0  # how much more there is for root
        self.free_bytes = 0  # of the last sample
        self.grown = True  # a sample is wanted: something was taken since the last one
        self._unit = PAGE_SIZE  # bytes that the backing gives room by

    def sample(self, st: os.statvfs_result, promised_bytes: int, privileged: bool) -> None:
        """Takes in what the backing says now. `privileged`: what is kept for root may be written by us."""
        self._unit = min(max(st.f_frsize, 1), PAGE_SIZE)
        self.free_bytes = st.f_frsize * st.f_bfree
        self.left_bytes = st.f_frsize * st.f_bavail - promised_bytes if st.f_blocks else sys.maxsize  # no size is no limit
        kept = min(KEPT_BLOCKS, st.f_blocks // KEPT_SHARE)
        self.reserve_bytes = st.f_frsize * max(0, st.f_bfree - st.f_bavail - kept) if privileged else 0
        self.grown = False

    def forget(self) -> None:
        """The backing cannot say: nothing is known."""
        self.left_bytes = sys.maxsize

    def take(self, offset: int, nbytes: int, size: int, by_root: bool) -> bool:
        """Whether there is room for a write of [offset, offset + nbytes) to a file of `size` bytes; if so, it is taken."""
        grows = self._growth(offset, nbytes, size)
        if grows > self.left_bytes and grows > self._left_for(by_root):
            return False
        self.left_bytes -= grows
        self.grown = True
        return True

    def take_part(self, offset: int, nbytes: int, size: int, by_root: bool, more_bytes: int = 0) -> int:
        """Takes as much of such a write as there is room for, `more_bytes` more than is known of; how many bytes that is."""
        lacking = self._growth(offset, nbytes, size) - self._left_for(by_root, more_bytes)
        if lacking > 0:
            units = -(-(offset + nbytes) // self._unit) - -(-lacking // self._unit)
            nbytes = max(0, units * self._unit - offset)
        self.left_bytes -= self._growth(offset, nbytes, size)
        self.grown = True
        return nbytes

    def _left_for(self, by_root: bool, more_bytes: int = 0) -> int:
        return max(0, self.left_bytes + more_bytes + (self.reserve_bytes if by_root else 0))

    def _growth(self, offset: int, nbytes: int, size: int) -> int:
        """Bytes of room that the write needs; what lies before the end of the file, or is a hole behind it, needs none."""
        unit = self._unit
        return max(0, -(-(offset + nbytes) // unit) - max(-(-size // unit), offset // unit)) * unit if nbytes else 0


class Space:
    """Samples the budget of one mount, and admits writes."""

    def __init__(self, io: BackingIO, descriptors: Descriptors, writeback: Writeback) -> None:
        self.io = io
        self.descriptors = descriptors
        self.writeback = writeback
        self.root = descriptors.table.root
        self.budget = SpaceBudget()
        self._privileged = os.geteuid() == 0
        self._looking: trio.Event | None = None  # a look is under way

    def has_room(self, offset: int, nbytes: int, size: int, by_root: bool) -> bool:
        """Whether nothing speaks against this write to a file of `size` bytes; else `admit` has to decide."""
        return not self.writeback.refused and (offset + nbytes <= size or self.budget.take(offset, nbytes, size, by_root))

    async def admit(self, inode: Inode, offset: int, nbytes: int, size: int, by_root: bool) -> int:
        """How many bytes of this write there is room for; raises OSError where there is none."""
        grows = offset + nbytes > size
        number = self._refusal(inode, grows)
        if not number and grows and inode.st.st_dev == self.root.st.st_dev:  # of one mounted inside, the root's says nothing
            nbytes = await self._part_with_room(offset, nbytes, size, by_root)
            number = 0 if nbytes else errno.ENOSPC
        if number:
            raise OSError(number, os.strerror(number))
        return nbytes

    async def _part_with_room(self, offset: int, nbytes: int, size: int, by_root: bool) -> int:
        cache = self.writeback.cache
        for _ in range(LOOKS):
            if self.budget.take(offset, nbytes, size, by_root):
                return nbytes
            await self._look()
            if not cache.writeback_pages:
                return self.budget.take_part(offset, nbytes, size, by_root)
            # What a thread is writing counts twice, as unwritten and as no longer free: it has to end first.
            with trio.move_on_after(SAMPLE_SECONDS):
                await cache.room.park()
        return self.budget.take_part(offset, nbytes, size, by_root, cache.writeback_pages * PAGE_SIZE)

    def _refusal(self, inode: Inode, grows: bool) -> int:
        """The errno with which a write fails because writeback does, or 0.

        A quota may be the file's owner's or its directory's: it speaks for that file alone.
        """
        for other, number in self.writeback.refused.items():
            theirs = number != errno.EDQUOT and other.st.st_dev == inode.st.st_dev
            if (theirs or other is inode) and (grows or number == errno.EROFS):
                return number
        return 0

    async def watch(self, next_beat: Callable[[], Awaitable[object]]) -> None:
        """Looks again at each beat while files grow, and while some cannot be written for want of room."""
        while True:
            if (self.budget.grown or self.writeback.refused) and not self.io.watchdog.lost:
                await self._look()
            await next_beat()

    async def _look(self) -> None:
        """A new sample, one for all who want it now. Files that could not be written are tried again if there is more room."""
        if self._looking is not None:
            return await self._looking.wait()
        self._looking = trio.Event()
        before = self.budget.free_bytes
        try:
            st = await self.descriptors.at("statvfs", self.root, self.io.backing.statvfs)
            self.budget.sample(st, self._promised_bytes(st.f_frsize * st.f_bavail), self._privileged)
        except OSError:
            self.budget.forget()  # writeback finds out
        finally:
            self._looking.set()
            self._looking = None
        if self.writeback.refused and self.budget.free_bytes > before:
            self.writeback.retry(errno.ENOSPC)

    def _promised_bytes(self, free_bytes: int) -> int:
        """What is unwritten and needs new room, as it lies behind the ends of the backing's files; exact where room is short."""
        growing = [
            (inode.file, inode.st.st_size)
            for inode in self.writeback.dirty
            if inode.file is not None and inode.file.size > inode.st.st_size and inode.st.st_dev == self.root.st.st_dev
        ]
        at_most = sum(min((file.dirty_pages + file.writeback_pages) * PAGE_SIZE, file.size - size) for file, size in growing)
        if free_bytes - at_most > self.writeback.limit_pages * PAGE_SIZE:
            return at_most
        return sum(file.unwritten_behind(size) for file, size in growing)

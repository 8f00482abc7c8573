"""Attributes: how long what is known of a file is believed, and how somebody else's change is told from one of our own.

Whoever reads attributes hands them to `absorb`; whoever has changed the file itself, to `adopt`. What is known is on the inode:
`st`, the signature of the contents that the cached pages are of, and `epoch`, which says that something read is old by now.
"""

import math
import os
from collections.abc import Awaitable, Callable
from time import clock_gettime_ns

import trio

from cachefs.backingio import BackingIO
from cachefs.cache import leaving
from cachefs.cache.file import CachedFile
from cachefs.cache.pagecache import PageCache
from cachefs.descriptors import Descriptors
from cachefs.inode import Inode, patched, signature_of
from cachefs.keeper import Keeper
from cachefs.source import DataDescriptors

CLOCK_REALTIME_COARSE = 5  # linux/time.h: the clock of file times, so that ours and the backing's do not cross
CLOCK_AHEAD_NS = 20_000_000  # more than a tick of the coarse clock
STAT_TRIES = 3


def now_ns(inode: Inode) -> int:
    """The time of a change to the file now, not before that of its last one.

    The backing may take times from a finer clock; CLOCK_AHEAD_NS bounds what of that is not a clock that was set back.
    """
    now, shown, theirs = clock_gettime_ns(CLOCK_REALTIME_COARSE), inode.ctime_shown[1], inode.st.st_ctime_ns
    last = shown if shown > theirs else theirs
    return last if now < last < now + CLOCK_AHEAD_NS else now


class AttributeCache:
    """Keeps what is known of attributes. `changed(inode)` is called when the backing turned out to have other contents."""

    def __init__(
        self,
        io: BackingIO,
        descriptors: Descriptors,
        data: DataDescriptors,
        cache: PageCache,
        keeper: Keeper,
        ttl_seconds: float,
        changed: Callable[[Inode], None],
    ) -> None:
        self.io = io
        self.descriptors = descriptors
        self.data = data
        self.cache = cache
        self.keeper = keeper
        self.ttl_seconds = ttl_seconds
        self.changed = changed
        self.keep_theirs: Callable[[Inode], Awaitable[object]]  # see `cachefs.conflicts`

    # --- looking -------------------------------------------------------------------------------------------------------

    def believed(self, inode: Inode) -> bool:
        """Whether the attributes need not be read: a backing far away was asked for them a short time ago."""
        return self.io.backing.blocking and trio.current_time() - inode.checked_at < self.ttl_seconds

    async def refresh(self, inode: Inode) -> None:
        """Reads the attributes, again if we changed the file meanwhile. What we change all the time, we know well enough."""
        for _ in range(STAT_TRIES):
            epoch = inode.epoch
            st = await self.look(inode)
            if epoch == inode.epoch:
                return self.absorb(inode, st, fresh=True)

    def refresh_now(self, inode: Inode) -> bool:
        """The same of a local backing, in plain code; False, and nothing done, where it may have to wait."""
        fd = max(inode.reader, inode.writer, inode.fd)
        if fd < 0:
            return False
        self.absorb(inode, self.io.call_now("stat", self.io.backing.fstat, fd), fresh=True)
        return True

    async def look(self, inode: Inode) -> os.stat_result:
        """The backing's attributes now, taken in by nobody yet."""
        fd = max(inode.reader, inode.writer)
        if fd < 0:
            return await self.descriptors.at("stat", inode, self.io.backing.fstat)
        inode.busy += 1
        try:
            return await self.io.call("stat", self.io.backing.fstat, fd)
        finally:
            inode.busy -= 1
            self.data.settle(inode)

    # --- taking in -----------------------------------------------------------------------------------------------------

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
                self.changed_underneath(inode, file, st)
        elif not inode.unsure and signature_of(st)[:2] not in (inode.signature[:2], inode.noticed):
            inode.noticed = signature_of(st)[:2]
            self.noticed(inode)

    def changed_underneath(self, inode: Inode, file: CachedFile, st: os.stat_result) -> None:
        inode.signature = signature_of(st)
        inode.changes += 1
        leaving.invalidate(self.cache, file)
        leaving.truncate(self.cache, file, st.st_size)
        self.changed(inode)

    def noticed(self, inode: Inode) -> None:
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
                self.changed_underneath(inode, file, st)  # by somebody else, just before
        inode.signature = signature
        if inode.journaled is not None:
            self.keeper.changed(inode)

    async def notice_locked(self, inode: Inode) -> None:
        """Notices somebody else's change before one of ours to contents or mtime makes it look like ours.

        By a caller that holds `inode.lock`, right before its change. If we have unwritten data, that version is kept.
        """
        file = inode.file
        if file is None:
            return
        if not (file.unwritten and (inode.unsure or inode.unlinked or self.believed(inode))):
            epoch = inode.epoch
            st = await self.look(inode)
            if file.unwritten:
                if signature_of(st)[:2] != inode.signature[:2]:
                    await self.keep_theirs(inode)
            elif epoch == inode.epoch and signature_of(st) != inode.signature:
                self.changed_underneath(inode, file, st)
        inode.unsure = True  # until what the change has made of the file was seen

    def notice_now(self, inode: Inode, fd: int) -> bool:
        """The same of a local file, in plain code; False, and nothing done, where a version has to be kept."""
        file = inode.file
        if file is None:
            return True
        if not (file.unwritten and (inode.unsure or inode.unlinked)):
            st = self.io.call_now("stat", self.io.backing.fstat, fd)
            if file.unwritten and signature_of(st)[:2] != inode.signature[:2]:
                return False
            if not file.unwritten and signature_of(st) != inode.signature:
                self.changed_underneath(inode, file, st)
        inode.unsure = True
        return True

    async def readopt(self, inode: Inode, contents: bool = False, **known: int) -> bool:
        """Reads the attributes after a change of our own, again if there was one more meanwhile; whether that worked.

        The change is done, whatever becomes of the look at it. Where that fails, the attributes that the change is `known`
        to have left (by their names in os.stat_result) are shown until the next look, which is due at once.
        """
        try:
            for _ in range(STAT_TRIES):
                epoch = inode.epoch
                st = await self.look(inode)
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

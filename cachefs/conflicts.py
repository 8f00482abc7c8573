"""Files that were changed on both sides: both versions are kept, one of them as NAME.conflict-DATE beside the file.

A conflict is a change by somebody else to a file of which we have unwritten data. If the file is still there, our data
goes into it and a copy has *their* version (`keep_theirs`). If its last name is gone, removed or replaced, what we had open
leads to a file without a name: a copy has *our* version, and is from then on the file that programs have open (`keep_ours`).

Copies are made durable before anything is overwritten; where one cannot be made, nothing is.
"""

import contextlib
import errno
import json
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio

from cachefs.backingio import BackingIO
from cachefs.copies import copy_piece, create_free, dress, remove, resize, sync
from cachefs.descriptors import Descriptors
from cachefs.inode import Inode, Signature, signature_of
from cachefs.source import DataDescriptors
from cachefs.statistics import Conflict, ConflictStatistics

log = logging.getLogger(__name__)

RECENT_MAX = 100  # conflicts that `cachefs status --json` lists
PIECE_BYTES = 8 << 20  # of a copy, for each call into a thread
TRIES_MIN, TRIES_MAX, TRY_SECONDS = 5, 100, 2.0  # copies of a file that is being changed while it is copied
TICK_SECONDS = 0.02  # more than a tick of the clock of file times: two changes within one may leave the same time
GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)


@dataclass(frozen=True, slots=True)
class Copy:
    """A file just made, empty and closed to all but its owner, with a descriptor for reading and writing."""

    parent: Inode
    name: bytes
    fd: int
    dirfd: int  # of the parent


class Conflicts:
    """Keeps both sides' versions and counts. Callers hold `inode.lock`; on OSError nothing was overwritten.

    `noticed(inode)` is called when the backing has other contents than the clean pages, `gone(parent, name)` when an inode is
    not called so any more.
    """

    def __init__(
        self,
        io: BackingIO,
        descriptors: Descriptors,
        data: DataDescriptors,
        noticed: Callable[[Inode], None],
        gone: Callable[[Inode, bytes], None],
    ) -> None:
        self.io = io
        self.backing = io.backing
        self.table = descriptors.table
        self.descriptors = descriptors
        self.data = data
        self.noticed = noticed
        self.gone = gone
        self.total = 0
        self.recent: deque[Conflict] = deque(maxlen=RECENT_MAX)

    # --- the two ways out ----------------------------------------------------------------------------------------------

    async def keep_theirs(self, inode: Inode) -> bytes | None:
        """Copies the backing's version of a file that ours will replace; returns the copy's path relative to the root.

        Afterwards what the backing shows of the file is known, so that ours may be written, and its size is the one that it
        has for programs here. EBUSY if it changes faster than it can be copied. None if the file is gone by now.
        """
        inode.busy += 1
        try:
            fd = await self.data.reader(inode)
            st = await self.io.call("stat", self.backing.fstat, fd)
            if await self._is_gone(inode, st):
                inode.signature, inode.unsure = signature_of(st), False
                return None
            async with self._copy_beside(inode) as copy:
                theirs = await self._copy_at_rest(fd, copy)
            inode.epoch += 1
            inode.signature, inode.unsure = theirs, False
            path = self._count(inode, copy, "theirs", "was changed in SOURCE while data of ours was unwritten: that version is")
            self.noticed(inode)
            if inode.file is not None and inode.file.size != theirs[1]:
                await self._resize(inode, theirs, inode.file.size)
        finally:
            inode.busy -= 1
        return path

    async def _copy_at_rest(self, fd: int, copy: Copy) -> Signature:
        """Copies until nothing was changed meanwhile; returns the signature of that version."""
        give_up_at = trio.current_time() + TRY_SECONDS
        for tries in range(1, TRIES_MAX + 1):
            theirs = await self._copy(fd, copy)
            if signature_of(await self.io.call("stat", self.backing.fstat, fd))[:2] == theirs[:2]:
                return theirs
            if tries >= TRIES_MIN and trio.current_time() > give_up_at:
                break
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    async def _resize(self, inode: Inode, theirs: Signature, size: int) -> None:
        """Gives the file our size, unless it has been changed once more: whoever writes to it next will see that."""
        fd = await self.data.writer(inode)
        inode.unsure = True
        st = await self.io.in_thread("truncate", resize, self.backing, fd, theirs, size)
        if st is not None:
            inode.st, inode.signature = st, signature_of(st)
        inode.unsure = False

    async def keep_ours(self, inode: Inode) -> bytes | None:
        """Gives a file without a name a new one, for what we have written to it; returns the path relative to the root.

        `inode` is that new file from now on, for all who have it open. None if it has a name after all, or if all of SOURCE is
        gone, so that there is no place for one.
        """
        inode.busy += 1
        try:
            fd = await self.data.reader(inode)
            if not await self._is_gone(inode, await self.io.call("stat", self.backing.fstat, fd)):
                return None
            if not (await self.descriptors.at("stat", self.table.root, self.backing.fstat)).st_nlink:
                log.info("SOURCE was removed, and with it files that are open: what is written to them goes when they are closed")
                return None
            async with self._copy_beside(inode) as copy:
                await self._copy(fd, copy, inode.file.size if inode.file is not None else None)
                st = await self.io.call("stat", self.backing.fstat, copy.fd)
                path = self._count(inode, copy, "ours", "was removed or replaced in SOURCE while data was unwritten: ours is")
                self._rebind(inode, copy, st)
        finally:
            inode.busy -= 1
        self.noticed(inode)
        return path

    def _rebind(self, inode: Inode, copy: Copy, st: os.stat_result) -> None:
        """Plain code: between two awaits the inode is the one file or the other."""
        for fd in {inode.reader, inode.writer, inode.fd} - {-1}:
            self.backing.redirect(fd, copy.fd)
        self.table.rebind(inode, st)
        inode.handle = None
        names = list(inode.names)
        self.table.name(inode, copy.parent, copy.name)
        for parent, name in names:
            self.table.unname(inode, parent, name)
            self.gone(parent, name)
            for dropped in self.table.drop(parent):
                self.descriptors.close(dropped)
        inode.epoch += 1
        inode.ctime_shown = (st.st_ctime_ns, inode.attributes().ctime_ns)
        inode.st, inode.signature, inode.unsure = st, signature_of(st), False

    def _count(self, inode: Inode, copy: Copy, kept: str, what: str) -> bytes:
        path = self.table.path_in(*next(iter(inode.names))) if inode.names else b"?"
        place = self.table.path_in(copy.parent, copy.name)
        self.total += 1
        self.recent.append(Conflict(os.fsdecode(path), os.fsdecode(place), kept, time.time()))
        log.warning("%s %s kept as %s", json.dumps(os.fsdecode(path)), what, json.dumps(os.fsdecode(place)))
        return place

    # --- copies --------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _copy_beside(self, inode: Inode) -> AsyncIterator[Copy]:
        """A new file, which goes again if what is done with it fails. Its directory stays at hand meanwhile."""
        parent, name, fd = await self._create(inode)
        try:
            async with self.descriptors.holding(parent) as dirfd:
                copy = Copy(parent, name, fd, dirfd)
                try:
                    yield copy
                except BaseException:
                    with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                        await self.io.call("unlink", remove, self.backing, dirfd, name, fd)
                    raise
        finally:
            self.backing.close(fd)

    async def _create(self, inode: Inode) -> tuple[Inode, bytes, int]:
        """Beside the file; where its directory is gone, in the nearest one above that is not: (directory, name, descriptor)."""
        now = time.time()
        for parent, name in await self._places(inode):
            try:
                return parent, *await self.descriptors.at("create", parent, create_free, self.backing, name, now)
            except OSError as error:
                if error.errno not in GONE:
                    raise
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    async def _is_gone(self, inode: Inode, st: os.stat_result) -> bool:
        """Whether the file has no name. Not every store counts links: one that says 0 is looked for."""
        return not st.st_nlink and not (await self._names(inode))[0]

    async def _names(self, inode: Inode) -> tuple[list[tuple[Inode, bytes]], list[tuple[Inode, bytes]]]:
        """The names that are the file's still, and those that were."""
        right: list[tuple[Inode, bytes]] = []
        stale: list[tuple[Inode, bytes]] = []
        for parent, name in list(inode.names):
            try:
                st = await self.descriptors.at("lookup", parent, self.backing.stat, name)
                is_it = inode.is_called(st)
            except OSError:
                is_it = False
            (right if is_it else stale).append((parent, name))
        return right, stale

    async def _places(self, inode: Inode) -> list[tuple[Inode, bytes]]:
        """Names to put a copy beside: those that are the file's first, then those that were, then in directories above."""
        right, stale = await self._names(inode)
        places = [*right, *stale] or [(self.table.root, b"unnamed")]
        above, name = places[0]
        while above is not self.table.root and above.names:
            above = next(iter(above.names))[0]
            places.append((above, name))
        return places

    async def _copy(self, fd: int, copy: Copy, most: int | None = None) -> Signature:
        """What is behind `fd`, `most` bytes at most, with owner, mode and times, durable under its name.

        Returns the signature that the original had before. What an earlier attempt has left in the copy goes.
        """
        io, backing = self.io, self.backing
        st = await io.call("stat", backing.fstat, fd)
        if time.time() - TICK_SECONDS < st.st_mtime < time.time() + TICK_SECONDS:
            await trio.sleep(TICK_SECONDS)
            st = await io.call("stat", backing.fstat, fd)
        size = st.st_size if most is None else min(st.st_size, most)
        await io.call("truncate", backing.truncate, copy.fd, 0)
        for offset in range(0, size, PIECE_BYTES):
            await io.in_thread("copy", copy_piece, backing, fd, copy.fd, offset, min(offset + PIECE_BYTES, size))
        await io.call("truncate", backing.truncate, copy.fd, size)
        await io.in_thread("copy", dress, backing, fd, copy.fd, st)
        await io.in_thread("fsync", sync, backing, copy.fd, copy.dirfd)
        return signature_of(st)

    def statistics(self) -> ConflictStatistics:
        return ConflictStatistics(total=self.total, recent=tuple(self.recent))

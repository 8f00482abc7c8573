"""The file system without FUSE: which inode a name leads to, and what links, removals and renames make of that.

Every method may raise OSError and nothing else. Callers are named by uid, gid and umask; whether they may do what they
ask has been decided before (the kernel does, by mode bits and ACLs).
"""

import contextlib
import errno
import math
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractContextManager
from itertools import islice

import trio

from backing.base import RENAME_EXCHANGE, RENAME_NOREPLACE
from cachefs.backingio import BackingIO
from cachefs.cache import leaving
from cachefs.creation import Creation
from cachefs.descriptors import Descriptors
from cachefs.directories import Directories
from cachefs.files import Files, Opened
from cachefs.inode import Inode, InodeTable, Name
from cachefs.links import Links
from cachefs.listings import KnownAbsent, Listings
from cachefs.writeback import Writeback
from cachefs.xattrs import ExtendedAttributes


class FileSystem:
    """Names. `files` has the data side and `files.setter` changes attributes; what is made is in `creation`."""

    def __init__(
        self, io: BackingIO, table: InodeTable, descriptors: Descriptors, files: Files, writeback: Writeback
    ) -> None:
        self.io = io
        self.backing = io.backing
        self.table = table
        self.descriptors = descriptors
        self.files = files
        self.writeback = writeback
        self.attributes = files.attributes
        self.xattrs = ExtendedAttributes(io, descriptors, writeback, files.setter)
        self.creation = Creation(self)
        self.links = Links(io, table, descriptors, files)
        self.listings = Listings(files.attributes.ttl_seconds)
        self.directories = Directories(self, files, descriptors, self.listings)
        self._looking: dict[Inode, trio.Event] = {}  # directories whose attributes are being read since we changed names there
        if io.backing.blocking:
            descriptors.renamed = self._renamed
        self._idle: dict[Inode, None] = {}  # inodes that nobody uses but that have cached pages, in the order of the last look
        self.statvfs_known: os.statvfs_result | None = None  # as it was last

    # --- finding -------------------------------------------------------------------------------------------------------

    async def lookup(self, parent: Inode, name: bytes) -> Inode:
        """The inode called `name`, with one more lookup counted."""
        inode = await self.find(parent, name)
        inode.lookups += 1
        return inode

    def lookup_now(self, parent: Inode, name: bytes) -> Inode | None:
        """The same of a local backing, in plain code; None, and nothing done, where it may have to wait."""
        if parent.fd < 0:
            return None
        try:
            st = self.io.call_now("lookup", self.backing.stat, parent.fd, name)
        except FileNotFoundError:
            self.table.nothing_at(parent, name)
            raise
        inode = self.found(parent, name, st)
        inode.lookups += 1
        return inode

    async def find(self, parent: Inode, name: bytes) -> Inode:
        """The same for ourselves: no lookup is counted. `drop` it afterwards."""
        known = self.table.named(parent, name)
        if known is None and (seconds := self.listings.seconds_absent(parent, name)):
            raise KnownAbsent(seconds)
        try:
            st = await self.descriptors.at("lookup", parent, self.backing.stat, name)
        except FileNotFoundError:
            if self.table.named(parent, name) is known:  # else the name was given meanwhile, after this answer
                self.table.nothing_at(parent, name)
            raise
        inode = self.found(parent, name, st)
        if inode.key != (st.st_dev, st.st_ino):
            other = await self.links.is_another(inode, parent, name, st)
            inode = inode if other is None else self.found(parent, name, other)
        return inode

    def lookup_known(self, parent: Inode, name: bytes) -> Inode | None:
        """`lookup` from memory, for when the backing does not answer; None if we know of no such name."""
        inode = self.table.named(parent, name)
        if inode is not None:
            inode.lookups += 1
        return inode

    async def unlook(self, inode: Inode) -> None:
        """Takes a lookup back of which the kernel was not told."""
        self.forget(inode.node, 1)

    async def unopen(self, opened: Opened) -> None:
        """Closes a handle of which the kernel was not told."""
        inode = self.files.handles[opened.number].inode
        await self.files.release(opened.number)
        self.drop(inode)

    async def uncreate(self, made: tuple[Inode, Opened]) -> None:
        """Closes what was created too late for anybody to be told. The file stays."""
        inode, opened = made
        inode.lookups -= 1
        await self.unopen(opened)

    def found(self, parent: Inode, name: bytes, st: os.stat_result) -> Inode:
        inode = self.table.add(st)
        self.table.name(inode, parent, name)
        if inode.key == (st.st_dev, st.st_ino):  # else it is looked at by another name
            self.attributes.absorb(inode, st)
        return inode

    @contextlib.asynccontextmanager
    async def at_path(self, path: bytes) -> AsyncIterator[Inode]:
        """The inode at a path below the root, b"" = the root, known as long as one is inside. Follows no symbolic link."""
        inode, found = self.table.root, []
        try:
            for name in path.split(b"/") if path else ():
                if name in (b"", b".", b".."):  # the last one would lead out of SOURCE
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                inode = await self.lookup(inode, name)
                found.append(inode)
            yield inode
        finally:
            for passed in reversed(found):
                self.forget(passed.node, 1)

    async def _peek(self, parent: Inode, name: bytes) -> tuple[os.stat_result | None, Inode | None]:
        """What is there under a name now, and the inode if it is a known one."""
        try:
            st = await self.descriptors.at("lookup", parent, self.backing.stat, name)
        except FileNotFoundError:
            return None, None
        return st, self.table.known(st)

    def forget(self, node: int, lookups: int) -> None:
        """The kernel drops references."""
        try:
            inode = self.table.get(node)
        except KeyError:
            return
        inode.lookups -= lookups
        self.drop(inode)

    def drop(self, inode: Inode) -> None:
        """Lets go of an inode that nobody needs."""
        if inode.in_use:
            return
        self.files.data.settle(inode)
        dropped = self.table.drop(inode)
        for gone in dropped:
            gone.file = None  # which has it in turn: nobody else would take the two apart, see `garbage.py`
            self.descriptors.close(gone)
            self.files.data.unsynced.pop(gone, None)
            self.listings.forget(gone)
            self._idle.pop(gone, None)
        if not dropped and inode.file is not None and inode.file.resident_pages:
            self._idle[inode] = None

    def sweep(self, most: int) -> None:
        """Looks again at up to `most` inodes that only their cached pages kept, the longest idle first."""
        for inode in list(islice(self._idle, most)):
            del self._idle[inode]
            self.drop(inode)

    def _renamed(self, directory: Inode, name: bytes | None, there: bool) -> None:
        """We have changed names in a directory far away: neither its listing nor its attributes are known any more.

        The kernel will ask for the latter before it goes through that directory again, so they are read while it does not wait.
        """
        self.listings.changed(directory, name, there)
        directory.epoch += 1
        directory.checked_at = -math.inf
        if directory not in self._looking and self.io.watchdog.tasks is not None:
            self._looking[directory] = trio.Event()
            self.io.watchdog.tasks.start_soon(self._look_again, directory)

    async def _look_again(self, directory: Inode) -> None:
        try:
            await self.attributes.refresh(directory)
        except OSError:
            return  # whoever needs them finds out
        finally:
            self._looking.pop(directory).set()
            self.drop(directory)

    # --- attributes ----------------------------------------------------------------------------------------------------

    async def getattr(self, inode: Inode) -> None:
        """Brings `inode.attributes()` up to date, if the backing answers."""
        if not self.attributes.believed(inode):
            await self.io.ask(self._refreshed, inode, memory=lambda: inode)

    async def _refreshed(self, inode: Inode) -> Inode:
        if inode in self._looking:
            await self._looking[inode].wait()
        if not self.attributes.believed(inode):
            await self.attributes.refresh(inode)
        return inode

    # --- names ---------------------------------------------------------------------------------------------------------

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> Inode:
        """Gives the inode one more name. It stays one where the backing shows each name as a file of its own, as sshfs does."""

        def link(fd: int, dirfd: int) -> None:
            self.backing.link(fd, dirfd, name)

        inode.made = False
        if self.backing.blocking:
            await self.links.write_first(inode)
        await self.descriptors.at_two("link", inode, parent, link, given=name)
        self.table.name(inode, parent, name)
        self.files.keeper.moved(inode)
        await self.attributes.readopt(inode, st_nlink=inode.st.st_nlink + 1)
        if self.backing.blocking:
            await self.links.note(inode, parent, name)
        inode.lookups += 1
        return inode

    async def readlink(self, inode: Inode) -> bytes:
        inode.target = await self.descriptors.at("readlink", inode, self.backing.readlink)
        return inode.target

    async def unlink(self, parent: Inode, name: bytes) -> None:
        async with self._going(parent, name) as (st, inode):
            await self.descriptors.at("unlink", parent, self.backing.unlink, name)
            self.table.nothing_at(parent, name)
            if inode is not None:
                self.table.unname(inode, parent, name)
                await self._lost_a_name(inode, st)

    async def rmdir(self, parent: Inode, name: bytes) -> None:
        async with self._going(parent, name) as (st, inode):
            await self.descriptors.at("rmdir", parent, self.backing.rmdir, name)
            self.table.nothing_at(parent, name)
            if inode is not None:
                self.table.unname(inode, parent, name)
                await self._lost_a_name(inode, st)

    @contextlib.asynccontextmanager
    async def _going(self, parent: Inode, name: bytes) -> AsyncIterator[tuple[os.stat_result | None, Inode | None]]:
        """What is under a name that will be removed; if somebody knows it, it is held, to be reached without the name."""
        st, inode = await self._peek(parent, name)
        if inode is not None and self.backing.blocking:
            await self.links.prepare_for_loss(inode)
        async with contextlib.AsyncExitStack() as stack:
            if st is not None and inode is not None and (inode.lookups or inode.opens):
                with contextlib.suppress(OSError):
                    await stack.enter_async_context(self.descriptors.holding(inode))
            if inode is not None:
                inode.losing += 1  # whoever writes it meanwhile is not to take that for somebody else's doing
            try:
                yield st, inode
            finally:
                if inode is not None:
                    inode.losing -= 1
        if inode is not None and inode.unlinked:
            self.drop(inode)

    async def _lost_a_name(self, inode: Inode, before: os.stat_result | None) -> None:
        """A name is gone. With the last one the file lives on only in open handles, and unwritten data with nobody to read it."""
        if await self.attributes.readopt(inode):
            gone = inode.st.st_nlink == 0
        else:  # nobody knows: data that may still have a name is not to be thrown away
            gone = before is None or before.st_nlink <= 1 or inode.is_dir
        if self.backing.blocking and inode.names and await self.links.has_another_name(inode):
            gone = False
        if gone:
            inode.unlinked = True
            self.files.keeper.forget(inode)
            self.table.renumbered(inode)
            if inode.file is not None and not inode.opens:
                leaving.discard(self.files.cache, inode.file)
        else:
            self.files.keeper.moved(inode)

    async def rename(self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int) -> None:
        def rename(dirfd: int, new_dirfd: int) -> None:
            self.backing.rename(dirfd, name, new_dirfd, new_name, flags)

        old, new, exchanged = (parent, name), (new_parent, new_name), bool(flags & RENAME_EXCHANGE)
        st, inode = await self._peek(*old)
        async with self._going(*new) as (target_st, target):
            with self._moving(inode, old, new), self._moving(target if exchanged else None, new, old):
                # Of two names of one file, both stay: known is only what becomes of the old one where nothing was in its way.
                plain = target_st is None and not flags & ~RENAME_NOREPLACE
                lost, given = name if plain else None, None if exchanged else new_name
                await self.descriptors.at_two("rename", parent, new_parent, rename, lost, given)
                if st is not None and target_st is not None and (st.st_dev, st.st_ino) == (target_st.st_dev, target_st.st_ino):
                    return  # two names of one file: nothing happens
                if inode is not None and inode is target:
                    return
                self._exchange_names(inode, old, target, new, exchanged)
            if target is not None and not exchanged:
                await self._lost_a_name(target, target_st)
        for moved in (target if exchanged else None, inode):
            if moved is not None:
                self._moved(moved)
                self.files.opened(moved)
                await self.attributes.readopt(moved)

    def _exchange_names(self, inode: Inode | None, old: Name, target: Inode | None, new: Name, exchanged: bool) -> None:
        """`inode` has got the name `new`, and `target` has lost it, or got `old` for it."""
        for name in (old, new):
            self.table.nothing_at(*name)
        if target is not None:
            self.table.unname(target, *new)
            if exchanged:
                self.table.name(target, *old)
        if inode is not None:
            self.table.unname(inode, *old)
            self.table.name(inode, *new)

    def _moving(self, inode: Inode | None, old: Name, new: Name) -> AbstractContextManager[None]:
        """Unwritten files that a rename is about to give other paths can be found under both inside."""
        if inode is None:
            return contextlib.nullcontext()
        return self.files.keeper.moving(self._journaled_below(inode), old, new)

    def _moved(self, inode: Inode) -> None:
        for moved in self._journaled_below(inode):
            self.files.keeper.moved(moved)

    def _journaled_below(self, inode: Inode) -> tuple[Inode, ...]:
        """The file, or what the journal may know by a path that a directory is part of."""
        return (*self.writeback.dirty, *self.files.keeper.written_back) if inode.is_dir else (inode,)

    # --- the rest ------------------------------------------------------------------------------------------------------

    async def statvfs(self) -> os.statvfs_result:
        self.statvfs_known = await self.descriptors.at("statvfs", self.table.root, self.backing.statvfs)
        return self.statvfs_known

    async def make_durable(self, inodes: Iterable[Inode]) -> None:
        """What was written back of these files is durable, whatever other names and files the backing syncs with them."""
        if self.backing.blocking:  # it may keep a syncfs to itself (FUSE does)
            for inode in inodes:
                if not inode.unlinked:
                    await self.files.durability.make_durable(inode)
        await self.syncfs()

    async def syncfs(self) -> None:
        """Everything that was written back, and every name, is durable when this returns without error."""
        await self.io.in_thread("syncfs", self.backing.syncfs, self.table.root.fd)

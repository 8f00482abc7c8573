"""Open directories, and what they list."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from backing.base import Entry
from cachefs.attributes import CLOCK_AHEAD_NS
from cachefs.descriptors import Descriptors
from cachefs.files import Files
from cachefs.handle import DirectoryHandle
from cachefs.inode import Inode, Listed
from cachefs.listings import Listings

COARSE_NS = 2_500_000_000  # the times of some stores go in steps of two seconds (FAT)
STATS_AT_ONCE = 32  # entries of a far away directory that are looked at side by side


class Names(Protocol):
    """What they need of `FileSystem`."""

    async def lookup(self, parent: Inode, name: bytes) -> Inode: ...

    def lookup_known(self, parent: Inode, name: bytes) -> Inode | None: ...

    def found(self, parent: Inode, name: bytes, st: os.stat_result) -> Inode: ...

    def forget(self, node: int, lookups: int) -> None: ...

    def drop(self, inode: Inode) -> None: ...


class Directories:
    """Owns the handles of open directories. `listings` has what those far away contain."""

    def __init__(self, fs: Names, files: Files, descriptors: Descriptors, listings: Listings) -> None:
        self.fs = fs
        self.files = files
        self.descriptors = descriptors
        self.table = descriptors.table
        self.io = files.io
        self.backing = files.io.backing
        self.listings = listings
        self.handles: dict[int, DirectoryHandle] = {}
        self.entered: Callable[[Inode], None] = lambda directory: None  # told of each directory that is opened
        self._listing: dict[Inode, trio.Event] = {}  # those far away that are being read
        self._last_directory = 0

    def open(self, inode: Inode, pid: int = 0) -> int:
        """A handle. What is sent over it the kernel may keep, unless it is sent another listing at the same time."""
        inode.opens += 1
        self._last_directory += 1
        self.handles[self._last_directory] = DirectoryHandle(inode, pid, inode.opens == 1)
        self.entered(inode)
        return self._last_directory

    async def is_listed(self, inode: Inode, with_attributes: bool) -> bool:
        """Whether the kernel's listing is as the directory is now, and has attributes that it may believe if they are wanted."""
        recent = self._may_be_listed(inode, with_attributes)
        if recent is None or self.backing.blocking:
            return bool(recent)
        return self._is_as_then(inode, await self.descriptors.at("stat", inode, self.backing.fstat))

    def is_listed_now(self, inode: Inode, with_attributes: bool) -> bool:
        """The same of a local directory that has a descriptor, in plain code."""
        if self._may_be_listed(inode, with_attributes) is None:
            return False
        return self._is_as_then(inode, self.io.call_now("stat", self.backing.fstat, inode.fd))

    def _may_be_listed(self, inode: Inode, with_attributes: bool) -> bool | None:
        """Whether the kernel's listing was read a short time ago; None: there is none that is good for this."""
        listed = inode.listed
        if listed is None:
            return None
        recent = trio.current_time() - listed.read_at < self.files.attributes.ttl_seconds
        return None if with_attributes and not (recent and listed.with_attributes) else recent

    def _is_as_then(self, inode: Inode, st: os.stat_result) -> bool:
        return inode.listed is not None and inode.listed.stamp == (st.st_mtime_ns, st.st_ctime_ns)

    def close(self, number: int) -> None:
        inode = self.handles.pop(number).inode
        inode.opens -= 1
        self.fs.drop(inode)

    async def listing(self, number: int, start: int) -> Sequence[Entry]:
        """The listing of an open directory, without "." and "..": read anew when reading starts at 0, else as it was.

        Far away it is not read where the last one may still be believed.
        """
        handle = self.handles[number]
        if handle.listing is not None and start:
            return handle.listing
        begins = handle.listing is None and not start
        handle.listing, listed = await (self._far_listing if self.backing.blocking else self._near_listing)(handle.inode)
        if handle.kept:
            handle.inode.listed = None  # until the kernel has all of it
            # It goes on behind what it has of the last reading: of two states it would make one.
            is_same = listed is not None and handle.listed is not None and listed.stamp == handle.listed.stamp
            handle.listed = listed if begins or is_same else None
        return handle.listing

    def ended(self, number: int) -> None:
        """The end of a listing was sent: now the kernel has all of it."""
        handle = self.handles[number]
        if handle.kept:
            handle.inode.listed = handle.listed

    async def _near_listing(self, directory: Inode) -> tuple[Sequence[Entry], Listed | None]:
        """The listing, and what makes it believed later: the state before, so that what changes meanwhile makes it an old one."""

        def read(dirfd: int) -> tuple[os.stat_result, list[Entry]]:
            return self.backing.fstat(dirfd), self.backing.listdir(dirfd)

        read_at = trio.current_time()
        st, listing = await self.descriptors.at("readdir", directory, read)
        step_ns = COARSE_NS if not st.st_ctime_ns % 1_000_000_000 else CLOCK_AHEAD_NS  # whole seconds: maybe the store's steps
        may_change_unseen = st.st_ctime_ns > time.time_ns() - step_ns
        return listing, None if may_change_unseen else Listed((st.st_mtime_ns, st.st_ctime_ns), read_at)

    async def _far_listing(self, directory: Inode) -> tuple[Sequence[Entry], Listed | None]:
        listing, read_at = await self.listed(directory), self.listings.read_at(directory)
        return listing, None if read_at is None else Listed(read_at, read_at)

    async def listed(self, directory: Inode) -> Sequence[Entry]:
        """What is in a directory far away: what may be believed, else read, by one for all who ask meanwhile."""
        if directory in self._listing:
            await self._listing[directory].wait()
        known = self.listings.entries(directory)
        if known is not None:
            return known
        begun, done = self.listings.begin(), self._listing.setdefault(directory, trio.Event())
        try:
            entries = await self.descriptors.at("readdir", directory, self.backing.listdir)
            self.listings.read(directory, entries, begun)
            return entries
        finally:
            self._listing.pop(directory, done).set()

    async def entries(self, number: int, names: Sequence[bytes]) -> list[Inode | None]:
        """The inodes of some names of an open directory, each with one more lookup; None for those that are gone."""
        parent = self.handles[number].inode
        found: list[Inode | None] = [None] * len(names)

        errors: list[OSError] = []

        async def look(i: int) -> None:
            began = trio.current_time()
            try:
                found[i] = await self.fs.lookup(parent, names[i])
                self.listings.saw(parent, names[i], began)
            except FileNotFoundError:
                return
            except OSError as error:
                errors.append(error)

        if not self.backing.blocking:
            stats = await self.descriptors.at("lookup", parent, self._stat_all, names)
            for i, st in enumerate(stats):
                if st is not None:
                    made = found[i] = self.fs.found(parent, names[i], st)
                    made.lookups += 1
            return found
        try:
            async with trio.open_nursery() as nursery:
                for i, name in enumerate(names):
                    if self.listings.seconds_left(parent, name) and self._is_believed(parent, name):
                        found[i] = self.fs.lookup_known(parent, name)
                    else:
                        nursery.start_soon(look, i)
            if errors:  # a directory that cannot be read must not look like an empty one
                raise errors[0]
        except BaseException:
            await self.unlook_all(found)
            raise
        return found

    def name_seconds(self, number: int, name: bytes) -> float:
        """How long the kernel may believe what `entries` gave for a name."""
        if not self.backing.blocking:
            return self.files.attributes.ttl_seconds
        return self.listings.seconds_left(self.handles[number].inode, name)

    def _is_believed(self, parent: Inode, name: bytes) -> bool:
        inode = self.table.named(parent, name)
        return inode is not None and self.files.attributes.believed(inode)

    def entries_known(self, number: int, names: Sequence[bytes]) -> list[Inode | None] | None:
        """The same from memory; None if we do not know all of them."""
        parent = self.handles[number].inode
        if any(self.table.named(parent, name) is None for name in names):
            return None
        return [self.fs.lookup_known(parent, name) for name in names]

    async def unlook_all(self, found: Sequence[Inode | None]) -> None:
        for inode in filter(None, found):
            self.fs.forget(inode.node, 1)

    def _stat_all(self, dirfd: int, names: Sequence[bytes]) -> list[os.stat_result | None]:
        found: list[os.stat_result | None] = []
        for name in names:
            try:
                found.append(self.backing.stat(dirfd, name))
            except FileNotFoundError:
                found.append(None)
        return found

    async def sync(self, number: int) -> None:
        async with self.descriptors.holding(self.handles[number].inode) as path_fd:
            fd = await self.io.call("open", self.backing.reopen, path_fd, os.O_RDONLY | os.O_DIRECTORY)
            try:
                await self.io.fsync(fd, False)
            finally:
                self.io.close(fd)

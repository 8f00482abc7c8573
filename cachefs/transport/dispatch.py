"""What each kind of request asks for, without pyfuse3: its parts to a handler of `Operations`, the result to an answer."""

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pyfuse3 import FUSEError

from backing.base import Entry
from cachefs.files import Opened
from cachefs.handle import DirectoryHandle
from cachefs.inode import Inode
from cachefs.setattr import Changes
from cachefs.transport import wire
from cachefs.transport.lookers import Lookers
from cachefs.transport.operations import Operations, blocks_of
from cachefs.transport.wire import Request

Answer = Any  # bytes or a view of them, as the handlers of WireOperations make them; pyfuse3's types name its objects
Handler = Callable[[Request], Awaitable[Answer | None]]  # None: nothing is to be answered

DONE = b""


class Listing:
    """The entries of one READDIRPLUS answer, `room` bytes at most."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.parts: list[bytes] = []

    def add(self, entry: bytes) -> bool:
        """False, and nothing done, where there is no room for it."""
        if len(entry) > self.room:
            return False
        self.room -= len(entry)
        self.parts.append(entry)
        return True

    def add_names(self, listing: Sequence[Entry], start: int) -> int:
        """Adds as many from the one at the offset `start` on as there is room for, without attributes; how many that are."""
        parts, count = wire.names_alone(listing, start, self.room)
        self.room -= sum(map(len, parts))
        self.parts += parts
        return count


class WireOperations(Operations):
    """The handlers of `Operations`, with answers as the kernel reads them in the place of pyfuse3's objects."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lookers = Lookers()

    def _entry(self, inode: Inode, name_seconds: float | None = None) -> Any:
        seen = inode.attributes()
        attr = wire.attributes(inode.node, seen, blocks_of(seen))
        name_seconds = self.ttl_seconds if name_seconds is None else name_seconds
        return wire.entry(inode.node, name_seconds, self._attr_seconds(inode), attr)

    def _attr(self, inode: Inode) -> Any:
        seen = inode.attributes()
        return wire.attr_out(self._attr_seconds(inode), wire.attributes(inode.node, seen, blocks_of(seen)))

    def _changes(self, attr: Any, fields: Any) -> Changes:
        changes: Changes = attr
        return changes

    def _nothing(self, seconds: float | None = None) -> Any:
        return wire.entry(0, self.ttl_seconds if seconds is None else seconds, 0.0, wire.NO_ATTRIBUTES)

    def _info(self, opened: Opened) -> Any:
        flags = wire.OPEN_DIRECT_IO if self.kernel_cache == "off" else 0
        flags |= wire.OPEN_KEEP_CACHE if self.kernel_cache == "keep" and opened.unchanged else 0
        flags |= 0 if self.files.handles[opened.number].writable else wire.OPEN_NOFLUSH  # there is nothing to report
        return wire.OPENED.pack(opened.number, flags, 0)

    def _statfs(self, st: os.statvfs_result) -> Any:
        return wire.statfs_out(st)

    def _add(self, token: Any, name: bytes, entry: Any, next_offset: int) -> bool:
        listing: Listing = token
        return listing.add(wire.direntplus(name, entry, next_offset))

    def _add_names(self, fh: Any, token: Any, listing: Sequence[Entry], start: int) -> bool:
        handle, answer = self.fs.directories.handles[fh], token
        wanted, listed = self._wants_attributes(handle.pid), handle.listed
        if listed is not None:
            listed.with_attributes = wanted and (start <= 2 or listed.with_attributes)
        if not wanted:
            sent = answer.add_names(listing, start)
            self.lookers.listed(handle.pid, handle.inode.node, sent)
        return not wanted

    def _wants_attributes(self, pid: int) -> bool:
        """Far away they are always sent along: to be asked for one by one would cost a trip each."""
        return self.fs.backing.blocking or self.lookers.wants(pid)

    async def directory_info(self, number: int) -> bytes:
        """The answer to OPENDIR."""
        handle = self.fs.directories.handles[number]
        try:
            listed = handle.kept and await self.fs.directories.is_listed(handle.inode, self._wants_attributes(handle.pid))
        except OSError:  # whoever reads the directory will hear of it
            listed = False
        return self._directory_info(number, handle, listed)

    def opendir_now(self, inode: Inode, pid: int) -> bytes | None:
        """OPENDIR in plain code; None, and nothing done, where it may have to wait."""
        directories, listed = self.fs.directories, False
        if inode.listed is not None and not inode.opens:
            if inode.fd < 0:
                return None
            listed = directories.is_listed_now(inode, self._wants_attributes(pid))
        number = directories.open(inode, pid)
        return self._directory_info(number, directories.handles[number], listed)

    def _directory_info(self, number: int, handle: DirectoryHandle, listed: bool) -> bytes:
        """What the kernel has of the listing goes, unless it is good, and is kept from now on.

        Over one handle at a time: of two that read the directory in different states it would make one listing.
        """
        flags = wire.OPEN_KEEP_CACHE | (wire.OPEN_CACHE_DIR if handle.kept else 0)
        if handle.kept and not listed:
            handle.inode.listed = None
            flags &= ~wire.OPEN_KEEP_CACHE
        return wire.OPENED.pack(number, flags, 0)


class Dispatch:
    """A handler for each opcode that we know; the kernel gets ENOSYS for the others, and may go on without."""

    def __init__(self, operations: WireOperations) -> None:
        self.operations: Any = operations
        self.handlers: dict[int, Handler] = {
            wire.LOOKUP: self.lookup, wire.FORGET: self.forget, wire.BATCH_FORGET: self.batch_forget,
            wire.GETATTR: self.getattr, wire.SETATTR: self.setattr, wire.ACCESS: self.access,
            wire.READLINK: self.readlink, wire.SYMLINK: self.symlink, wire.MKNOD: self.mknod, wire.MKDIR: self.mkdir,
            wire.UNLINK: self.unlink, wire.RMDIR: self.rmdir, wire.LINK: self.link,
            wire.RENAME: self.rename, wire.RENAME2: self.rename2,
            wire.OPEN: self.open, wire.CREATE: self.create, wire.READ: self.read, wire.WRITE: self.write,
            wire.FLUSH: self.flush, wire.FSYNC: self.fsync, wire.RELEASE: self.release,
            wire.OPENDIR: self.opendir, wire.READDIRPLUS: self.readdirplus, wire.RELEASEDIR: self.releasedir,
            wire.FSYNCDIR: self.fsyncdir, wire.STATFS: self.statfs,
            wire.GETXATTR: self.getxattr, wire.LISTXATTR: self.listxattr, wire.SETXATTR: self.setxattr,
            wire.REMOVEXATTR: self.removexattr, wire.INTERRUPT: self.interrupt, wire.DESTROY: self.destroy,
        }  # fmt: skip

    # --- inodes --------------------------------------------------------------------------------------------------------

    async def lookup(self, request: Request) -> Answer:
        found = await self.operations.lookup(request.node, request.name(), request)
        if wire.mode_of(found) and not stat.S_ISDIR(wire.mode_of(found)):  # into directories go those too that want names alone
            self.operations.lookers.looked(request.pid, request.node)
        return found

    async def forget(self, request: Request) -> None:
        await self.operations.forget(wire.forget_in(request))

    async def batch_forget(self, request: Request) -> None:
        await self.operations.forget(wire.batch_forget_in(request))

    async def getattr(self, request: Request) -> Answer:
        return await self.operations.getattr(request.node, request)

    async def setattr(self, request: Request) -> Answer:
        return await self.operations.setattr(request.node, wire.setattr_in(request.body), None, None, request)

    async def access(self, request: Request) -> Answer:
        await self.operations.access(request.node, 0, request)
        return DONE

    # --- names ---------------------------------------------------------------------------------------------------------

    async def readlink(self, request: Request) -> Answer:
        return await self.operations.readlink(request.node, request)

    async def symlink(self, request: Request) -> Answer:
        name, target = wire.symlink_in(request)
        return await self.operations.symlink(request.node, name, target, request)

    async def mknod(self, request: Request) -> Answer:
        name, mode, rdev = wire.mknod_in(request)
        return await self.operations.mknod(request.node, name, mode, rdev, request)

    async def mkdir(self, request: Request) -> Answer:
        name, mode = wire.mkdir_in(request)
        return await self.operations.mkdir(request.node, name, stat.S_IFDIR | stat.S_IMODE(mode), request)

    async def unlink(self, request: Request) -> Answer:
        await self.operations.unlink(request.node, request.name(), request)
        return DONE

    async def rmdir(self, request: Request) -> Answer:
        await self.operations.rmdir(request.node, request.name(), request)
        return DONE

    async def link(self, request: Request) -> Answer:
        node, name = wire.link_in(request)
        return await self.operations.link(node, request.node, name, request)

    async def rename(self, request: Request) -> Answer:
        new_parent, name, new_name = wire.rename_in(request)
        await self.operations.rename(request.node, name, new_parent, new_name, 0, request)
        return DONE

    async def rename2(self, request: Request) -> Answer:
        new_parent, name, new_name, flags = wire.rename2_in(request)
        await self.operations.rename(request.node, name, new_parent, new_name, flags, request)
        return DONE

    # --- open files ----------------------------------------------------------------------------------------------------

    async def open(self, request: Request) -> Answer:
        return await self.operations.open(request.node, wire.open_in(request.body), request)

    async def create(self, request: Request) -> Answer:
        name, mode, flags = wire.create_in(request)
        info, entry = await self.operations.create(request.node, name, mode, flags, request)
        return entry + info

    async def read(self, request: Request) -> Answer:
        """The view that is the answer is good until the next await."""
        handle, offset, size = wire.transfer_in(request.body)
        return await self.operations.read(handle, offset, size)

    async def write(self, request: Request) -> Answer:
        handle, offset, size = wire.transfer_in(request.body)
        data = request.body[wire.WRITE_DATA : wire.WRITE_DATA + size]
        if len(data) != size:
            raise ValueError("a write has less data than it says")
        if wire.is_append(request.body):
            offset = self.operations.files.place(handle, offset)
        return wire.WRITTEN.pack(await self.operations.write(handle, offset, data), 0)

    async def flush(self, request: Request) -> Answer:
        await self.operations.flush(request.handle())
        return DONE

    async def fsync(self, request: Request) -> Answer:
        await self.operations.fsync(*wire.fsync_in(request.body))
        return DONE

    async def release(self, request: Request) -> Answer:
        await self.operations.release(request.handle())
        return DONE

    # --- directories ---------------------------------------------------------------------------------------------------

    async def opendir(self, request: Request) -> Answer:
        return await self.operations.directory_info(await self.operations.opendir(request.node, request))

    async def readdirplus(self, request: Request) -> Answer:
        handle, start, size = wire.transfer_in(request.body)
        listing = Listing(size)
        await self.operations.readdir(handle, start, listing)
        return b"".join(listing.parts)

    async def releasedir(self, request: Request) -> Answer:
        await self.operations.releasedir(request.handle())
        return DONE

    async def fsyncdir(self, request: Request) -> Answer:
        await self.operations.fsyncdir(*wire.fsync_in(request.body))
        return DONE

    # --- the rest ------------------------------------------------------------------------------------------------------

    async def statfs(self, request: Request) -> Answer:
        return await self.operations.statfs(request)

    async def getxattr(self, request: Request) -> Answer:
        room, name = wire.getxattr_in(request)
        return sized(await self.operations.getxattr(request.node, name, request), room)

    async def listxattr(self, request: Request) -> Answer:
        room = wire.listxattr_in(request.body)
        names = await self.operations.listxattr(request.node, request)
        return sized(b"".join(name + b"\0" for name in names), room)

    async def setxattr(self, request: Request) -> Answer:
        name, value, flags = wire.setxattr_in(request)
        if flags & (os.XATTR_CREATE | os.XATTR_REPLACE):
            await self._check_xattr(request, name, flags)
        await self.operations.setxattr(request.node, name, value, request)
        return DONE

    async def _check_xattr(self, request: Request, name: bytes, flags: int) -> None:
        """As pyfuse3 does: raises unless there is such an attribute (to be replaced), or if there is (to be created)."""
        try:
            await self.operations.getxattr(request.node, name, request)
        except FUSEError as error:
            if error.errno != errno.ENODATA or flags & os.XATTR_REPLACE:
                raise
        else:
            if flags & os.XATTR_CREATE:
                raise FUSEError(errno.EEXIST)

    async def removexattr(self, request: Request) -> Answer:
        await self.operations.removexattr(request.node, wire.xattr_in(request), request)
        return DONE

    async def interrupt(self, request: Request) -> None:
        """The program that waits for an answer got a signal. It gets the answer when there is one, as with pyfuse3."""

    async def destroy(self, request: Request) -> Answer:
        return DONE


def sized(value: bytes, room: int) -> bytes:
    """An xattr's answer: the value, or its size if there is no room at all."""
    if not room:
        return wire.XATTR_SIZE.pack(len(value), 0)
    if len(value) > room:
        raise FUSEError(errno.ERANGE)
    return value

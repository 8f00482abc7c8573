"""Extended attributes: the backing's, some of which are remembered, and those that exist on the mount alone."""

import errno
from typing import Protocol

from cachefs.backingio import BackingIO
from cachefs.descriptors import Descriptors
from cachefs.inode import Inode
from cachefs.setattr import AttributeSetter
from cachefs.writeback import Writeback

HINTS = b"user.cachefs."
ACL_DEFAULT = b"system.posix_acl_default"
# What the kernel asks for on its own when it checks whether somebody may go somewhere or run something.
XATTRS_REMEMBERED = frozenset((b"system.posix_acl_access", ACL_DEFAULT, b"security.capability"))


class VirtualAttributes(Protocol):
    """Extended attributes of regular files that exist on the mount alone; the methods raise OSError."""

    def get(self, inode: Inode, name: bytes) -> bytes: ...

    async def set(self, inode: Inode, name: bytes, value: bytes) -> None: ...

    async def remove(self, inode: Inode, name: bytes) -> None: ...


class ExtendedAttributes:
    """Of any inode; names that begin with HINTS are for `hints`, where there are some."""

    def __init__(self, io: BackingIO, descriptors: Descriptors, writeback: Writeback, setter: AttributeSetter) -> None:
        self.io = io
        self.descriptors = descriptors
        self.writeback = writeback
        self.setter = setter
        self.hints: VirtualAttributes | None = None

    async def getxattr(self, inode: Inode, name: bytes) -> bytes | int:
        """A value, or the errno that says why there is none. Some are remembered, see `Inode.xattrs`."""
        if self.hints is not None and name.startswith(HINTS):
            return self.hints.get(inode, name)
        try:
            return self._got_xattr(inode, name, await self.descriptors.at("getxattr", inode, self.io.backing.getxattr, name))
        except OSError as error:
            return self._got_xattr(inode, name, _no_xattr(error))

    def getxattr_now(self, inode: Inode, name: bytes) -> bytes | int | None:
        """The same of a local file that is open already, in plain code; None, and nothing done, where it may have to wait."""
        fd = self.descriptors.open_one(inode)
        if fd < 0 or name.startswith(HINTS):
            return None
        try:
            return self._got_xattr(inode, name, self.io.call_now("getxattr", self.io.backing.getxattr, fd, name))
        except OSError as error:
            return self._got_xattr(inode, name, _no_xattr(error))

    def _got_xattr(self, inode: Inode, name: bytes, found: bytes | int) -> bytes | int:
        if name in XATTRS_REMEMBERED:
            inode.xattrs = {**inode.xattrs, name: found}
        return found

    async def listxattr(self, inode: Inode) -> list[bytes]:
        names = await self.descriptors.at("listxattr", inode, self.io.backing.listxattr)
        return [name for name in names if not name.startswith(HINTS)]

    async def setxattr(self, inode: Inode, name: bytes, value: bytes) -> None:
        if self.hints is not None and name.startswith(HINTS):
            return await self.hints.set(inode, name, value)
        async with inode.lock:
            if name.startswith(b"security.") and inode.unwritten:
                await self.writeback.flush_locked(inode)  # writing later would take file capabilities away
            await self.setter.change(inode, "setxattr", self.io.backing.setxattr, name, value)

    async def removexattr(self, inode: Inode, name: bytes) -> None:
        if self.hints is not None and name.startswith(HINTS):
            return await self.hints.remove(inode, name)
        async with inode.lock:
            await self.setter.change(inode, "removexattr", self.io.backing.removexattr, name)


def _no_xattr(error: OSError) -> int:
    """The errno that says that there is no such attribute, or raises `error` if that is something else."""
    if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
        raise error
    return error.errno

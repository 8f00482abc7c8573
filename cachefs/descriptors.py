"""How an inode is reached: an O_PATH descriptor, opened when first needed and closed when there are too many.

A descriptor that was closed is found again by the file handle that the backing gave (root, file systems that have them),
or else through a known name relative to the parent's descriptor; in either case its identity is checked.
"""

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from cachefs.backingio import BackingIO
from cachefs.inode import Inode, InodeTable, signature_of
from cachefs.question import is_given_up

T = TypeVar("T")
NAMES_CHANGE = frozenset(("create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename"))  # in the directory given
REMOVES = frozenset(("unlink", "rmdir"))
Renamed = Callable[[Inode, bytes | None, bool], None]
BUDGET_MAX = 4096  # O_PATH descriptors kept open; as many again may serve data, and 10,000 is what we promise


class Descriptors:
    """Owns every O_PATH descriptor. `at` runs a call on one and keeps it open meanwhile.

    `renamed(directory, name, there)` is told of each call that may have changed names in it, when the call is over: now the
    name is there, or is not; None: nobody knows what the call has done.
    """

    def __init__(self, io: BackingIO, table: InodeTable, root_fd: int, budget: int) -> None:
        self.io = io
        self.table = table
        self.budget = budget
        self.renamed: Renamed = lambda directory, name, there: None
        self._open: dict[Inode, None] = {}  # inodes with a descriptor, but the root; oldest first
        table.root.fd = root_fd

    def __len__(self) -> int:
        return len(self._open) + 1

    async def at(self, op: str, inode: Inode, method: Callable[..., T], *args: object) -> T:
        """`method(descriptor of inode, *args)`; a change of names has the name as the first of `args`."""
        inode.fd_busy += 1
        name: object = None
        try:
            fd = self.open_one(inode)
            result = await self.io.call(op, method, fd if fd >= 0 else await self._reach(inode), *args)
            name = args[0] if args and not is_given_up() else None
            return result
        finally:
            inode.fd_busy -= 1
            if op in NAMES_CHANGE:
                self.renamed(inode, name if isinstance(name, bytes) else None, op not in REMOVES)

    def open_one(self, inode: Inode) -> int:
        """A descriptor of it that is open, -1 if there is none. One for data serves as well where calls do not take turns."""
        return inode.fd if inode.fd >= 0 or self.io.backing.blocking else max(inode.reader, inode.writer)

    async def at_two(
        self,
        op: str,
        inode: Inode,
        other: Inode,
        function: Callable[[int, int], T],
        lost: bytes | None = None,
        given: bytes | None = None,
    ) -> T:
        """`function(descriptor of inode, descriptor of other)`, by which the one loses a name, and the other one is given one."""
        inode.fd_busy += 1
        other.fd_busy += 1
        done = False
        try:
            fd = inode.fd if inode.fd >= 0 else await self._reach(inode)
            other_fd = other.fd if other.fd >= 0 else await self._reach(other)
            result = await self.io.call(op, function, fd, other_fd)
            done = not is_given_up()
            return result
        finally:
            inode.fd_busy -= 1
            other.fd_busy -= 1
            self.renamed(inode, lost if done else None, False)
            self.renamed(other, given if done else None, True)

    @asynccontextmanager
    async def holding(self, inode: Inode) -> AsyncIterator[int]:
        """The inode's descriptor, which stays open inside, whatever becomes of its name."""
        inode.fd_busy += 1
        try:
            yield inode.fd if inode.fd >= 0 else await self._reach(inode)
        finally:
            inode.fd_busy -= 1

    def close(self, inode: Inode) -> None:
        """Closes the descriptor, if any, of an inode that is not used any more."""
        if inode.fd >= 0 and inode is not self.table.root:
            self._open.pop(inode, None)
            self.io.backing.close(inode.fd)
            inode.fd = -1

    async def _reach(self, inode: Inode) -> int:
        fd = await self._open_by_handle(inode)
        if fd < 0:
            fd = await self._open_by_name(inode)
        if inode.fd >= 0:  # somebody else was faster while we waited
            self.io.backing.close(fd)
            return inode.fd
        inode.fd = fd
        self._open[inode] = None
        if len(self._open) > self.budget:
            self._close_some()
        return fd

    async def _open_by_handle(self, inode: Inode) -> int:
        if inode.handle is None:
            return -1
        try:
            return await self.io.call("open", self.io.backing.open_handle, inode.handle, os.O_PATH)
        except OSError:
            inode.handle = None
            return -1

    async def _open_by_name(self, inode: Inode) -> int:
        for parent, name in list(inode.names):
            try:
                fd, st = await self.at("open", parent, self.io.backing.open_stat, name, os.O_PATH)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP):
                    raise
                continue
            if self.is_it(inode, st):
                return fd
            self.io.backing.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def is_it(self, inode: Inode, st: os.stat_result) -> bool:
        """Whether these attributes, of what is under one of its names, are the inode's.

        A file far away that is open here may have got another number: sshfs gives one anew when the kernel had forgotten the
        old one. It is told by mode, owner, size and mtime then.
        """
        if (st.st_dev, st.st_ino) == inode.key:
            return True
        by_alias = inode.is_called(st)  # a path's number: what somebody put in its place has it, too
        if not by_alias and (not (self.io.backing.blocking and inode.opens) or self.table.known(st) is not None):
            return False
        seen = (inode.st.st_mode, inode.st.st_uid, inode.st.st_gid, *inode.signature[:2])
        if (st.st_mode, st.st_uid, st.st_gid, *signature_of(st)[:2]) != seen:
            return False
        if not by_alias:
            self.table.rebind(inode, st)
        return True

    def _close_some(self) -> None:
        """Closes the older quarter of what nobody needs at the moment."""
        spare = self.budget // 4
        for inode in list(self._open):
            if spare <= 0:
                break
            if inode.fd_busy or inode.opens or inode.unlinked:
                continue
            if inode.handle is None:
                try:
                    inode.handle = self.io.backing.file_handle(inode.fd)
                except OSError:
                    if not inode.names:
                        continue
            self.close(inode)
            spare -= 1

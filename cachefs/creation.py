"""Making files, directories, symbolic links and devices, and giving each to whoever asked for it."""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachefs.files import Opened
from cachefs.inode import Inode
from cachefs.setattr import SET_ID
from cachefs.xattrs import ACL_DEFAULT

if TYPE_CHECKING:
    from cachefs.fs import FileSystem

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a file is made."""

    uid: int
    gid: int
    umask: int
    gids: frozenset[int] = frozenset()  # all groups, as far as it matters
    pid: int = 0  # 0 = unknown


class Creation:
    """Makes what is new under a name, for a caller, and looks it up."""

    def __init__(self, fs: "FileSystem") -> None:
        self.fs = fs
        self.io = fs.io
        self.backing = fs.backing
        self.descriptors = fs.descriptors
        self.files = fs.files
        self._user = (os.geteuid(), os.getegid())

    async def mknod(self, parent: Inode, name: bytes, mode: int, rdev: int, caller: Caller) -> Inode:
        mode = await self._masked(parent, mode, caller)
        await self.descriptors.at("mknod", parent, self.backing.mknod, name, mode, rdev)
        return await self._made(parent, name, mode, caller, rdev)

    async def mkdir(self, parent: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
        mode, begun = await self._masked(parent, mode, caller), self.fs.listings.begin()
        await self.descriptors.at("mkdir", parent, self.backing.mkdir, name, stat.S_IMODE(mode))
        directory = await self._made(parent, name, stat.S_IFDIR, caller)
        if self.backing.blocking and directory.is_dir and directory.lookups == 1 and not (directory.children or directory.opens):
            self.fs.listings.made(directory, begun)
        return directory

    async def symlink(self, parent: Inode, name: bytes, target: bytes, caller: Caller) -> Inode:
        await self.descriptors.at("symlink", parent, self.backing.symlink, name, target)
        return await self._made(parent, name, stat.S_IFLNK, caller)

    async def _made(self, parent: Inode, name: bytes, mode: int, caller: Caller, rdev: int = 0) -> Inode:
        """Gives what was just made under `name` to the caller, set-id bits included if `mode` has them; looks it up.

        Whoever may write SOURCE can have put something else there by now. So it is given away by descriptor, and only if it
        is no different from new; else it stays whose it is.
        """
        if (caller.uid, caller.gid) == self._user:
            return await self.fs.lookup(parent, name)
        gid = await self._group_for(parent, caller)

        def give(dirfd: int) -> os.stat_result:
            fd, st = self.backing.open_stat(dirfd, name, os.O_PATH)
            try:
                if not self._is_new(fd, st, mode, rdev):
                    return st
                with contextlib.suppress(PermissionError):  # a backing that lets nobody give files away
                    self.backing.chown(fd, caller.uid, gid)
                    if mode & SET_ID:
                        self.backing.chmod(fd, stat.S_IMODE(mode))
                return self.backing.fstat(fd)
            finally:
                self.backing.close(fd)

        inode = self.fs.found(parent, name, await self.descriptors.at("chown", parent, give))
        inode.lookups += 1
        return inode

    def _is_new(self, fd: int, st: os.stat_result, mode: int, rdev: int) -> bool:
        """Whether this is no different from a node just made by us: of that kind, ours, empty, and with no other name."""
        if stat.S_IFMT(st.st_mode) != (stat.S_IFMT(mode) or stat.S_IFREG) or st.st_uid != self._user[0] or st.st_rdev != rdev:
            return False
        if stat.S_ISDIR(st.st_mode):
            return not self.backing.listdir(fd)
        return st.st_nlink == 1 and not (stat.S_ISREG(st.st_mode) and st.st_size)

    async def _group_for(self, parent: Inode, caller: Caller) -> int:
        st = await self.descriptors.at("stat", parent, self.backing.fstat)
        return st.st_gid if st.st_mode & stat.S_ISGID else caller.gid

    async def _masked(self, parent: Inode, mode: int, caller: Caller) -> int:
        """The mode less the umask, unless the directory has a default ACL, which takes the umask's place."""
        if mode & caller.umask:
            try:
                await self.descriptors.at("getxattr", parent, self.backing.getxattr, ACL_DEFAULT)
            except OSError:
                return mode & ~caller.umask
        return mode

    def create_now(self, parent: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Inode, Opened] | None:
        """`create` in a local directory, for the user that we are, in plain code; None, and nothing done, where it is another."""
        dirfd = parent.fd
        if dirfd < 0 or (caller.uid, caller.gid) != self._user:
            return None
        if mode & caller.umask:
            try:
                self.io.call_now("getxattr", self.backing.getxattr, dirfd, ACL_DEFAULT)
            except OSError:
                mode &= ~caller.umask
        try:
            fd, st = self.io.call_now("create", self.backing.open_stat, dirfd, name, NEW, stat.S_IMODE(mode))
        finally:
            self.descriptors.renamed(parent, None, True)
        return self._created(parent, name, fd, st, flags, caller)

    def _created(
        self, parent: Inode, name: bytes, fd: int, st: os.stat_result, flags: int, caller: Caller
    ) -> tuple[Inode, Opened]:
        inode = self.fs.found(parent, name, st)
        inode.lookups += 1
        return inode, self.files.open_created(inode, fd, flags, caller.uid, caller.gids, caller.pid)

    async def create(self, parent: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Inode, Opened]:
        """Makes and opens a regular file; ESTALE if one appeared meanwhile."""
        mode = await self._masked(parent, mode, caller)
        try:
            fd, st = await self.descriptors.at("create", parent, self.backing.open_stat, name, NEW, stat.S_IMODE(mode))
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            # It appeared meanwhile, and nobody has checked whether the caller may open it: the kernel is to look again.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None
        try:
            if (caller.uid, caller.gid) != self._user:
                gid = await self._group_for(parent, caller)
                with contextlib.suppress(PermissionError):
                    await self.io.call("chown", self.backing.chown, fd, caller.uid, gid)
                if mode & SET_ID:
                    await self.io.call("chmod", self.backing.chmod, fd, stat.S_IMODE(mode))
                st = await self.io.call("stat", self.backing.fstat, fd)
        except BaseException:
            self.io.close(fd)
            raise
        return self._created(parent, name, fd, st, flags, caller)

"""The file system without FUSE: names, attributes and directories, straight to the backing and back.

Every method may raise OSError and nothing else. Callers are named by uid, gid and umask; whether they may do what they
ask has been decided before (the kernel does, by mode bits and ACLs).
"""

import contextlib
import errno
import math
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import trio

from backing.base import RENAME_EXCHANGE
from cachefs.backingio import BackingIO
from cachefs.cache import leaving
from cachefs.descriptors import Descriptors
from cachefs.directories import Directories
from cachefs.files import Files, Opened, now_ns
from cachefs.inode import NO_XATTRS, Inode, InodeTable
from cachefs.listings import Listings
from cachefs.writeback import Writeback

HINTS = b"user.cachefs."
ACL_DEFAULT = b"system.posix_acl_default"
# What the kernel asks for on its own when it checks whether somebody may go somewhere or run something.
XATTRS_REMEMBERED = frozenset((b"system.posix_acl_access", ACL_DEFAULT, b"security.capability"))
SET_ID = stat.S_ISUID | stat.S_ISGID


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a file is made."""

    uid: int
    gid: int
    umask: int
    gids: frozenset[int] = frozenset()  # all groups, as far as it matters
    pid: int = 0  # 0 = unknown


@dataclass(frozen=True, slots=True)
class Changes:
    """What setattr is to change; None = leave it."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class VirtualAttributes(Protocol):
    """Extended attributes of regular files that exist on the mount alone; the methods raise OSError."""

    def get(self, inode: Inode, name: bytes) -> bytes: ...

    async def set(self, inode: Inode, name: bytes, value: bytes) -> None: ...

    async def remove(self, inode: Inode, name: bytes) -> None: ...


class FileSystem:
    """Names and attributes. `files` has the data side."""

    def __init__(
        self, io: BackingIO, table: InodeTable, descriptors: Descriptors, files: Files, writeback: Writeback
    ) -> None:
        self.io = io
        self.backing = io.backing
        self.table = table
        self.descriptors = descriptors
        self.files = files
        self.writeback = writeback
        self.hints: VirtualAttributes | None = None  # for names that begin with HINTS
        self.listings = Listings(files.ttl_seconds)
        self.directories = Directories(self, files, descriptors, self.listings)
        self._looking: dict[Inode, trio.Event] = {}  # directories whose attributes are being read since we changed names there
        if io.backing.blocking:
            descriptors.renamed = self._renamed
        self._idle: dict[Inode, None] = {}  # inodes that nobody uses but that have cached pages, in the order of the last look
        self._user = (os.geteuid(), os.getegid())
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
        try:
            st = await self.descriptors.at("lookup", parent, self.backing.stat, name)
        except FileNotFoundError:
            if self.table.named(parent, name) is known:  # else the name was given meanwhile, after this answer
                self.table.nothing_at(parent, name)
            raise
        return self.found(parent, name, st)

    def lookup_known(self, parent: Inode, name: bytes) -> Inode | None:
        """`lookup` from memory, for when the backing does not answer; None if we know of no such name."""
        inode = self.table.named(parent, name)
        if inode is not None:
            inode.lookups += 1
        return inode

    async def unlook(self, inode: Inode) -> None:
        """Takes a lookup back of which the kernel was not told."""
        self.forget(inode.node, 1)

    def found(self, parent: Inode, name: bytes, st: os.stat_result) -> Inode:
        inode = self.table.add(st)
        self.table.name(inode, parent, name)
        self.files.absorb(inode, st)
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

    def _renamed(self, directory: Inode) -> None:
        """We have changed names in a directory far away: neither its listing nor its attributes are known any more.

        The kernel will ask for the latter before it goes through that directory again, so they are read while it does not wait.
        """
        self.listings.changed(directory)
        directory.epoch += 1
        directory.checked_at = -math.inf
        if directory not in self._looking and self.io.watchdog.tasks is not None:
            self._looking[directory] = trio.Event()
            self.io.watchdog.tasks.start_soon(self._look_again, directory)

    async def _look_again(self, directory: Inode) -> None:
        try:
            await self.files.refresh(directory)
        except OSError:
            return  # whoever needs them finds out
        finally:
            self._looking.pop(directory).set()
            self.drop(directory)

    # --- attributes ----------------------------------------------------------------------------------------------------

    async def getattr(self, inode: Inode) -> None:
        """Brings `inode.attributes()` up to date, if the backing answers."""
        if not self.files.believed(inode):
            await self.io.ask(self._refreshed, inode, memory=lambda: inode)

    async def _refreshed(self, inode: Inode) -> Inode:
        if inode in self._looking:
            await self._looking[inode].wait()
        if not self.files.believed(inode):
            await self.files.refresh(inode)
        return inode

    async def setattr(self, inode: Inode, changes: Changes, uid: int, gids: frozenset[int] = frozenset()) -> None:
        async with inode.lock:
            if changes.size is not None:
                await self.files.truncate_locked(inode, changes.size)
            if changes.uid is not None or changes.gid is not None or changes == Changes():  # chown(-1, -1) is one, too
                owner, group = (-1 if number is None else number for number in (changes.uid, changes.gid))
                known = {name: number for name, number in (("st_uid", owner), ("st_gid", group)) if number != -1}
                if self._has_already(inode, known):
                    inode.ctime_shown = (inode.st.st_ctime_ns, now_ns(inode))
                else:
                    await self._change(inode, "chown", self.backing.chown, owner, group, **known)
            if changes.mode is not None:
                await self._chmod(inode, changes.mode)
            if changes.atime_ns is not None or changes.mtime_ns is not None:
                await self._set_times(inode, changes.atime_ns, changes.mtime_ns)
        if changes.size is not None and uid and inode.st.st_mode & SET_ID:
            await self.files.kill_set_id(inode, gids)

    def _has_already(self, inode: Inode, owner: dict[str, int]) -> bool:
        """Whether a chown would change nothing of a file just made far away, not written yet: tar gives each to who has it.

        Writing it takes away, as chown does, what is not looked at here (file capabilities).
        """
        if not owner or not self._is_being_made(inode) or inode.st.st_mode & SET_ID:
            return False
        return all(getattr(inode.st, field) == number for field, number in owner.items())

    def _is_being_made(self, inode: Inode) -> bool:
        return inode.made and inode.unwritten and not inode.unlinked and self.files.believed(inode)

    async def _chmod(self, inode: Inode, mode: int) -> None:
        if mode & SET_ID and inode.unwritten:
            # What is written to the backing later may clear these bits there: write it first.
            await self.writeback.flush_locked(inode)
        mode = stat.S_IMODE(mode)
        await self._change(inode, "chmod", self.backing.chmod, mode, st_mode=stat.S_IFMT(inode.st.st_mode) | mode)

    async def _set_times(self, inode: Inode, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Those of a file just made far away go there with its data, which sets the mtime anyway. Nobody refuses them then."""
        if self._is_being_made(inode):
            inode.atime_ns = inode.atime_ns if atime_ns is None else atime_ns
            inode.mtime_ns = inode.mtime_ns if mtime_ns is None else mtime_ns
            inode.ctime_shown = (inode.st.st_ctime_ns, now_ns(inode))
            inode.epoch += 1
            self.files.keeper.changed(inode)
            return
        await self.files.notice_locked(inode)
        self.files.keeper.touching(inode, mtime_ns)
        try:
            await self.descriptors.at("utime", inode, self.backing.utime, atime_ns, mtime_ns)
        except OSError:
            self.files.keeper.changed(inode)  # it is as it was
            raise
        inode.atime_ns = inode.atime_ns if atime_ns is None else None
        inode.mtime_ns = inode.mtime_ns if mtime_ns is None else mtime_ns
        times = (("st_atime_ns", atime_ns), ("st_mtime_ns", mtime_ns))
        await self._changed(inode, True, {name: time_ns for name, time_ns in times if time_ns is not None})

    async def _change(self, inode: Inode, op: str, method: Callable[..., None], *args: object, **known: int) -> None:
        """A change to the inode itself, under `inode.lock`, but not of contents or times; `known` as in `Files.readopt`."""
        await self.descriptors.at(op, inode, method, *args)
        await self._changed(inode, False, known)

    async def _changed(self, inode: Inode, contents: bool, known: dict[str, int]) -> None:
        """What a change has done to the backing's ctime is ours."""
        inode.xattrs = NO_XATTRS
        await self.files.readopt(inode, contents, **known)
        inode.ctime_shown = (inode.ctime_shown[0], inode.st.st_ctime_ns)

    # --- making --------------------------------------------------------------------------------------------------------

    async def mknod(self, parent: Inode, name: bytes, mode: int, rdev: int, caller: Caller) -> Inode:
        mode = await self._masked(parent, mode, caller)
        await self.descriptors.at("mknod", parent, self.backing.mknod, name, mode, rdev)
        return await self._made(parent, name, mode, caller, rdev)

    async def mkdir(self, parent: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
        mode = await self._masked(parent, mode, caller)
        await self.descriptors.at("mkdir", parent, self.backing.mkdir, name, stat.S_IMODE(mode))
        return await self._made(parent, name, stat.S_IFDIR, caller)

    async def symlink(self, parent: Inode, name: bytes, target: bytes, caller: Caller) -> Inode:
        await self.descriptors.at("symlink", parent, self.backing.symlink, name, target)
        return await self._made(parent, name, stat.S_IFLNK, caller)

    async def _made(self, parent: Inode, name: bytes, mode: int, caller: Caller, rdev: int = 0) -> Inode:
        """Gives what was just made under `name` to the caller, set-id bits included if `mode` has them; looks it up.

        Whoever may write SOURCE can have put something else there by now. So it is given away by descriptor, and only if it
        is no different from new; else it stays whose it is.
        """
        if (caller.uid, caller.gid) == self._user:
            return await self.lookup(parent, name)
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

        inode = self.found(parent, name, await self.descriptors.at("chown", parent, give))
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

    async def create(self, parent: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Inode, Opened]:
        """Makes and opens a regular file; ESTALE if one appeared meanwhile."""
        mode = await self._masked(parent, mode, caller)
        how = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            fd, st = await self.descriptors.at("create", parent, self.backing.open_stat, name, how, stat.S_IMODE(mode))
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
        inode = self.found(parent, name, st)
        inode.lookups += 1
        return inode, self.files.open_created(inode, fd, flags, caller.uid, caller.gids, caller.pid)

    async def uncreate(self, made: tuple[Inode, Opened]) -> None:
        """Closes what was created too late for anybody to be told. The file stays."""
        inode, opened = made
        inode.lookups -= 1
        await self.unopen(opened)

    async def unopen(self, opened: Opened) -> None:
        """Closes a handle of which the kernel was not told."""
        inode = self.files.handles[opened.number].inode
        await self.files.release(opened.number)
        self.drop(inode)

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> Inode:
        def link(fd: int, dirfd: int) -> None:
            self.backing.link(fd, dirfd, name)

        await self.descriptors.at_two("link", inode, parent, link)
        self.table.name(inode, parent, name)
        self.files.keeper.moved(inode)
        await self.files.readopt(inode, st_nlink=inode.st.st_nlink + 1)
        inode.lookups += 1
        return inode

    async def readlink(self, inode: Inode) -> bytes:
        inode.target = await self.descriptors.at("readlink", inode, self.backing.readlink)
        return inode.target

    # --- removing and renaming -----------------------------------------------------------------------------------------

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
        if await self.files.readopt(inode):
            gone = inode.st.st_nlink == 0
        else:  # nobody knows: data that may still have a name is not to be thrown away
            gone = before is None or before.st_nlink <= 1 or inode.is_dir
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

        st, inode = await self._peek(parent, name)
        async with self._going(new_parent, new_name) as (target_st, target):
            if inode is not None:
                self._moving(inode, parent, name, new_parent, new_name)
            if target is not None and flags & RENAME_EXCHANGE:
                self._moving(target, new_parent, new_name, parent, name)
            await self.descriptors.at_two("rename", parent, new_parent, rename)
            if st is not None and target_st is not None and (st.st_dev, st.st_ino) == (target_st.st_dev, target_st.st_ino):
                return  # two names of one file: nothing happens
            self.table.nothing_at(parent, name)
            self.table.nothing_at(new_parent, new_name)
            if target is not None:
                self.table.unname(target, new_parent, new_name)
                if flags & RENAME_EXCHANGE:
                    self.table.name(target, parent, name)
                    self._moved(target)
                    await self.files.readopt(target)
                else:
                    await self._lost_a_name(target, target_st)
        if inode is not None:
            self.table.unname(inode, parent, name)
            self.table.name(inode, new_parent, new_name)
            self._moved(inode)
            self.files.opened(inode)
            await self.files.readopt(inode)

    def _moving(self, inode: Inode, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes) -> None:
        """Unwritten files that a rename is about to give other paths can be found under both until it is done."""
        before, after = self.table.path_in(parent, name), self.table.path_in(new_parent, new_name)
        for moving in self.writeback.dirty if inode.is_dir else (inode,):
            self.files.keeper.moving(moving, before, after)

    def _moved(self, inode: Inode) -> None:
        for moved in self.writeback.dirty if inode.is_dir else (inode,):
            self.files.keeper.moved(moved)

    # --- the rest ------------------------------------------------------------------------------------------------------

    async def statvfs(self) -> os.statvfs_result:
        self.statvfs_known = await self.descriptors.at("statvfs", self.table.root, self.backing.statvfs)
        return self.statvfs_known

    async def getxattr(self, inode: Inode, name: bytes) -> bytes | int:
        """A value, or the errno that says why there is none. Some are remembered, see `Inode.xattrs`."""
        if self.hints is not None and name.startswith(HINTS):
            return self.hints.get(inode, name)
        try:
            return self._got_xattr(inode, name, await self.descriptors.at("getxattr", inode, self.backing.getxattr, name))
        except OSError as error:
            return self._got_xattr(inode, name, _no_xattr(error))

    def getxattr_now(self, inode: Inode, name: bytes) -> bytes | int | None:
        """The same of a local file that is open already, in plain code; None, and nothing done, where it may have to wait."""
        fd = self.descriptors.open_one(inode)
        if fd < 0 or name.startswith(HINTS):
            return None
        try:
            return self._got_xattr(inode, name, self.io.call_now("getxattr", self.backing.getxattr, fd, name))
        except OSError as error:
            return self._got_xattr(inode, name, _no_xattr(error))

    def _got_xattr(self, inode: Inode, name: bytes, found: bytes | int) -> bytes | int:
        if name in XATTRS_REMEMBERED:
            inode.xattrs = {**inode.xattrs, name: found}
        return found

    async def listxattr(self, inode: Inode) -> list[bytes]:
        names = await self.descriptors.at("listxattr", inode, self.backing.listxattr)
        return [name for name in names if not name.startswith(HINTS)]

    async def setxattr(self, inode: Inode, name: bytes, value: bytes) -> None:
        if self.hints is not None and name.startswith(HINTS):
            return await self.hints.set(inode, name, value)
        async with inode.lock:
            if name.startswith(b"security.") and inode.unwritten:
                await self.writeback.flush_locked(inode)  # writing later would take file capabilities away
            await self._change(inode, "setxattr", self.backing.setxattr, name, value)

    async def removexattr(self, inode: Inode, name: bytes) -> None:
        if self.hints is not None and name.startswith(HINTS):
            return await self.hints.remove(inode, name)
        async with inode.lock:
            await self._change(inode, "removexattr", self.backing.removexattr, name)

    async def make_durable(self, inodes: Iterable[Inode]) -> None:
        """What was written back of these files is durable, whatever other names and files the backing syncs with them."""
        if self.backing.blocking:  # it may keep a syncfs to itself (FUSE does)
            for inode in inodes:
                if not inode.unlinked:
                    await self.files.make_durable(inode)
        await self.syncfs()

    async def syncfs(self) -> None:
        """Everything that was written back, and every name, is durable when this returns without error."""
        await self.io.in_thread("syncfs", self.backing.syncfs, self.table.root.fd)


def _no_xattr(error: OSError) -> int:
    """The errno that says that there is no such attribute, or raises `error` if that is something else."""
    if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
        raise error
    return error.errno

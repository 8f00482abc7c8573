"""The FUSE side: pyfuse3 requests become calls of `FileSystem` and `Files`, errors become errnos, and nothing more."""

import contextlib
import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FlagT, FUSEError, InodeT, ModeT, RequestContext, SetattrFields

from backing.base import Entry
from cachefs.creation import Caller
from cachefs.directories import STATS_AT_ONCE
from cachefs.files import Files, Opened
from cachefs.fs import FileSystem
from cachefs.inode import Attributes, Inode
from cachefs.listings import KnownAbsent
from cachefs.setattr import Changes
from cachefs.statistics import Histogram

log = logging.getLogger(__name__)
REPLY_TO_NOBODY = f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}"
F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

STATVFS_FIELDS = (
    "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax",
)  # fmt: skip


def request(method: F) -> F:
    """A handler: timed, and nothing but FUSEError leaves it, since anything else would end the mount."""
    op = method.__name__

    @functools.wraps(method)
    async def handler(self: "Operations", *args: Any) -> Any:
        start = time.perf_counter()
        if self.rouse is not None:
            rouse, self.rouse = self.rouse, None
            rouse()
        try:
            return await method(self, *args)
        except FUSEError:
            raise
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s failed", op)
            raise FUSEError(errno.EIO) from None
        finally:
            self.durations[op].observe(time.perf_counter() - start)

    handler.is_request = True  # type: ignore[attr-defined]
    return handler  # type: ignore[return-value]


def wanted(record: logging.LogRecord) -> bool:
    """Whether a message of pyfuse3 is of interest: not that nobody was there to be answered or told, as at an unmount."""
    message = record.getMessage()
    return not (message.endswith(REPLY_TO_NOBODY) or message.startswith("Failed to submit invalidate_entry"))


def caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.umask, frozenset((ctx.gid,)), ctx.pid)


def groups_of(ctx: RequestContext, inode: Inode) -> frozenset[int]:
    """The caller's groups; the supplementary ones cost a look into /proc and are asked for only where they decide anything."""
    if not ctx.uid or inode.st.st_mode & (stat.S_ISGID | stat.S_IXGRP) != stat.S_ISGID:
        return frozenset((ctx.gid,))
    try:
        return frozenset((ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)))
    except (OSError, RuntimeError):  # it is gone, or in another pid namespace
        return frozenset((ctx.gid,))


def blocks_of(seen: Attributes) -> int:
    """Those of what is not written yet as well: programs take 0 for "all hole" and would not read it."""
    st = seen.st
    return st.st_blocks if seen.size == st.st_size else max(st.st_blocks, (seen.size + 511) // 512)


class Operations(pyfuse3.Operations):
    """pyfuse3's handlers. `kernel_cache` is what the kernel may keep: off | open | keep.

    `forget_attributes(node)` makes the kernel ask for them again. What `_entry`, `_attr`, `_nothing`, `_info` and `_statfs` make
    is what the transport takes for an answer, what `_changes` takes is what it has: pyfuse3's objects here.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(
        self,
        fs: FileSystem,
        kernel_cache: str,
        ttl_seconds: float,
        forget_attributes: Callable[[int], None],
        on_init: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.fs = fs
        self.files: Files = fs.files
        self.ask = fs.io.ask
        self.kernel_cache = kernel_cache
        self.ttl_seconds = ttl_seconds
        self.forget_attributes = forget_attributes
        self.on_init = on_init
        names = [name for name in dir(type(self)) if hasattr(getattr(type(self), name), "is_request")]
        self.durations = {name: Histogram() for name in names}
        self.rouse: Callable[[], None] | None = None  # to be called once, before the next request is handled

        logging.getLogger("pyfuse3").addFilter(wanted)

    def init(self) -> None:
        self.on_init()

    # --- attributes ----------------------------------------------------------------------------------------------------

    def _inode(self, node: int) -> Inode:
        try:
            return self.fs.table.get(node)
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    def _attr_seconds(self, inode: Inode) -> float:
        """How long the kernel may believe them: what was read a while ago, only for the rest of the time."""
        return max(0.0, inode.checked_at + self.ttl_seconds - trio.current_time())

    def _attr(self, inode: Inode) -> EntryAttributes:
        """Attributes alone, with no name."""
        return self._entry(inode)

    def _changes(self, attr: EntryAttributes, fields: SetattrFields) -> Changes:
        return Changes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )

    def _nothing(self, seconds: float | None = None) -> EntryAttributes:
        """That there is no such name; `seconds`: how long the kernel may believe it, if it was not looked up just now."""
        nothing = EntryAttributes()  # its inode is 0
        nothing.entry_timeout = self.ttl_seconds if seconds is None else seconds
        return nothing

    def _entry(self, inode: Inode, name_seconds: float | None = None) -> EntryAttributes:
        """`name_seconds`: how long the kernel may believe the name, if that was not looked up just now."""
        seen = inode.attributes()
        st, entry = seen.st, EntryAttributes()
        entry.st_ino = InodeT(inode.node)
        entry.st_mode = ModeT(st.st_mode)
        entry.st_nlink = st.st_nlink
        entry.st_uid = st.st_uid
        entry.st_gid = st.st_gid
        entry.st_rdev = st.st_rdev
        entry.st_size = seen.size
        entry.st_blksize = st.st_blksize
        entry.st_blocks = blocks_of(seen)
        entry.st_atime_ns = st.st_atime_ns
        entry.st_mtime_ns = seen.mtime_ns
        entry.st_ctime_ns = seen.ctime_ns
        entry.entry_timeout = self.ttl_seconds if name_seconds is None else name_seconds
        entry.attr_timeout = self._attr_seconds(inode)
        return entry

    @request
    async def lookup(self, parent: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            inode, known = self._inode(parent), self.fs.lookup_known
            found = await self.ask(self.fs.lookup, inode, name, memory=lambda: known(inode, name), undo=self.fs.unlook)
            return self._entry(found)
        except KnownAbsent as error:
            return self._nothing(error.seconds)
        except FileNotFoundError:
            return self._nothing()

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for node, lookups in inode_list:
            try:
                self.fs.forget(node, lookups)
            except Exception:
                log.exception("forget failed")

    @request
    async def getattr(self, node: InodeT, ctx: RequestContext) -> EntryAttributes:
        inode = self._inode(node)
        await self.fs.getattr(inode)
        return self._attr(inode)

    @request
    async def setattr(
        self, node: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None, ctx: RequestContext
    ) -> EntryAttributes:
        inode = self._inode(node)
        await self.ask(self.files.setter.setattr, inode, self._changes(attr, fields), ctx.uid, groups_of(ctx, inode))
        return self._attr(inode)

    @request
    async def access(self, node: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        return True  # the kernel has checked (default_permissions)

    # --- names ---------------------------------------------------------------------------------------------------------

    @request
    async def readlink(self, node: InodeT, ctx: RequestContext) -> bytes:
        inode = self._inode(node)
        return await self.ask(self.fs.readlink, inode, memory=lambda: inode.target)

    @request
    async def mknod(self, parent: InodeT, name: bytes, mode: ModeT, rdev: int, ctx: RequestContext) -> EntryAttributes:
        made = await self.ask(self.fs.creation.mknod, self._inode(parent), name, mode, rdev, caller(ctx), undo=self.fs.unlook)
        return self._entry(made)

    @request
    async def mkdir(self, parent: InodeT, name: bytes, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        made = await self.ask(self.fs.creation.mkdir, self._inode(parent), name, mode, caller(ctx), undo=self.fs.unlook)
        return self._entry(made)

    @request
    async def symlink(self, parent: InodeT, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        made = await self.ask(self.fs.creation.symlink, self._inode(parent), name, target, caller(ctx), undo=self.fs.unlook)
        return self._entry(made)

    @request
    async def link(self, node: InodeT, parent: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = await self.ask(self.fs.link, self._inode(node), self._inode(parent), name, undo=self.fs.unlook)
        return self._entry(inode)

    @request
    async def unlink(self, parent: InodeT, name: bytes, ctx: RequestContext) -> None:
        await self.ask(self.fs.unlink, self._inode(parent), name)

    @request
    async def rmdir(self, parent: InodeT, name: bytes, ctx: RequestContext) -> None:
        await self.ask(self.fs.rmdir, self._inode(parent), name)

    @request
    async def rename(
        self, old: InodeT, name: bytes, new: InodeT, new_name: bytes, flags: FlagT, ctx: RequestContext
    ) -> None:
        await self.ask(self.fs.rename, self._inode(old), name, self._inode(new), new_name, flags)

    # --- directories ---------------------------------------------------------------------------------------------------

    @request
    async def opendir(self, node: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(self.fs.directories.open(self._inode(node), ctx.pid))

    @request
    async def readdir(self, fh: FileHandleT, start: int, token: pyfuse3.ReaddirToken) -> None:
        listing = await self.ask(self.fs.directories.listing, fh, start)
        while start < 2:  # the kernel takes no lookup count for these two
            inode = self.fs.directories.handles[fh].inode
            if not self._add(token, (b".", b"..")[start], self._entry(inode), start + 1):
                return
            start += 1
        if start - 2 >= len(listing):
            self.fs.directories.ended(fh)
        elif self._add_names(fh, token, listing, start):
            return
        while start - 2 < len(listing):
            some = [entry.name for entry in listing[start - 2 : start - 2 + STATS_AT_ONCE]]
            found = await self._entries(fh, some)
            for i, entry in enumerate(found):
                start += 1
                if entry is None:
                    continue
                answer = self._entry(entry, self.fs.directories.name_seconds(fh, some[i]))
                if not self._add(token, some[i], answer, start):
                    for unsent in filter(None, found[i:]):
                        self.fs.forget(unsent.node, 1)
                    return

    def _add_names(self, fh: FileHandleT, token: pyfuse3.ReaddirToken, listing: Sequence[Entry], start: int) -> bool:
        """Adds names without attributes if these are not wanted; pyfuse3 can add none."""
        return False

    def _add(self, token: pyfuse3.ReaddirToken, name: bytes, entry: EntryAttributes, next_offset: int) -> bool:
        """Whether there was room for it."""
        return pyfuse3.readdir_reply(token, name, entry, next_offset)

    async def _entries(self, fh: FileHandleT, names: Sequence[bytes]) -> list[Inode | None]:
        known = functools.partial(self.fs.directories.entries_known, fh, names)
        return await self.ask(self.fs.directories.entries, fh, names, memory=known, undo=self.fs.directories.unlook_all)

    @request
    async def releasedir(self, fh: FileHandleT) -> None:
        self.fs.directories.close(fh)

    @request
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self.ask(self.fs.directories.sync, fh)

    # --- files ---------------------------------------------------------------------------------------------------------

    def _info(self, opened: Opened) -> FileInfo:
        keep = self.kernel_cache == "keep" and opened.unchanged
        return FileInfo(fh=FileHandleT(opened.number), direct_io=self.kernel_cache == "off", keep_cache=keep)

    @request
    async def open(self, node: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        inode = self._inode(node)
        arguments = (inode, flags, ctx.uid, groups_of(ctx, inode), ctx.pid)
        opened = self.files.open_known(*arguments) if self.files.attributes.believed(inode) else None  # nothing to ask for
        if opened is None:
            known = functools.partial(self.files.open_known, *arguments)
            opened = await self.ask(self.files.open, *arguments, memory=known, undo=self.fs.unopen)
        if opened.attributes_changed:
            self.forget_quietly(node)
        return self._info(opened)

    def forget_quietly(self, node: int) -> None:
        """Or the kernel would go on with the size it knows until its time is over. Waits for nobody: it touches no pages."""
        with contextlib.suppress(OSError):
            self.forget_attributes(node)

    @request
    async def create(
        self, parent: InodeT, name: bytes, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        arguments = (self._inode(parent), name, mode, flags, caller(ctx))
        inode, opened = await self.ask(self.fs.creation.create, *arguments, undo=self.fs.uncreate)
        return self._info(opened), self._entry(inode)

    @request
    async def read(self, fh: FileHandleT, offset: int, size: int) -> memoryview | bytes:  # type: ignore[override]  # any buffer
        return await self.files.read(fh, offset, size)

    @request
    async def write(self, fh: FileHandleT, offset: int, data: bytes) -> int:
        return await self.files.write(fh, offset, data)

    @request
    async def flush(self, fh: FileHandleT) -> None:
        await self.files.flush(fh)

    @request
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self.ask(self.files.fsync, fh, datasync)

    @request
    async def release(self, fh: FileHandleT) -> None:
        inode = self.files.handles[fh].inode
        await self.files.release(fh)
        self.fs.drop(inode)

    # --- the rest ------------------------------------------------------------------------------------------------------

    @request
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        return self._statfs(await self.ask(self.fs.statvfs, memory=lambda: self.fs.statvfs_known))

    def _statfs(self, theirs: os.statvfs_result) -> pyfuse3.StatvfsData:
        ours = pyfuse3.StatvfsData()
        for field in STATVFS_FIELDS:
            setattr(ours, field, getattr(theirs, field))
        return ours

    @request
    async def getxattr(self, node: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        inode = self._inode(node)
        found = await self.ask(self.fs.xattrs.getxattr, inode, name, memory=lambda: inode.xattrs.get(name))
        if isinstance(found, int):
            raise FUSEError(found)
        return found

    @request
    async def listxattr(self, node: InodeT, ctx: RequestContext) -> Sequence[bytes]:
        return await self.ask(self.fs.xattrs.listxattr, self._inode(node))

    @request
    async def setxattr(self, node: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self.ask(self.fs.xattrs.setxattr, self._inode(node), name, value)

    @request
    async def removexattr(self, node: InodeT, name: bytes, ctx: RequestContext) -> None:
        await self.ask(self.fs.xattrs.removexattr, self._inode(node), name)

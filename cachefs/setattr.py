"""Changes to an inode itself, made in the backing at once: size, owner, mode and times, as setattr of FUSE has them.

They are made under `inode.lock`, which keeps writeback and each other away; but set-id bits go without. What a change has left
is taken in at its end.
"""

import stat
from collections.abc import Callable
from typing import NamedTuple

from cachefs.attributes import AttributeCache, now_ns
from cachefs.backingio import BackingIO
from cachefs.cache import leaving
from cachefs.cache.pagecache import PageCache
from cachefs.descriptors import Descriptors
from cachefs.inode import NO_XATTRS, Inode
from cachefs.keeper import Keeper
from cachefs.writeback import Writeback

SET_ID = stat.S_ISUID | stat.S_ISGID


class Changes(NamedTuple):
    """What setattr is to change; None = leave it."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class AttributeSetter:
    """Changes attributes of files that are open or not."""

    def __init__(
        self,
        io: BackingIO,
        descriptors: Descriptors,
        cache: PageCache,
        writeback: Writeback,
        keeper: Keeper,
        attributes: AttributeCache,
    ) -> None:
        self.io = io
        self.descriptors = descriptors
        self.cache = cache
        self.writeback = writeback
        self.keeper = keeper
        self.attributes = attributes

    def setattr_now(self, inode: Inode, changes: Changes) -> bool:
        """`setattr` of a local file, but for its size, in plain code; False where it may have to wait: it is done anew then.

        Of changes of several kinds, none is done here: the second may go wrong.
        """
        fd, owner = self.descriptors.open_one(inode), (changes.uid, changes.gid) != (None, None)
        times = (changes.atime_ns, changes.mtime_ns) != (None, None)
        if fd < 0 or changes.size is not None or owner + times + (changes.mode is not None) != 1 or inode.locked:
            return False
        backing, call = self.io.backing, self.io.call_now
        if owner:
            call("chown", backing.chown, fd, *(-1 if number is None else number for number in (changes.uid, changes.gid)))
        elif changes.mode is not None:
            if changes.mode & SET_ID and inode.unwritten:
                return False
            call("chmod", backing.chmod, fd, stat.S_IMODE(changes.mode))
        elif not self.attributes.notice_now(inode, fd):
            return False
        else:
            self.keeper.touching(inode, changes.mtime_ns)
            try:
                call("utime", backing.utime, fd, changes.atime_ns, changes.mtime_ns)
            except OSError:
                self.keeper.changed(inode)  # it is as it was
                raise
            self._note_times(inode, changes.atime_ns, changes.mtime_ns)
        inode.xattrs = NO_XATTRS
        self.attributes.adopt(inode, call("stat", backing.fstat, fd), times)
        inode.ctime_shown = (inode.ctime_shown[0], inode.st.st_ctime_ns)
        return True

    async def setattr(self, inode: Inode, changes: Changes, uid: int, gids: frozenset[int] = frozenset()) -> None:
        async with inode.lock:
            if changes.size is not None:
                await self.truncate_locked(inode, changes.size)
            if changes.uid is not None or changes.gid is not None or changes == Changes():  # chown(-1, -1) is one, too
                owner, group = (-1 if number is None else number for number in (changes.uid, changes.gid))
                known = {name: number for name, number in (("st_uid", owner), ("st_gid", group)) if number != -1}
                if self._has_already(inode, known):
                    inode.ctime_shown = (inode.st.st_ctime_ns, now_ns(inode))
                else:
                    await self.change(inode, "chown", self.io.backing.chown, owner, group, **known)
            if changes.mode is not None:
                await self._chmod(inode, changes.mode)
            if changes.atime_ns is not None or changes.mtime_ns is not None:
                await self._set_times(inode, changes.atime_ns, changes.mtime_ns)
        if changes.size is not None and uid and inode.st.st_mode & SET_ID:
            await self.kill_set_id(inode, gids)

    def _has_already(self, inode: Inode, owner: dict[str, int]) -> bool:
        """Whether a chown would change nothing of a file just made far away: tar and SQLite give each to who has it.

        As chown does, writing takes away what is not looked at here (file capabilities); or nothing has been done with it yet.
        """
        untouched = inode.made and inode.done == 1 and not inode.unlinked and self.attributes.believed(inode)
        if not owner or not (untouched or self._is_being_made(inode)) or inode.st.st_mode & SET_ID:
            return False
        return all(getattr(inode.st, field) == number for field, number in owner.items())

    def _is_being_made(self, inode: Inode) -> bool:
        return inode.made and inode.unwritten and not inode.unlinked and self.attributes.believed(inode)

    async def _chmod(self, inode: Inode, mode: int) -> None:
        if mode & SET_ID and inode.unwritten:
            # What is written to the backing later may clear these bits there: write it first.
            await self.writeback.flush_locked(inode)
        mode = stat.S_IMODE(mode)
        await self.change(inode, "chmod", self.io.backing.chmod, mode, st_mode=stat.S_IFMT(inode.st.st_mode) | mode)

    async def _set_times(self, inode: Inode, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Those of a file just made far away go there with its data, which sets the mtime anyway. Nobody refuses them then."""
        if self._is_being_made(inode):
            inode.atime_ns = inode.atime_ns if atime_ns is None else atime_ns
            inode.mtime_ns = inode.mtime_ns if mtime_ns is None else mtime_ns
            inode.ctime_shown = (inode.st.st_ctime_ns, now_ns(inode))
            inode.epoch += 1
            self.keeper.changed(inode)
            return
        await self.attributes.notice_locked(inode)
        self.keeper.touching(inode, mtime_ns)
        try:
            await self.descriptors.at("utime", inode, self.io.backing.utime, atime_ns, mtime_ns)
        except OSError:
            self.keeper.changed(inode)  # it is as it was
            raise
        self._note_times(inode, atime_ns, mtime_ns)
        times = (("st_atime_ns", atime_ns), ("st_mtime_ns", mtime_ns))
        await self._changed(inode, True, {name: time_ns for name, time_ns in times if time_ns is not None})

    def _note_times(self, inode: Inode, atime_ns: int | None, mtime_ns: int | None) -> None:
        """The backing has them."""
        inode.atime_ns = inode.atime_ns if atime_ns is None else None
        inode.mtime_ns = inode.mtime_ns if mtime_ns is None else mtime_ns

    # --- size ----------------------------------------------------------------------------------------------------------

    async def extend(self, inode: Inode, size: int) -> None:
        """Has the backing's file grow to `size`, so that it is known now whether it can."""
        async with inode.lock:
            if size > inode.st.st_size:  # else somebody has gone further while we waited
                await self._truncate_backing(inode, max(size, inode.file.size if inode.file else 0))

    async def truncate(self, inode: Inode, size: int, uid: int, gids: frozenset[int]) -> None:
        """Cuts or grows the file, by a caller of that user and groups."""
        async with inode.lock:
            await self.truncate_locked(inode, size)
        if uid and inode.st.st_mode & SET_ID:
            await self.kill_set_id(inode, gids)

    async def truncate_locked(self, inode: Inode, size: int) -> None:
        """Cuts or grows the file, the backing's at once. Under `inode.lock`, so nothing of it is in writeback."""
        if inode.atime_ns is not None:  # nothing unwritten may be left that it could go with
            await self.descriptors.at("utime", inode, self.io.backing.utime, inode.atime_ns, None)
            inode.atime_ns = None
        await self._truncate_backing(inode, size)
        if inode.file is not None:
            inode.mtime_ns = inode.st.st_mtime_ns
            inode.ctime_shown = (inode.ctime_shown[0], inode.st.st_ctime_ns)
            self.keeper.changed(inode)

    async def _truncate_backing(self, inode: Inode, size: int) -> None:
        await self.attributes.notice_locked(inode)
        backing = self.io.backing
        self.keeper.cut(inode, size)
        inode.busy += 1
        try:
            if inode.writer >= 0:
                await self.io.call("truncate", backing.truncate, inode.writer, size)
            else:
                await self.descriptors.at("truncate", inode, backing.truncate, size)
        except BaseException:
            self.keeper.cut_failed(inode)
            raise
        finally:
            inode.busy -= 1
        if inode.file is not None:  # at once: the backing has it, whatever becomes of the look at its attributes
            leaving.truncate(self.cache, inode.file, size)
            inode.done += 1
            self.keeper.cut_done(inode, size)
        await self.attributes.readopt(inode, contents=True, st_size=size, st_mtime_ns=now_ns(inode))

    async def kill_set_id(self, inode: Inode, gids: frozenset[int]) -> None:
        """A write or truncate by somebody who is not root takes set-user-id away, and set-group-id as well.

        Not from a file that is no program if the writer is in its group (setattr_should_drop_sgid in the kernel's fs/attr.c).
        """
        mode = inode.st.st_mode
        drop = mode & stat.S_ISUID
        if mode & stat.S_IXGRP or inode.st.st_gid not in gids:
            drop |= mode & stat.S_ISGID
        if drop:
            await self.descriptors.at("chmod", inode, self.io.backing.chmod, stat.S_IMODE(mode & ~drop))
            await self.attributes.readopt(inode, st_mode=mode & ~drop)

    # --- every change --------------------------------------------------------------------------------------------------

    async def change(self, inode: Inode, op: str, method: Callable[..., None], *args: object, **known: int) -> None:
        """A change under `inode.lock`, but not of contents or times; `known` as in `AttributeCache.readopt`."""
        await self.descriptors.at(op, inode, method, *args)
        await self._changed(inode, False, known)

    async def _changed(self, inode: Inode, contents: bool, known: dict[str, int]) -> None:
        """What a change has done to the backing's ctime is ours."""
        inode.xattrs = NO_XATTRS
        await self.attributes.readopt(inode, contents, **known)
        inode.ctime_shown = (inode.ctime_shown[0], inode.st.st_ctime_ns)

"""Hard links far away: a backing may show each name of a file as a file of its own, with a count of one, as sshfs does.

Names that were given here are names of one inode all the same: it has the others' identities as `aliases`. They are checked: a
number belongs to a path there, so that what somebody put in its place has it too. When the name goes that the inode was known by,
it goes on by another one. Of names that others gave we know nothing; so what is unwritten is written out before a name goes.
"""

import contextlib
import errno
import functools
import os

from cachefs.attributes import AttributeCache
from cachefs.backingio import BackingIO
from cachefs.descriptors import Descriptors
from cachefs.files import Files
from cachefs.inode import Inode, InodeTable
from cachefs.question import unasked


def alike(st: os.stat_result, other: os.stat_result) -> bool:
    """Whether these may be one file's attributes, for a backing that knows neither numbers nor fractions of a second."""
    ours, theirs = ((one.st_mode, one.st_uid, one.st_gid, one.st_size, int(one.st_mtime)) for one in (st, other))
    return ours == theirs


class Links:
    """For backings far away only."""

    def __init__(self, io: BackingIO, table: InodeTable, descriptors: Descriptors, files: Files) -> None:
        self.backing = io.backing
        self.table = table
        self.descriptors = descriptors
        self.files = files
        self.attributes: AttributeCache = files.attributes

    async def write_first(self, inode: Inode) -> None:
        """Before a name is given: sshfs remembers for a while what it sees by the new one at first."""
        with unasked():
            await self.files.writeback.flush(inode)

    async def note(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """After a name was given."""
        with contextlib.suppress(OSError):
            st = await self.descriptors.at("lookup", parent, self.backing.stat, name)
            if alike(st, inode.st):
                self.table.alias(inode, st)

    async def is_another(self, inode: Inode, parent: Inode, name: bytes, st: os.stat_result) -> os.stat_result | None:
        """Whether what is under an alias is another file by now: its attributes then, and the inode has lost that name.

        Looks at the inode by the name that the backing knows it best by.
        """
        if not self.attributes.believed(inode):
            try:
                await self.attributes.refresh(inode)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                if not inode.fd_busy:
                    self.descriptors.close(inode)
                self._rebind(inode, st)
                self.attributes.absorb(inode, st)
        if inode.unwritten or inode.locked or alike(st, inode.st):
            return None
        # sshfs may show what it saw by this name before a write by another one.
        with contextlib.suppress(PermissionError):  # not root, and the file may not be read: what sshfs shows has to do
            st = await self.descriptors.at("lookup", parent, self._stat_anew, name)
        if inode.unwritten or inode.locked or alike(st, inode.st):
            return None
        self.table.unalias(inode, st)
        self.table.unname(inode, parent, name)
        return st

    async def prepare_for_loss(self, inode: Inode) -> None:
        """Before a name of a file far away goes that may be its last one."""
        if inode.opens and inode.is_regular and inode.reader == inode.writer == -1:
            inode.busy += 1
            try:  # nobody could open it afterwards; sshfs, for one, hides what is open
                await self.files.data.reader(inode)
            except OSError:
                pass
            finally:
                inode.busy -= 1
                self.files.data.settle(inode)
        if inode.unwritten and not inode.made:
            # It may have names that the backing does not tell of. What cannot be written goes: nobody could remove the file else.
            with unasked():
                await self.files.durability.write_out(inode)

    async def has_another_name(self, inode: Inode) -> bool:
        """Of a file on a backing that counts no links: whether a name that it was given is still there; by that it goes on."""
        inode.busy += 1  # its descriptors stay
        inode.fd_busy += 1
        try:
            async with inode.lock:  # no batch of writes is half way
                for parent, name in list(inode.names):
                    with contextlib.suppress(OSError):
                        st = await self.descriptors.at("open", parent, functools.partial(self._go_on_by, inode), name)
                        if st is not None:
                            self._rebind(inode, st)
                            return True
            return False
        finally:
            inode.busy -= 1
            inode.fd_busy -= 1
            self.files.data.settle(inode)

    def _go_on_by(self, inode: Inode, dirfd: int, name: bytes) -> os.stat_result | None:
        """Has the inode's descriptors lead to the file by another name, in a thread; None if that is not its name."""
        fd, st = self.backing.open_stat(dirfd, name, os.O_PATH)
        try:
            if not inode.is_called(st) or (st.st_dev, st.st_ino) == inode.key:
                return st if inode.is_called(st) else None
            st = self._stat_anew(dirfd, name)
            if not inode.is_called(st) or not alike(st, inode.st):
                return None
            for own, flags in {inode.reader: os.O_RDONLY, inode.writer: os.O_RDWR}.items():
                if own >= 0:
                    with contextlib.suppress(OSError):
                        self._redirect(own, self.backing.open(dirfd, name, flags))
            if inode.fd >= 0:
                self.backing.redirect(inode.fd, fd)
            return st
        finally:
            self.backing.close(fd)

    def _stat_anew(self, dirfd: int, name: bytes) -> os.stat_result:
        """Attributes as the store has them: sshfs looks at a file that it opens, the kernel at one whose size is asked for."""
        fd = self.backing.open(dirfd, name, os.O_RDONLY)
        try:
            self.backing.size(fd)
            return self.backing.fstat(fd)
        finally:
            self.backing.close(fd)

    def _redirect(self, fd: int, to: int) -> None:
        try:
            self.backing.redirect(fd, to)
        finally:
            self.backing.close(to)

    def _rebind(self, inode: Inode, st: os.stat_result) -> None:
        """The backing calls it so from now on."""
        if inode.key != (st.st_dev, st.st_ino):
            self.table.rebind(inode, st)
            inode.handle = None
            self.files.keeper.rebound(inode)

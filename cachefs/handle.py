"""Open files and directories: what belongs to one open(2) and not to the inode."""

import os
from collections.abc import Sequence

from backing.base import Entry
from cachefs.cache.account import Account
from cachefs.cache.readahead import Readahead
from cachefs.inode import Inode, Listed


class Handle:
    """An open regular file."""

    __slots__ = ("account", "appends", "errors_seen", "gids", "inode", "last_page", "readahead", "synchronous", "uid", "writable")

    def __init__(self, inode: Inode, flags: int, uid: int, gids: frozenset[int], account: Account) -> None:
        self.inode = inode
        self.account = account  # of the program that opened it: what it reads and writes counts there
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.appends = bool(flags & os.O_APPEND)  # when it was opened; what holds for a WRITE, `wire.is_append` says
        self.synchronous = bool(flags & os.O_DSYNC)  # O_SYNC has that bit too: a write returns when it is durable
        self.uid = uid  # who opened it: READ and WRITE do not say who asks
        self.gids = gids  # the groups that one was in
        self.readahead = Readahead()
        self.last_page = -1  # where the last read ended
        self.errors_seen = inode.error_count  # failures of writeback before this are not this handle's to report


class DirectoryHandle:
    """An open directory. `listing` is what offsets count in: taken at the start, so that it never shifts."""

    __slots__ = ("inode", "kept", "listed", "listing", "pid")

    def __init__(self, inode: Inode, pid: int, kept: bool) -> None:
        self.inode = inode
        self.pid = pid  # of the program, 0 = unknown
        self.kept = kept  # whether the kernel may keep what is sent
        self.listing: Sequence[Entry] | None = None
        self.listed: Listed | None = None  # what the kernel has kept when it has been sent the end; None: nothing to believe

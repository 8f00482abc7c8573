"""Open files and directories: what belongs to one open(2) and not to the inode."""

from cachefs.cache.readahead import Readahead
from cachefs.inode import Inode


class Handle:
    """An open regular file."""

    __slots__ = ("errors_seen", "inode", "last_page", "readahead", "uid", "writable")

    def __init__(self, inode: Inode, writable: bool, uid: int) -> None:
        self.inode = inode
        self.writable = writable
        self.uid = uid  # who opened it: READ and WRITE do not say who asks
        self.readahead = Readahead()
        self.last_page = -1  # where the last read ended
        self.errors_seen = inode.error_count  # failures of writeback before this are not this handle's to report


class DirectoryHandle:
    """An open directory. `names` is the listing that offsets count in: taken at the start, so that it never shifts."""

    __slots__ = ("inode", "names")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.names: list[bytes] | None = None

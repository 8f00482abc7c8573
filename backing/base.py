"""The contract of a store: what cachefs needs from whatever holds the files.

Methods mirror system calls on integer descriptors. Rules that every store keeps:

- a method raises OSError and nothing else; the errno is the one that Linux gives for the same mistake;
- every method may be called from any thread, and no call depends on a position shared between descriptors;
- names are bytes, one component without a slash or a NUL; a symbolic link found there is never followed;
- offsets lie between 0 and 2**63 - 1: callers see to that, for Linux would take -1 for the position of the descriptor;
- where a method takes `fd` it takes O_PATH descriptors too, unless it says otherwise.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from backing.aio import SyncQueue

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


class Entry(NamedTuple):
    """A name in a directory, with what the store tells of it for nothing."""

    name: bytes
    number: int  # st_ino
    kind: int  # S_IFREG, S_IFDIR or S_IFLNK; 0 for what is another one, or not known


class Backing(ABC):
    """A store of files behind system-call-like methods."""

    blocking: bool
    """True: a call may take long (network, simulated distance), so callers use a thread. False: they call inline."""

    @abstractmethod
    def open_root(self) -> int:
        """A new O_PATH descriptor of the top directory."""

    @abstractmethod
    def open(self, dirfd: int, name: bytes, flags: int, mode: int = 0) -> int:
        """A descriptor of `name`. O_NOFOLLOW, O_NONBLOCK, O_CLOEXEC are implied; O_DIRECT and O_APPEND are ignored."""

    def open_stat(self, dirfd: int, name: bytes, flags: int, mode: int = 0) -> tuple[int, os.stat_result]:
        """`open`, and `fstat` of what was opened, in one exchange with a store that is far away."""
        fd = self.open(dirfd, name, flags, mode)
        try:
            return fd, self.fstat(fd)
        except BaseException:
            self.close(fd)
            raise

    @abstractmethod
    def reopen(self, fd: int, flags: int) -> int:
        """Another descriptor of the inode behind `fd`, with access of its own; flags as in `open`, never creating."""

    @abstractmethod
    def redirect(self, fd: int, to: int) -> None:
        """Makes `fd` lead to what `to` leads to, for calls that begin from now on; `to` stays as it is."""

    @abstractmethod
    def close(self, fd: int) -> None:
        """Gives a descriptor back."""

    @abstractmethod
    def stat(self, dirfd: int, name: bytes) -> os.stat_result:
        """Attributes of `name` itself."""

    @abstractmethod
    def fstat(self, fd: int, /) -> os.stat_result:
        """Attributes of an open inode."""

    @abstractmethod
    def size(self, fd: int) -> int:
        """The size of an open file as the store itself tells it now, whatever of that is remembered on the way."""

    @abstractmethod
    def listdir(self, dirfd: int) -> list[Entry]:
        """Every name in the directory but "." and "..", in the store's order."""

    @abstractmethod
    def readlink(self, fd: int) -> bytes:
        """The target of a symbolic link, from its O_PATH descriptor."""

    @abstractmethod
    def preadv(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int, /) -> int:
        """Fills buffers from `offset` and returns the bytes read, 0 at the end of the file. Not on O_PATH descriptors.

        Fewer than asked does not mean the end: callers go on until 0.
        """

    @abstractmethod
    def preadv_nowait(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int, /) -> int:
        """The same as `preadv` with what the store has at hand; BlockingIOError if it would wait or cannot tell.

        May return less than asked in the middle of a file: the rest would have waited.
        """

    @abstractmethod
    def pwritev(self, fd: int, buffers: Sequence[ReadableBuffer], offset: int, /) -> int:
        """Writes buffers at `offset`; returns the bytes written, maybe fewer than given. Not on O_PATH descriptors."""

    @abstractmethod
    def truncate(self, fd: int, size: int) -> None:
        """Sets the size of a file; `fd` need not be writable if the caller may write the inode."""

    def start_sync(self, fd: int, offset: int, nbytes: int) -> None:
        """Begins to make a range durable, so that `fsync` has less to do later. A hint: waits for nothing, reports nothing."""
        return

    @abstractmethod
    def flush(self, fd: int) -> None:
        """Waits until the store has taken what was written to a file, and reports what it has not, as close(2) does.

        Where writes may go no further than this machine at first (NFS, sshfs), only this tells what has become of them.
        Durable it need not be. Not on O_PATH descriptors.
        """

    @abstractmethod
    def fsync(self, fd: int, datasync: bool) -> None:
        """Makes a file durable and reports what the store failed to write since. Not on O_PATH descriptors."""

    def sync_queue(self) -> SyncQueue | None:
        """Where an fsync is begun and its end is told, with no thread; None where the store has nothing like it."""
        return None

    @abstractmethod
    def syncfs(self, fd: int) -> None:
        """Makes everything durable in the file system that holds `fd`."""

    @abstractmethod
    def mknod(self, dirfd: int, name: bytes, mode: int, rdev: int) -> None: ...

    @abstractmethod
    def mkdir(self, dirfd: int, name: bytes, mode: int) -> None: ...

    @abstractmethod
    def symlink(self, dirfd: int, name: bytes, target: bytes) -> None:
        """A new symbolic link `name` that points to `target`."""

    @abstractmethod
    def link(self, fd: int, dirfd: int, name: bytes) -> None:
        """One more name for the inode behind `fd`, a symbolic link included."""

    @abstractmethod
    def unlink(self, dirfd: int, name: bytes) -> None: ...

    @abstractmethod
    def rmdir(self, dirfd: int, name: bytes) -> None: ...

    @abstractmethod
    def rename(self, olddirfd: int, oldname: bytes, newdirfd: int, newname: bytes, flags: int = 0) -> None:
        """renameat2: `flags` is 0, RENAME_NOREPLACE or RENAME_EXCHANGE."""

    @abstractmethod
    def chmod(self, fd: int, mode: int) -> None:
        """Sets permission bits; EOPNOTSUPP for a symbolic link."""

    @abstractmethod
    def chown(self, fd: int, uid: int, gid: int) -> None:
        """Sets owner and group of the inode itself; -1 leaves one as it is."""

    @abstractmethod
    def utime(self, fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Sets the times of the inode itself; None leaves one as it is."""

    @abstractmethod
    def getxattr(self, fd: int, name: bytes) -> bytes:
        """The value of an extended attribute of the inode itself; ENODATA if there is none."""

    @abstractmethod
    def setxattr(self, fd: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """`flags` is 0, os.XATTR_CREATE or os.XATTR_REPLACE."""

    @abstractmethod
    def removexattr(self, fd: int, name: bytes) -> None: ...

    @abstractmethod
    def listxattr(self, fd: int) -> list[bytes]: ...

    @abstractmethod
    def statvfs(self, fd: int, /) -> os.statvfs_result:
        """Sizes and limits of the file system that holds `fd`."""

    @abstractmethod
    def file_handle(self, fd: int) -> bytes:
        """A name for the inode that outlives descriptors and renames; EOPNOTSUPP where the store has none."""

    @abstractmethod
    def open_handle(self, handle: bytes, flags: int) -> int:
        """A descriptor of the inode that `file_handle` named; ESTALE if it is gone, EPERM without the right to ask."""

    def lease(self, fd: int, patience_seconds: float = 0.0) -> bool:
        """Lets nobody else open the file behind `fd` until `unlease`: they wait, or get EWOULDBLOCK; for a short time only.

        False where that cannot be had: somebody else has the file open, and still has after `patience_seconds`; it is not ours,
        or the store has nothing like it. With patience it is for threads.
        """
        return False

    def unlease(self, fd: int) -> None:
        """Ends what `lease` began."""
        return

    def has_fine_times(self) -> bool:
        """Whether two changes of a file never leave the same ctime, if somebody looked between them; else a tick may hide one."""
        return False

    def watch_path(self, fd: int) -> str | None:
        """What inotify_add_watch takes for the directory behind `fd`; None where changes by others cannot be watched."""
        return None

    def shutdown(self) -> None:
        """Gives back what the store itself holds open; no call may follow."""
        return

"""A directory of this machine as a store: one system call a method, wherever Linux allows that.

An O_PATH descriptor is refused by the f* calls, so those methods name it `/proc/self/fd/N` then. The kernel jumps from that
name straight to the inode, and never goes on through a symbolic link it finds there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from backing.aio import SyncQueue
from backing.base import Backing, Entry

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AT_EMPTY_PATH = 0x1000
AT_STATX_FORCE_SYNC, STATX_SIZE, STATX_BYTES, STX_SIZE_AT = 0x2000, 0x200, 256, 40  # linux/stat.h, struct statx
SYNC_FILE_RANGE_WRITE = 2
UTIME_OMIT = (1 << 30) - 2
MAX_HANDLE_BYTES = 128
FINE_TRIES, FINE_WRITES, LEAST_TICK_SECONDS = 9, 8, 0.001  # a coarse clock has at most 1000 times a second (CONFIG_HZ)
LEASE_PAUSE_SECONDS = 0.001  # the first pause for who has the file open; the next ones double

# O_DIRECT would demand aligned buffers; O_APPEND would make pwritev ignore its offset.
IGNORED_FLAGS = os.O_DIRECT | os.O_APPEND
NEVER_ON_REOPEN = IGNORED_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

T = TypeVar("T")
_new = tuple.__new__
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _FileHandle(ctypes.Structure):
    _fields_ = (("size_bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * MAX_HANDLE_BYTES))


_TimespecPair = _Timespec * 2
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
_libc.syncfs.argtypes = [ctypes.c_int]
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, _TimespecPair, ctypes.c_int]
_libc.name_to_handle_at.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(_FileHandle),
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
]
_libc.open_by_handle_at.argtypes = [ctypes.c_int, ctypes.POINTER(_FileHandle), ctypes.c_int]


def _checked(result: int) -> int:
    """The result of a libc call; raises what errno says when it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _utime(where: int | str, atime_ns: int, mtime_ns: int) -> None:
    os.utime(where, ns=(atime_ns, mtime_ns))


def _timespec(time_ns: int | None) -> _Timespec:
    return _Timespec(0, UTIME_OMIT) if time_ns is None else _Timespec(*divmod(time_ns, 1_000_000_000))


class DirectoryBacking(Backing):
    """A store that is a directory of this machine, local disk and network mount alike.

    The constructor raises OSError if `path` is not a directory that can be listed. `flushes` is False where a flush is so dear
    that it is left to the end: an object store uploads the whole file.
    """

    def __init__(self, path: str | bytes | os.PathLike[str], blocking: bool = False, flushes: bool = True) -> None:
        self.blocking = blocking
        self._flushes = flushes
        self._top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # open_by_handle_at refuses O_PATH
        self._device = os.fstat(self._top).st_dev
        self._mount_id = self._top_mount_id()

    # The hot calls are the system calls themselves: no Python frame between the cache and the kernel.
    fstat = staticmethod(os.fstat)
    preadv = staticmethod(os.preadv)
    pwritev = staticmethod(os.pwritev)
    close = staticmethod(os.close)
    statvfs = staticmethod(os.fstatvfs)

    def size(self, fd: int) -> int:
        st = ctypes.create_string_buffer(STATX_BYTES)
        _checked(_libc.statx(fd, b"", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_SIZE, st))
        return int.from_bytes(st.raw[STX_SIZE_AT : STX_SIZE_AT + 8], sys.byteorder)

    def stat(self, dirfd: int, name: bytes) -> os.stat_result:
        return os.stat(name, dir_fd=dirfd, follow_symlinks=False)

    def preadv_nowait(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int, /) -> int:
        try:
            return os.preadv(fd, buffers, offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # the file system cannot tell whether it would wait
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
            raise

    def open_root(self) -> int:
        return self.reopen(self._top, os.O_PATH | os.O_DIRECTORY)

    def open(self, dirfd: int, name: bytes, flags: int, mode: int = 0) -> int:
        return os.open(name, _opening(flags) & ~IGNORED_FLAGS | os.O_NOFOLLOW, mode, dir_fd=dirfd)

    def reopen(self, fd: int, flags: int) -> int:
        return os.open(_path(fd), _opening(flags) & ~NEVER_ON_REOPEN)

    def redirect(self, fd: int, to: int) -> None:
        os.dup2(to, fd, inheritable=False)

    def listdir(self, dirfd: int) -> list[Entry]:
        # By path, not descriptor: callers that share `dirfd` do not share a position then, and names come as bytes.
        with os.scandir(_path(dirfd).encode()) as entries:
            # Far away a kind that is not known would cost a trip. An Entry(...) would take half as long as all the rest.
            return [_new(Entry, (entry.name, entry.inode(), 0 if self.blocking else _kind(entry))) for entry in entries]

    def readlink(self, fd: int) -> bytes:
        return os.readlink(b"", dir_fd=fd)

    def truncate(self, fd: int, size: int) -> None:
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EINVAL):  # O_PATH, read-only
                raise
            os.truncate(_path(fd), size)

    def start_sync(self, fd: int, offset: int, nbytes: int) -> None:
        _libc.sync_file_range(fd, offset, nbytes, SYNC_FILE_RANGE_WRITE)

    def flush(self, fd: int) -> None:
        if self._flushes:
            os.close(os.dup(fd))

    def fsync(self, fd: int, datasync: bool) -> None:
        if datasync:
            os.fdatasync(fd)
        else:
            os.fsync(fd)

    def sync_queue(self) -> SyncQueue | None:
        try:
            return SyncQueue()
        except OSError:
            return None

    def syncfs(self, fd: int) -> None:
        # A failed write is reported once to every descriptor that was open then: ours has been from the start.
        if os.fstat(fd).st_dev == self._device:
            _checked(_libc.syncfs(self._top))
        else:
            self._syncfs_elsewhere(fd)

    def _syncfs_elsewhere(self, fd: int) -> None:
        """`syncfs` of another file system that is mounted inside."""
        readable = self.reopen(fd, os.O_RDONLY)
        try:
            _checked(_libc.syncfs(readable))
        finally:
            os.close(readable)

    def mknod(self, dirfd: int, name: bytes, mode: int, rdev: int) -> None:
        os.mknod(name, mode, rdev, dir_fd=dirfd)

    def mkdir(self, dirfd: int, name: bytes, mode: int) -> None:
        os.mkdir(name, mode, dir_fd=dirfd)

    def symlink(self, dirfd: int, name: bytes, target: bytes) -> None:
        os.symlink(target, name, dir_fd=dirfd)

    def link(self, fd: int, dirfd: int, name: bytes) -> None:
        os.link(_path(fd), name, dst_dir_fd=dirfd, follow_symlinks=True)

    def unlink(self, dirfd: int, name: bytes) -> None:
        os.unlink(name, dir_fd=dirfd)

    def rmdir(self, dirfd: int, name: bytes) -> None:
        os.rmdir(name, dir_fd=dirfd)

    def rename(self, olddirfd: int, oldname: bytes, newdirfd: int, newname: bytes, flags: int = 0) -> None:
        _checked(_libc.renameat2(olddirfd, oldname, newdirfd, newname, flags))

    def _at(self, call: Callable[..., T], fd: int, *arguments: object) -> T:
        """`call` with a descriptor that is open for data, or with the name of one that is not (O_PATH), or is far away.

        Far away it matters to some (sshfs) whether a call comes through a handle of theirs.
        """
        if not self.blocking:
            try:
                return call(fd, *arguments)
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
        return call(_path(fd), *arguments)

    def chmod(self, fd: int, mode: int) -> None:
        def chmod(where: int | str) -> None:
            if where != fd and stat.S_ISLNK(os.fstat(fd).st_mode):  # kernels before 6.6 would change it
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            os.chmod(where, mode)

        self._at(chmod, fd)

    def chown(self, fd: int, uid: int, gid: int) -> None:
        self._at(os.chown, fd, uid, gid)

    def utime(self, fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
        if atime_ns is not None and mtime_ns is not None:
            self._at(_utime, fd, atime_ns, mtime_ns)
        else:
            times = _TimespecPair(_timespec(atime_ns), _timespec(mtime_ns))
            _checked(_libc.utimensat(fd, b"", times, AT_EMPTY_PATH))

    def getxattr(self, fd: int, name: bytes) -> bytes:
        return self._at(os.getxattr, fd, name)

    def setxattr(self, fd: int, name: bytes, value: bytes, flags: int = 0) -> None:
        os.setxattr(_path(fd), name, value, flags)

    def removexattr(self, fd: int, name: bytes) -> None:
        os.removexattr(_path(fd), name)

    def listxattr(self, fd: int) -> list[bytes]:
        return [os.fsencode(name) for name in os.listxattr(_path(fd))]

    def file_handle(self, fd: int) -> bytes:
        handle, mount_id = _name_to_handle(fd)
        if mount_id != self._mount_id:  # another file system mounted inside: the handle means nothing to the one on top
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return handle

    def open_handle(self, handle: bytes, flags: int) -> int:
        kind, data = handle[:4], handle[4:]
        if len(kind) < 4 or len(data) > MAX_HANDLE_BYTES:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        raw = _FileHandle(len(data), int.from_bytes(kind, "little", signed=True))
        ctypes.memmove(raw.data, data, len(data))
        return _checked(_libc.open_by_handle_at(self._top, ctypes.byref(raw), _opening(flags) & ~NEVER_ON_REOPEN))

    def lease(self, fd: int, patience_seconds: float = 0.0) -> bool:
        if self.blocking:
            return False
        give_up_at, pause_seconds = time.monotonic() + patience_seconds, LEASE_PAUSE_SECONDS
        while True:
            try:
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # that somebody waits: let it be; SIGIO would end us
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                return True
            except BlockingIOError:
                if time.monotonic() + pause_seconds > give_up_at:
                    return False
                time.sleep(pause_seconds)
                pause_seconds *= 2
            except OSError:
                return False

    def unlease(self, fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def has_fine_times(self) -> bool:
        """As file systems have from Linux 6.13 on (multigrain timestamps). Tried with a file that has no name."""
        if self.blocking:
            return False
        try:
            fd = os.open(_path(self._top), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            for _ in range(FINE_TRIES):
                start, times = time.monotonic(), set()
                for _ in range(FINE_WRITES):
                    os.pwrite(fd, b"x", 0)
                    times.add(os.fstat(fd).st_ctime_ns)
                if time.monotonic() - start < (FINE_WRITES - 1) * LEAST_TICK_SECONDS:  # else a coarse clock would do as well
                    return len(times) == FINE_WRITES
            return False
        finally:
            os.close(fd)

    def watch_path(self, fd: int) -> str | None:
        return None if self.blocking else _path(fd)

    def shutdown(self) -> None:
        os.close(self._top)

    def _top_mount_id(self) -> int:
        """The mount that SOURCE lies on, -1 where file handles do not exist."""
        try:
            return _name_to_handle(self._top)[1]
        except OSError:
            return -1


def _kind(entry: os.DirEntry[bytes]) -> int:
    """As `Entry.kind`; no call, unless the file system keeps no kinds with its names."""
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFLNK if entry.is_symlink() else 0


def _opening(flags: int) -> int:
    """`flags` and what every descriptor needs: no leak into a child, no wait at a FIFO or a device."""
    return flags | os.O_CLOEXEC if flags & os.O_PATH else flags | os.O_CLOEXEC | os.O_NONBLOCK


def _name_to_handle(fd: int) -> tuple[bytes, int]:
    """An inode's handle (4 bytes of type, then the file system's own bytes) and the mount it was reached through."""
    raw, mount_id = _FileHandle(MAX_HANDLE_BYTES), ctypes.c_int()
    _checked(_libc.name_to_handle_at(fd, b"", ctypes.byref(raw), ctypes.byref(mount_id), AT_EMPTY_PATH))
    return raw.type.to_bytes(4, "little", signed=True) + bytes(raw.data[: raw.size_bytes]), mount_id.value

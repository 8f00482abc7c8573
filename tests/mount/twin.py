"""The oracle: the same operations in a plain directory and on the mount must give the same results and leave the same."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import pickle
import stat
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOBODY = 65534
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100
HASHED_MAX_BYTES = 16 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Twin:
    """A plain directory, one on the mount, and the one in SOURCE that is behind it."""

    def __init__(self, plain: Path, mounted: Path, source: Path) -> None:
        self.plain, self.mounted, self.source = plain, mounted, source
        for directory in (plain, mounted):
            directory.mkdir()
            directory.chmod(0o777)

    def same(self, steps: Callable[[], Any]) -> Any:
        """Runs `steps` in each directory: what they return and leave must be equal. Returns what they returned."""
        results = []
        for directory in (self.plain, self.mounted):
            with inside(directory):
                results.append((outcome(steps), tree()))
        (result, left), (result_mounted, left_mounted) = results
        assert result_mounted == result, "the mount (left) answers differently"
        assert left_mounted == left, "the mount (left) was left differently"
        return result


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def outcome(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the function returns, or the name of the errno that it fails with."""
    try:
        return function(*args, **options)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def forked(function: Callable[[], Any]) -> Callable[[], Any]:
    """Calls the function in a child process; returns a function that waits for the child and gives its `outcome`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with open(writing, "wb") as pipe:
                pickle.dump(outcome(function), pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)

    def wait() -> Any:
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        assert answer, "the child failed, see its stderr"
        return pickle.loads(answer)

    return wait


def as_user(uid: int, function: Callable[..., Any], *args: Any, gid: int | None = None, umask: int = 0o022) -> Any:
    """`outcome(function, *args)` of a process of another user, without any right of root."""

    def other_user() -> Any:
        os.setgroups([])
        os.setgid(uid if gid is None else gid)
        os.setuid(uid)
        os.umask(umask)
        return outcome(function, *args)

    return forked(other_user)()


def tree(directory: str = ".") -> dict[bytes, tuple[object, ...]]:
    """Everything below the directory, without times: {relative path: attributes, contents, target, xattrs}."""
    found: dict[bytes, tuple[object, ...]] = {}
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    _look_around(fd, b".", found)
    return found


def _look_around(fd: int, path: bytes, found: dict[bytes, tuple[object, ...]]) -> None:
    found[path] = _seen(fd, b".")
    for name in sorted(os.fsencode(name) for name in os.listdir(fd)):
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            assert os.path.samestat(st, os.fstat(below)), f"{name!r} in {path!r} is another directory when it is opened"
            _look_around(below, path + b"/" + name, found)
        else:
            found[path + b"/" + name] = _seen(fd, name)
    os.close(fd)


def _seen(at: int, name: bytes) -> tuple[object, ...]:
    st = os.stat(name, dir_fd=at, follow_symlinks=False)
    kind = stat.S_IFMT(st.st_mode)
    size = 0 if kind == stat.S_IFDIR else st.st_size
    contents: object = None
    if kind == stat.S_IFLNK:
        contents = os.readlink(name, dir_fd=at)
    elif kind == stat.S_IFREG:
        fd = os.open(name, os.O_RDONLY, dir_fd=at)
        contents = hashlib.sha256(os.pread(fd, HASHED_MAX_BYTES, 0)).hexdigest()
        os.close(fd)
    path = os.path.join(b"/proc/self/fd/%d" % at, name)
    xattrs = {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}
    return oct(st.st_mode), st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, size, contents, xattrs


def tick() -> None:
    """Returns when the clock of file times has moved on, so that what is done next gets another time."""
    start = time.clock_gettime_ns(5)  # CLOCK_REALTIME_COARSE
    while time.clock_gettime_ns(5) - start < 8_000_000:
        time.sleep(0.002)


def times_changed(operation: Callable[[], Any], *paths: str) -> dict[str, tuple[bool, bool]]:
    """{path: whether the operation changed its (mtime, ctime)}, neither of which may go back."""
    before = {path: os.lstat(path) for path in paths}
    tick()
    operation()
    found = {}
    for path, old in before.items():
        new = os.lstat(path)
        assert new.st_ctime_ns >= old.st_ctime_ns
        found[path] = (new.st_mtime_ns != old.st_mtime_ns, new.st_ctime_ns != old.st_ctime_ns)
    return found


def write_file(name: str | bytes, data: bytes = b"", mode: int = 0o644) -> None:
    """Makes a file, or empties and writes one, with exactly this mode."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    os.fchmod(fd, mode)
    if data:
        assert os.write(fd, data) == len(data)
    os.close(fd)


def read_file(name: str | bytes) -> bytes:
    with open(name, "rb", buffering=0) as file:
        return file.read()


@contextmanager
def opened(name: str | bytes, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(name, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def rename(old: str | bytes, new: str | bytes, flags: int = 0) -> None:
    """renameat2(2)."""
    _checked(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)))


def utimensat(name: str, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """utimensat(2): times are (seconds, nanoseconds, or UTIME_NOW or UTIME_OMIT)."""
    _checked(_libc.utimensat(AT_FDCWD, os.fsencode(name), (Timespec * 2)(Timespec(*atime), Timespec(*mtime)), flags))


def _checked(result: int) -> None:
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

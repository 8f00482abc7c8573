"""What a writer does to its files: random operations of every kind, each recorded before it is asked for and when it returned.

It goes on until it is told to stop or the mount fails it. All paths are relative to an open directory, so that nothing is
ever written beside the mount.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import time
from collections.abc import Callable, Mapping

from contents import explain_difference, stamp
from record import DONE, FAILED, INTENT, WRONG, Record
from tree import File, Operation, Tree

PAGE = 4096
SMALL_FILE_BYTES, LARGE_FILE_BYTES = 256 << 10, 3 << 20
FILES_MAX, DIRECTORIES_MAX, HANDLES_MAX = 10, 5, 5
MODES = (0o600, 0o644, 0o640, 0o777)
PATIENCE_SECONDS, PAUSE_SECONDS = 30.0, 0.01  # for a call that fails while faults are injected: writeback tries again after 0.5 s
PASSING = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT})  # what a call may be tried again after

WEIGHTS: Mapping[str, int] = {
    "append": 20, "overwrite": 20, "write_page": 12, "write_long": 4, "write_beyond": 3, "store": 5,
    "cut": 5, "extend": 2, "replace": 6, "recreate": 3, "rename": 4, "link": 3, "unlink": 2,
    "rename_directory": 3, "make_directory": 2, "remove_directory": 1,
    "chmod": 2, "chown": 2, "utime": 2, "stat": 5, "fsync": 3, "verify": 6, "close": 5,
}  # fmt: skip
WEIGHTS_POWER: Mapping[str, int] = {
    "append": 20, "overwrite": 20, "write_page": 20, "write_long": 2, "write_beyond": 2,
    "cut": 4, "replace": 8, "recreate": 3, "rename": 2, "unlink": 1,
    "fsync": 25, "fsyncdir": 6, "verify": 2, "close": 4,
}  # fmt: skip


class Gone(Exception):
    """The mount does not answer any more; the operation under way may have happened."""


class Workload:
    """One writer's operations in the directory that `root_fd` is, from what `tree` says is there."""

    def __init__(
        self,
        tree: Tree,
        root_fd: int,
        record: Record,
        seed: int,
        first_operation: int,
        *,
        weights: Mapping[str, int] = WEIGHTS,
        synchronous: bool = False,
        patient: bool = False,
    ) -> None:
        self.tree, self.root_fd, self.record = tree, root_fd, record
        self.random = random.Random(seed)
        self.operation = first_operation
        self.handles: dict[int, list[int]] = {}  # file number -> descriptors
        self.weights = weights
        self.flags = os.O_CLOEXEC | (os.O_DSYNC if synchronous else 0)
        self.patient = patient

    def run(self, stopped: Callable[[], bool]) -> None:
        """Works until it is told to stop, or until a call fails: its errno is the last thing in the record then."""
        kinds, weights = list(self.weights), list(self.weights.values())
        with contextlib.suppress(Gone):
            while not stopped():
                getattr(self, self.random.choices(kinds, weights)[0])()
            self._close_all()

    # --- recorded calls ------------------------------------------------------------------------------------------------

    def do(self, operation: Operation, call: Callable[[], int | None]) -> int | None:
        """Asks for it, and says so before and after; what it returned is applied to the tree."""
        self.record.append(INTENT, operation)
        result = self._insist(call)
        self.record.append(DONE, result)
        self.tree.apply(operation, result)
        return result

    def _insist(self, call: Callable[[], int | None]) -> int | None:
        give_up_at = time.monotonic() + (PATIENCE_SECONDS if self.patient else 0.0)
        while True:
            try:
                return call()
            except OSError as error:
                number = error.errno or 0
                if number not in PASSING or time.monotonic() > give_up_at:
                    break
                time.sleep(PAUSE_SECONDS)
        self.record.append(FAILED, number)
        raise Gone

    def _number(self) -> int:
        self.operation += 1
        return self.operation

    def _write(self, file: File, offset: int, length: int) -> None:
        """A write of stamped bytes. One that comes back short is followed by one of the rest, which may be on its way already:
        so it has the same bytes.
        """
        fd, number = self._handle(file), self._number()
        while length > 0:
            done = self._write_once(file, offset, length, number, lambda data: os.pwrite(fd, data, offset))  # noqa: B023
            offset, length = offset + done, length - done

    def _write_once(self, file: File, offset: int, length: int, number: int, call: Callable[[bytes], int]) -> int:
        data = stamp(self.tree.writer, file.number, number, offset, length)
        return self.do(("write", file.number, offset, length, number), lambda: call(data)) or 0

    # --- choosing ------------------------------------------------------------------------------------------------------

    def _file(self) -> File:
        """One of the files; a new one where there are few, now and then one that only a handle has."""
        names = self.tree.names
        orphans = set(self.handles) - {file.number for file in names.values()}
        if orphans and self.random.random() < 0.1:
            return self.tree.files[min(orphans)]
        if not names or self.random.random() < 0.5 / (1 + len(names)):
            return self._create(self._free_path())
        return names[self.random.choice(list(names))]

    def _path(self) -> str | None:
        return self.random.choice(list(self.tree.names)) if self.tree.names else None

    def _free_path(self) -> str:
        while True:
            path = os.path.join(self.random.choice(list(self.tree.directories)), f"f{self.random.randrange(50)}")
            if path not in self.tree.names:
                return path

    def _limit(self, file: File) -> int:
        return LARGE_FILE_BYTES if file.number % 5 == 0 else SMALL_FILE_BYTES

    def _has_name(self, file: File) -> bool:
        return any(file is other for other in self.tree.names.values())

    def _size(self) -> int:
        """Mostly small, now and then some pages."""
        return min(int(self.random.lognormvariate(7, 2)) + 1, 200_000)

    def _handle(self, file: File) -> int:
        """A descriptor of the file: one that is open already, or a new one."""
        mine = self.handles.get(file.number, [])
        if mine and (self.random.random() < 0.8 or not self._has_name(file)):
            return self.random.choice(mine)
        if sum(map(len, self.handles.values())) >= HANDLES_MAX:
            self.close(keep=file)
        fd = self._open(file, os.O_RDWR)
        self.handles.setdefault(file.number, []).append(fd)
        return fd

    def _open(self, file: File, flags: int) -> int:
        path = self.random.choice([path for path, other in self.tree.names.items() if other is file])
        return self._unrecorded(lambda: os.open(path, flags | self.flags, dir_fd=self.root_fd))

    def _unrecorded(self, call: Callable[[], int]) -> int:
        """A call that changes nothing but may find the mount gone."""
        return self._insist(call) or 0

    def _create(self, path: str) -> File:
        number, mode = self._number() & 0xFFFF, self.random.choice(MODES)
        while number in self.tree.files:
            number = self._number() & 0xFFFF
        made = -1

        def create() -> None:
            nonlocal made
            made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | self.flags, mode, dir_fd=self.root_fd)

        self.do(("create", path, number, mode), create)
        self.handles[number] = [made]
        return self.tree.files[number]

    def _close_all(self) -> None:
        while self.handles:
            self.close()

    # --- operations on contents ----------------------------------------------------------------------------------------

    def append(self) -> None:
        file = self._file()
        if len(file.data) >= self._limit(file):
            return
        # Tried again after an error, a write through O_APPEND would begin at an end that nobody knows.
        if self.patient or not self._has_name(file) or self.random.random() < 0.5:
            return self._write(file, len(file.data), self._size())
        fd, number, length = self._open(file, os.O_WRONLY | os.O_APPEND), self._number(), self._size()
        while length > 0:
            length -= self._write_once(file, len(file.data), length, number, lambda data: os.write(fd, data))
        _close(fd)

    def overwrite(self) -> None:
        file = self._file()
        offset = self.random.randrange(len(file.data) + 1)
        self._write(file, offset, min(self._size(), max(1, self._limit(file) - offset)))

    def write_page(self) -> None:
        file = self._file()
        self._write(file, self.random.randrange(len(file.data) // PAGE + 1) * PAGE, PAGE)

    def write_long(self) -> None:
        """Longer than a request and than a group of the cache."""
        file = self._file()
        offset = self.random.randrange(len(file.data) + 1)
        if self._limit(file) == LARGE_FILE_BYTES and offset < 1 << 20:
            self._write(file, offset, self.random.randrange(200_000, 1_500_000))

    def write_beyond(self) -> None:
        file = self._file()
        if len(file.data) < self._limit(file):
            self._write(file, len(file.data) + self.random.randrange(1, 60_000), self._size())

    def store(self) -> None:
        """Through a shared mapping; acknowledged when msync has returned."""
        file = self._file()
        if len(file.data) == 0:
            return
        start = self.random.randrange(-(-len(file.data) // PAGE)) * PAGE
        offset = self.random.randrange(start, len(file.data))
        length = self.random.randrange(1, min(len(file.data) - offset, 3 * PAGE) + 1)
        fd, number = self._handle(file), self._number()
        data = stamp(self.tree.writer, file.number, number, offset, length)

        def store() -> int:
            with mmap.mmap(fd, offset + length - start, offset=start) as mapping:
                mapping[offset - start : offset - start + length] = data
                mapping.flush()
            return length

        self.do(("write", file.number, offset, length, number), store)

    def cut(self) -> None:
        file = self._file()
        self._truncate(file, self.random.choice((0, self.random.randrange(len(file.data) + 1), len(file.data) // 2)))

    def extend(self) -> None:
        file = self._file()
        if len(file.data) < self._limit(file):
            self._truncate(file, len(file.data) + self.random.randrange(50_000))

    def _truncate(self, file: File, size: int) -> None:
        fd = self._handle(file)
        self.do(("truncate", file.number, size), lambda: os.ftruncate(fd, size))

    def fsync(self) -> None:
        file = self._file()
        fd, sync = self._handle(file), self.random.choice((os.fsync, os.fdatasync))
        self.do(("fsync", file.number), lambda: sync(fd))

    def fsyncdir(self) -> None:
        def sync() -> None:
            for path in self.tree.directories:
                fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.root_fd)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

        self.do(("fsyncdir",), sync)

    def verify(self) -> None:
        """What is read must be what was written, also while nothing has been killed."""
        file = self._file()
        fd = self._handle(file)
        offset, length = self.random.randrange(len(file.data) + 1), self.random.randrange(1, 100_000)
        expected, seen = file.data[offset : offset + length], b""

        def read() -> int:
            nonlocal seen
            data = os.pread(fd, length - len(seen), offset + len(seen))
            seen += data
            return len(data)

        while self._unrecorded(read) and len(seen) < length:  # an error further on makes it short
            pass
        if seen != expected:
            self.record.append(WRONG, f"file {file.number}, read at {offset}: {explain_difference(expected, seen)}")

    # --- operations on names and attributes ----------------------------------------------------------------------------

    def replace(self) -> None:
        """Write new, then rename over: an application's way to change a file at once."""
        victim = self._path()
        if victim is None:
            return
        path = self._free_path()
        file = self._create(path)
        for _ in range(self.random.randrange(1, 4)):
            self._write(file, len(file.data), self._size())
        if self.random.random() < 0.3:
            self.do(("fsync", file.number), lambda: os.fsync(self.handles[file.number][0]))
        self._rename(path, victim)

    def recreate(self) -> None:
        path = self._path()
        if path is not None:
            self._unlink(path)
            self._write(self._create(path), 0, self._size())

    def rename(self) -> None:
        path = self._path()
        if path is not None:
            self._rename(path, self._path() or path if self.random.random() < 0.2 else self._free_path())

    def _rename(self, old: str, new: str) -> None:
        self.do(("rename", old, new), lambda: os.rename(old, new, src_dir_fd=self.root_fd, dst_dir_fd=self.root_fd))

    def link(self) -> None:
        path, new = self._path(), self._free_path()
        if path is not None and len(self.tree.names) < FILES_MAX:
            self.do(("link", path, new), lambda: os.link(path, new, src_dir_fd=self.root_fd, dst_dir_fd=self.root_fd))

    def unlink(self) -> None:
        path = self._path()
        if path is not None:
            self._unlink(path)
        while len(self.tree.names) > FILES_MAX:
            self._unlink(self._path() or "")

    def _unlink(self, path: str) -> None:
        self.do(("unlink", path), lambda: os.unlink(path, dir_fd=self.root_fd))

    def make_directory(self) -> None:
        path = os.path.join(self.random.choice(list(self.tree.directories)), f"d{self.random.randrange(20)}")
        if path not in self.tree.directories and len(self.tree.directories) < DIRECTORIES_MAX and path.count("/") < 3:
            self.do(("mkdir", path, 0o755), lambda: os.mkdir(path, 0o755, dir_fd=self.root_fd))

    def rename_directory(self) -> None:
        """With whatever is dirty inside."""
        directories = [path for path in self.tree.directories if path]
        if not directories:
            return self.make_directory()
        old = self.random.choice(directories)
        parents = [path for path in self.tree.directories if path != old and not path.startswith(old + "/")]
        new = os.path.join(self.random.choice(parents), f"d{self.random.randrange(20)}")
        if new not in self.tree.directories and new.count("/") < 3:
            self._rename(old, new)

    def remove_directory(self) -> None:
        for path in self.tree.directories:
            if path and not any(other.startswith(path + "/") for other in (*self.tree.names, *self.tree.directories)):
                return self._remove_directory(path)

    def _remove_directory(self, path: str) -> None:
        self.do(("rmdir", path), lambda: os.rmdir(path, dir_fd=self.root_fd))

    def chmod(self) -> None:
        file, mode = self._file(), self.random.choice(MODES)
        fd = self._handle(file)
        self.do(("chmod", file.number, mode), lambda: os.fchmod(fd, mode))

    def chown(self) -> None:
        file, uid, gid = self._file(), self.random.randrange(1000, 1003), self.random.randrange(1000, 1003)
        fd = self._handle(file)
        self.do(("chown", file.number, uid, gid), lambda: os.fchown(fd, uid, gid))

    def utime(self) -> None:
        file, mtime_ns = self._file(), self.random.randrange(1 << 60)
        fd = self._handle(file)
        self.do(("utime", file.number, mtime_ns), lambda: os.utime(fd, ns=(0, mtime_ns)))

    def stat(self) -> None:
        """Notes the mtime that the file has from its last write: it must not be another one after a crash."""
        file = self._file()
        fd = self._handle(file)
        self.do(("stat", file.number), lambda: os.fstat(fd).st_mtime_ns)

    def close(self, keep: File | None = None) -> None:
        numbers = [number for number in self.handles if keep is None or number != keep.number]
        if not numbers:
            return
        number = self.random.choice(numbers)
        for fd in self.handles.pop(number):
            _close(fd)
        if not self._has_name(self.tree.files[number]):
            del self.tree.files[number]


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # an error of writeback, or the mount is gone: nothing was asked for
        os.close(fd)

"""A directory of a far away file system, read past the kernel's page cache: its readahead would go there piece by piece."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backing.directory import DirectoryBacking

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class DirectDirectoryBacking(DirectoryBacking):
    """A DirectoryBacking whose read-only descriptors are O_DIRECT, where the file has that.

    A large read through the kernel's cache of a FUSE mount becomes one request of 128 KiB after another; a direct one becomes
    all of them at once. For file systems that do not ask for aligned reads: one of another kind inside is read as ever.
    """

    def open(self, dirfd: int, name: bytes, flags: int, mode: int = 0) -> int:
        return _direct(super().open(dirfd, name, flags, mode), flags)

    def reopen(self, fd: int, flags: int) -> int:
        return _direct(super().reopen(fd, flags), flags)

    def preadv(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int, /) -> int:  # type: ignore[override]
        try:
            return os.preadv(fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _set_direct(fd, False)  # or another thread has
            return os.preadv(fd, buffers, offset)


def _direct(fd: int, flags: int) -> int:
    """Not by a flag of open(2): file systems that are told of it may refuse, or read in another way themselves."""
    if flags & os.O_ACCMODE == os.O_RDONLY and not flags & (os.O_PATH | os.O_DIRECTORY):
        _set_direct(fd, True)
    return fd


def _set_direct(fd: int, on: bool) -> None:
    with contextlib.suppress(OSError):  # the file has no such thing
        before = fcntl.fcntl(fd, fcntl.F_GETFL)
        after = before | os.O_DIRECT if on else before & ~os.O_DIRECT
        if after != before:
            fcntl.fcntl(fd, fcntl.F_SETFL, after)

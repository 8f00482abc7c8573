"""The part that every wrapper around a store shares: all operations pass through one method, `around`."""

from __future__ import annotations

import functools
import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from backing.base import Backing

P = ParamSpec("P")
T = TypeVar("T")


def _through(operation: Callable[Concatenate[Backing, P], T]) -> Callable[Concatenate[Backing, P], T]:
    """An operation of the contract, done by the inner store inside the wrapper's `around`."""
    name = operation.__name__

    @functools.wraps(operation)
    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = getattr(self.inner, name)
        result: T = self.around(name, functools.partial(call, **kwargs) if kwargs else call, args)
        return result

    del method.__isabstractmethod__  # type: ignore[attr-defined]  # copied from the contract by wraps
    return method


class Wrapper(Backing):
    """A store that does each call of another store in its own way."""

    def __init__(self, inner: Backing, blocking: bool) -> None:
        self.inner = inner
        self.blocking = blocking

    @abstractmethod
    def around(self, operation: str, call: Callable[..., T], args: tuple[Any, ...]) -> T:
        """Does `call(*args)`, an operation of the inner store. Data operations have args (fd, buffers, offset)."""

    open_root = _through(Backing.open_root)
    open = _through(Backing.open)
    reopen = _through(Backing.reopen)
    redirect = _through(Backing.redirect)
    close = _through(Backing.close)
    stat = _through(Backing.stat)
    fstat = _through(Backing.fstat)
    size = _through(Backing.size)
    listdir = _through(Backing.listdir)
    readlink = _through(Backing.readlink)
    preadv = _through(Backing.preadv)
    preadv_nowait = _through(Backing.preadv_nowait)
    pwritev = _through(Backing.pwritev)
    truncate = _through(Backing.truncate)
    flush = _through(Backing.flush)
    fsync = _through(Backing.fsync)
    syncfs = _through(Backing.syncfs)
    mknod = _through(Backing.mknod)
    mkdir = _through(Backing.mkdir)
    symlink = _through(Backing.symlink)
    link = _through(Backing.link)
    unlink = _through(Backing.unlink)
    rmdir = _through(Backing.rmdir)
    rename = _through(Backing.rename)
    chmod = _through(Backing.chmod)
    chown = _through(Backing.chown)
    utime = _through(Backing.utime)
    getxattr = _through(Backing.getxattr)
    setxattr = _through(Backing.setxattr)
    removexattr = _through(Backing.removexattr)
    listxattr = _through(Backing.listxattr)
    statvfs = _through(Backing.statvfs)
    file_handle = _through(Backing.file_handle)
    open_handle = _through(Backing.open_handle)

    def open_stat(self, dirfd: int, name: bytes, flags: int, mode: int = 0) -> tuple[int, os.stat_result]:
        return self.around("open", self.inner.open_stat, (dirfd, name, flags, mode))

    def lease(self, fd: int, patience_seconds: float = 0.0) -> bool:
        return not self.blocking and self.inner.lease(fd, patience_seconds)

    def unlease(self, fd: int) -> None:
        self.inner.unlease(fd)

    def has_fine_times(self) -> bool:
        return not self.blocking and self.inner.has_fine_times()

    def watch_path(self, fd: int) -> str | None:
        return None if self.blocking else self.inner.watch_path(fd)

    def shutdown(self) -> None:
        self.inner.shutdown()


def buffer_bytes(buffers: Any) -> int:
    """The length of a list of buffers together."""
    return sum(memoryview(buffer).nbytes for buffer in buffers)

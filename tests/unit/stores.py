"""Writeback alone: a cache over stores in memory that are slow, hang or fail, under a clock that jumps."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio
import trio.testing

from backing.directory import DirectoryBacking
from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.cache.policy import make
from cachefs.inode import Inode, InodeTable
from cachefs.keeper import Keeper
from cachefs.writeback import Writeback

P = PAGE_SIZE
EIO = OSError(errno.EIO, "broken")


class Store:
    """A backing file in memory that takes writes, at a speed, or fails them."""

    def __init__(self, bytes_per_second: float = 0.0) -> None:
        self.data = bytearray()
        self.calls: list[list[tuple[int, int]]] = []  # (offset, length) of each extent
        self.at: list[float] = []  # when
        self.fail_from: int | None = None  # extent of a call that fails
        self.error = EIO
        self.bytes_per_second = bytes_per_second
        self.gate = trio.Event()
        self.gate.set()

    def read_now(self, buffers: Sequence[memoryview], offset: int) -> int:
        raise BlockingIOError

    async def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        piece = self.data[offset : offset + len(buffers[0])]
        buffers[0][: len(piece)] = piece
        return len(piece)

    async def write(self, extents: Sequence[tuple[int, list[memoryview]]]) -> tuple[int, OSError | None]:
        self.calls.append([(offset, sum(map(len, buffers))) for offset, buffers in extents])
        self.at.append(trio.current_time())
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.bytes_per_second:
            await trio.sleep(sum(length for _, length in self.calls[-1]) / self.bytes_per_second)
        for number, (offset, buffers) in enumerate(extents):
            if number == self.fail_from:
                return number, self.error
            data = b"".join(buffers)
            self.data[len(self.data) :] = bytes(max(0, offset - len(self.data)))
            self.data[offset : offset + len(data)] = data
        return len(extents), None


class Fixture:
    """A cache and its writeback, without files and a file system above."""

    def __init__(self, pages: int, limit: int, background: int, expire: float, interval: float) -> None:
        self.cache = PageCache(make("lru", pages), pages, trio.current_time)
        self.settled: list[Inode] = []
        self.writeback = Writeback(
            self.cache, Keeper(self.cache, InodeTable(os.stat("/")), DirectoryBacking("/")),
            limit_bytes=limit * P, background_bytes=background * P, expire_seconds=expire,
            interval_seconds=interval, settled=self.settled.append,
        )  # fmt: skip

    def file(self, bytes_per_second: float = 0.0) -> tuple[Inode, Store]:
        inode, store = Inode(2, os.stat("/")), Store(bytes_per_second)
        inode.file = self.cache.add_file(store, 0)
        return inode, store

    def write(self, inode: Inode, offset: int, data: bytes) -> None:
        assert inode.file is not None
        self.cache.write(inode.file, offset, data)
        self.writeback.note(inode)
        self.cache.check_invariants()


@asynccontextmanager
async def stack(
    pages: int = 8192, limit: int = 4096, background: int = 2048, expire: float = 5.0, interval: float = 1.0, running: bool = True
) -> AsyncIterator[Fixture]:
    async with trio.open_nursery() as nursery:
        it = Fixture(pages, limit, background, expire, interval)
        if running:
            nursery.start_soon(it.writeback.run)
        yield it
        it.cache.check_invariants()
        nursery.cancel_scope.cancel()


def run(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Makes a test of a coroutine function, under a clock that jumps."""

    def synchronous() -> None:
        trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))

    synchronous.__name__, synchronous.__doc__ = test.__name__, test.__doc__  # type: ignore[attr-defined]
    return synchronous

"""The stack of one mount without mount and transport: files, cache, writeback and file system over a real directory."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio
import trio.testing

from backing.base import Backing
from backing.directory import DirectoryBacking
from backing.faulty import FaultyBacking
from cachefs.backingio import BackingIO
from cachefs.cache import policy as policies
from cachefs.cache.file import CachedFile
from cachefs.cache.fill import Filler
from cachefs.cache.page import GROUP_SHIFT, PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.creation import Caller
from cachefs.descriptors import Descriptors
from cachefs.files import Files
from cachefs.fs import FileSystem
from cachefs.inode import Inode, InodeTable
from cachefs.journal.journal import ROWS_FILE, Journal
from cachefs.journal.load import read
from cachefs.journal.records import FileRecord, PagesRecord, checksum
from cachefs.journal.rows import rows_in
from cachefs.keeper import Keeper
from cachefs.source import AT_ONCE_BYTES
from cachefs.tasks import Spawner
from cachefs.writeback import Writeback

T = TypeVar("T")
JOURNAL_PAGES = 1024
CALLER = Caller(os.geteuid(), os.getegid(), 0o022)


class SteppedIO(BackingIO):
    """Calls to the backing that take a random number of turns of the event loop instead of a thread: same seed, same order."""

    def __init__(self, backing: FaultyBacking, seed: int, tasks: Spawner) -> None:
        super().__init__(backing, tasks)
        self.random = random.Random(seed)

    async def in_thread(self, op: str, function: Callable[..., T], *args: object) -> T:
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            await self._turns()
            try:
                result = function(*args)
            except OSError:
                await self._turns()
                raise
            await self._turns()
            return result

    async def _turns(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 2, 4, 20))):
            await trio.lowlevel.checkpoint()


class World:
    """Everything that `Mount` builds, over `top`; `seed` puts SteppedIO in the place of threads."""

    def __init__(
        self,
        nursery: trio.Nursery,
        top: Path,
        *,
        pages: int = 64,
        policy: str = "lru",
        blocking: bool = False,
        limit_pages: int | None = None,
        background_pages: int | None = None,
        expire_seconds: float = 5.0,
        interval_seconds: float = 1.0,
        readahead_pages: int = 4096,
        ttl_seconds: float = 1.0,
        seed: int | None = None,
        journal: Path | None = None,
        timeout_seconds: float = 30.0,
        at_once_bytes: int = 0,  # tests that make a call hang need a thread for it
        through: bool = False,
    ) -> None:
        self.top = top
        self.backing = FaultyBacking(DirectoryBacking(top, blocking=blocking))
        self.io = BackingIO(self.backing, nursery, timeout_seconds) if seed is None else SteppedIO(self.backing, seed, nursery)
        root_fd = self.backing.open_root()
        self.table = InodeTable(self.backing.fstat(root_fd))
        self.descriptors = Descriptors(self.io, self.table, root_fd, 64)
        self.cache = PageCache(policies.make(policy, pages), pages, trio.current_time)
        limit_pages = pages // 2 if limit_pages is None else limit_pages
        background_pages = limit_pages // 2 if background_pages is None else background_pages
        self.keeper = Keeper(self.cache, self.table, self.backing)
        if journal is not None:
            self.keeper.journal = Journal(str(journal), JOURNAL_PAGES * PAGE_SIZE, {})
        self.writeback = Writeback(
            self.cache,
            self.keeper,
            limit_bytes=limit_pages * PAGE_SIZE,
            background_bytes=background_pages * PAGE_SIZE,
            expire_seconds=expire_seconds,
            interval_seconds=interval_seconds,
            settled=self._settled,
            watchdog=self.io.watchdog,
        )
        self.changed: list[Inode] = []  # files that turned out to be changed underneath
        self.gone: list[tuple[Inode, bytes]] = []  # names that turned out to mean something else
        self.filler = Filler(self.cache, nursery, self.writeback.need_room, self.io.watchdog)
        self.files = Files(
            self.io, self.descriptors, self.cache, self.filler, self.writeback, self.keeper,
            readahead_pages * PAGE_SIZE, ttl_seconds, self.changed.append, lambda *place: self.gone.append(place),
            through,
        )  # fmt: skip
        self.files.data.at_once_bytes = AT_ONCE_BYTES if through else at_once_bytes
        self.backing.has_fine_times = lambda: True  # type: ignore[method-assign]  # whatever kernel runs the tests
        self.fs = FileSystem(self.io, self.table, self.descriptors, self.files, self.writeback)

    def _settled(self, inode: Inode) -> None:
        self.files.data.settle(inode)
        self.fs.drop(inode)

    async def open(self, name: str, flags: int = os.O_RDWR) -> tuple[Inode, int]:
        """The inode and a handle of a file, made if it is not there."""
        try:
            inode = await self.fs.lookup(self.table.root, name.encode())
        except FileNotFoundError:
            how = os.O_RDWR | os.O_CREAT
            inode, opened = await self.fs.creation.create(self.table.root, name.encode(), 0o100644, how, CALLER)
            return inode, opened.number
        return inode, (await self.files.open(inode, flags, 0)).number

    async def names(self, number: int) -> list[bytes]:
        """What an open directory lists from its start."""
        return [entry.name for entry in await self.fs.directories.listing(number, 0)]

    async def truncate(self, inode: Inode, size: int) -> None:
        await self.files.setter.truncate(inode, size, 0, frozenset())

    async def release(self, number: int) -> None:
        inode = self.files.handles[number].inode
        await self.files.release(number)
        self.fs.drop(inode)

    async def read(self, number: int, offset: int, size: int) -> bytes:
        return bytes(await self.files.read(number, offset, size))

    async def shut(self) -> None:
        """Lets go of every descriptor; the nursery is the caller's to cancel."""
        for number in list(self.files.handles):
            await self.release(number)
        await trio.testing.wait_all_tasks_blocked()  # far away, descriptors are closed by tasks
        close_descriptors(self.table, self.backing)
        if self.keeper.journal is not None:
            self.keeper.journal.close()

    def check(self) -> None:
        """Every invariant there is, and that no more is unwritten than may be."""
        self.cache.check_invariants()
        self.table.check()
        self.keeper.check()
        assert self.writeback.unwritten_pages <= self.writeback.limit_pages
        for inode in self.table:
            assert not inode.unwritten or inode in self.writeback.dirty, "writeback does not know of dirty pages"


@asynccontextmanager
async def world_of(top: Path, far: bool, **options: Any) -> AsyncIterator[World]:
    """A `World` that is checked and shut at the end; `far`: over a backing far away, whose calls take turns."""
    async with trio.open_nursery() as nursery:
        world = World(nursery, top, **{"blocking": far, "seed": 1 if far else None, "ttl_seconds": 0.0, **options})
        yield world
        world.check()
        await world.shut()
        nursery.cancel_scope.cancel()


async def dirty(world: World, name: str, data: bytes, offset: int = 0) -> tuple[Inode, int]:
    """Opens a file and writes to it, which is not written back."""
    inode, handle = await world.open(name)
    await world.files.write(handle, offset, data)
    assert inode.unwritten
    return inode, handle


def copies(top: Path) -> dict[str, bytes]:
    """{name: contents} of the copies there are."""
    return {path.name: path.read_bytes() for path in sorted(top.rglob("*.conflict-*"))}


def the_copy(top: Path) -> bytes:
    (contents,) = copies(top).values()
    return contents


def close_descriptors(table: InodeTable, backing: Backing) -> None:
    """Closes what a daemon leaves to its end."""
    for inode in table:
        for fd in {inode.reader, inode.writer, inode.fd} - {-1}:
            backing.close(fd)
    backing.shutdown()


def content(cache: PageCache, file: CachedFile, fd: int) -> bytes:
    """What programs would read of the file, page by page from memory or the backing behind `fd`.

    Asserts on the way that every clean page is equal to the backing's.
    """
    parts = []
    for page in range(file.end_page):
        offset = page * PAGE_SIZE
        length = min(PAGE_SIZE, file.size - offset)
        theirs = os.pread(fd, length, offset).ljust(length, b"\0")
        group = file.groups.get(page >> GROUP_SHIFT)
        bit = 1 << (page & 255)
        if group is not None and group.uptodate & bit:
            start = group.base + (page & 255) * PAGE_SIZE
            ours = bytes(cache.arena.view[start : start + length])
            assert (group.dirty | group.writeback) & bit or ours == theirs, f"clean page {page} is not the backing's"
            parts.append(ours)
        else:
            parts.append(theirs)
    return b"".join(parts)


class Leftovers:
    """What a journal would give back if the daemon were killed now, read as its successor reads it."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.found = read(journal.index.env)
        for row in rows_in(os.path.join(journal.directory, ROWS_FILE)):
            self.found.add(row)
        self.found.followed()
        assert not self.found.problems

    def content(self, inode: Inode, fd: int) -> bytes:
        """The file behind `fd` as it would be after the recovery."""
        size = os.fstat(fd).st_size
        data = bytearray(os.pread(fd, size, 0))
        for record in self.found.files.values():
            if record.number == inode.key[1] and (self.found.pages.get(record.file) or record.cutting):
                data = self._replayed(data, record)
        return bytes(data)

    def _replayed(self, data: bytearray, record: FileRecord) -> bytearray:
        data = data[: record.size].ljust(record.size, b"\0")
        latest: dict[int, tuple[PagesRecord, int]] = {}
        for pages in sorted(self.found.pages.get(record.file, []), key=lambda pages: pages.seq):
            latest |= {page: (pages, page - pages.page) for page in pages.pages}
        for pages in {pages for pages, _ in latest.values()}:
            slots = self.journal.data.read((pages.slot, pages.count))
            assert checksum(slots) == pages.checksum, "a slot that is in use was written to"
        for page, (pages, i) in latest.items():
            start = page * PAGE_SIZE
            stop = min(start + PAGE_SIZE, record.size)
            data[start:stop] = self.journal.data.read((pages.slot + i, 1))[: max(0, stop - start)]
        return data

"""Writeback under a clock that jumps: what is written when, what happens to errors, and how writers are held back."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from backing.directory import DirectoryBacking
from cachefs.cache import leaving, wishes
from cachefs.cache.page import GROUP_SIZE, PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.cache.policy import make
from cachefs.inode import Inode, InodeTable
from cachefs.keeper import Keeper
from cachefs.writeback import BATCH_BYTES, Writeback
from world import World

P = PAGE_SIZE
EIO = OSError(errno.EIO, "broken")
wait_all_tasks_blocked = trio.testing.wait_all_tasks_blocked


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


# --- what goes when ---------------------------------------------------------------------------------------------------


@run
async def test_what_has_been_dirty_for_long_is_written() -> None:
    async with stack(expire=5.0, interval=1.0) as it:
        inode, store = it.file()
        start = trio.current_time()
        it.write(inode, 0, b"a" * 100)
        await trio.sleep(4.5)
        assert not store.calls and it.writeback.statistics().oldest_dirty_seconds == pytest.approx(4.5)
        await trio.sleep(2)
        assert store.data == b"a" * 100 and 5 <= store.at[0] - start <= 6.1
        assert it.settled == [inode] and not it.writeback.dirty


@run
async def test_above_the_background_threshold_writing_begins_at_once() -> None:
    async with stack(background=4, limit=64) as it:
        inode, store = it.file()
        it.write(inode, 0, b"a" * 4 * P)
        await trio.sleep(0.1)
        assert not store.calls
        it.write(inode, 4 * P, b"a" * P)
        await trio.sleep(0.1)
        assert len(store.data) == 5 * P


@run
async def test_a_young_file_does_not_hide_an_old_one() -> None:
    """What a batch has left of a file is put behind the others, however old it is."""
    async with stack(expire=5.0, pages=16384, limit=8192, background=8000) as it:
        inode, store = it.file()
        young, _ = it.file()
        it.write(inode, 0, b"a" * (BATCH_BYTES + GROUP_SIZE))
        await trio.sleep(4)
        it.write(young, 0, b"y")
        await trio.sleep(2.5)
        assert len(store.data) == BATCH_BYTES + GROUP_SIZE


@run
async def test_neighbours_in_the_file_are_written_by_one_call() -> None:
    async with stack(running=False) as it:
        inode, store = it.file()
        it.write(inode, GROUP_SIZE - 2 * P, b"a" * 4 * P)
        it.write(inode, 10 * P, b"b" * 2 * P)
        it.write(inode, 12 * P, b"c" * P)
        it.write(inode, 20 * P, b"d")
        await it.writeback.flush(inode)
        assert store.calls == [[(10 * P, 3 * P), (20 * P, P), (GROUP_SIZE - 2 * P, 4 * P)]]


@run
async def test_the_last_page_is_written_as_far_as_the_file_goes() -> None:
    async with stack(running=False) as it:
        inode, store = it.file()
        it.write(inode, 0, b"a" * (P + 7))
        await it.writeback.flush(inode)
        assert store.calls == [[(0, P + 7)]]


@run
async def test_redirtied_while_being_written_stays_dirty() -> None:
    async with stack(running=False) as it:
        inode, store = it.file()
        it.write(inode, 0, b"a" * 2 * P)
        store.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.writeback.flush, inode)
            await wait_all_tasks_blocked()
            it.write(inode, P, b"new")
            store.gate.set()
        assert it.cache.dirty_pages == 1 and inode in it.writeback.dirty and not it.settled
        await it.writeback.flush(inode)
        assert store.data == b"a" * P + b"new" + b"a" * (P - 3) and it.settled == [inode]


@run
async def test_a_file_that_grows_while_it_is_written() -> None:
    async with stack(running=False) as it:
        inode, store = it.file()
        it.write(inode, 0, b"a" * 100)
        store.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.writeback.flush, inode)
            await wait_all_tasks_blocked()
            it.write(inode, 100, b"b" * P)
            it.write(inode, 5 * P, b"c")
            store.gate.set()
        await it.writeback.flush(inode)
        assert store.data == b"a" * 100 + b"b" * P + bytes(5 * P - P - 100) + b"c"


@run
async def test_a_file_that_is_gone_while_it_is_written() -> None:
    async with stack(running=False) as it:
        inode, store = it.file()
        it.write(inode, 0, b"a" * 2 * GROUP_SIZE)
        store.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.writeback.flush, inode)
            await wait_all_tasks_blocked()
            it.write(inode, 0, b"again")
            inode.unlinked = True
            assert inode.file is not None
            leaving.discard(it.cache, inode.file)
            it.cache.check_invariants()
            store.gate.set()
        assert not it.cache.resident_pages and not it.writeback.dirty


# --- flush --------------------------------------------------------------------------------------------------------------


@run
async def test_flush_ends_while_others_go_on_writing() -> None:
    async with stack(running=False) as it:
        inode, store = it.file(bytes_per_second=1 << 30)
        it.write(inode, 0, b"a" * 10 * GROUP_SIZE)
        with trio.fail_after(1000):
            async with trio.open_nursery() as nursery:

                async def writer() -> None:
                    for i in range(100_000):
                        it.cache.write(inode.file, i % 20 * P, b"w" * P)  # type: ignore[arg-type]
                        await trio.sleep(0.0001)

                nursery.start_soon(writer)
                await it.writeback.flush(inode)
                nursery.cancel_scope.cancel()
        assert len(store.data) == 10 * GROUP_SIZE


@run
async def test_regression_flush_writes_the_pages_behind_a_busy_start_of_the_file() -> None:
    """It counted pages: those at the start, dirtied again and again, took the places of the ones behind them.

    fsync returned, and data written before it was not on the backing.
    """
    async with stack(running=False) as it:
        inode, store = it.file()
        size = BATCH_BYTES + 2 * GROUP_SIZE
        it.write(inode, 0, b"a" * size)
        assert inode.file is not None
        file, write = inode.file, store.write

        async def busy(extents: Sequence[tuple[int, list[memoryview]]]) -> tuple[int, OSError | None]:
            result = await write(extents)
            it.cache.write(file, 0, b"b" * 2 * GROUP_SIZE)
            return result

        store.write = busy  # type: ignore[method-assign]
        await it.writeback.flush(inode)
        assert len(store.data) == size


@run
async def test_regression_background_writing_reaches_the_pages_behind_a_busy_start_of_the_file() -> None:
    async with stack(pages=16384, limit=8192, background=0) as it:
        inode, store = it.file(bytes_per_second=100 << 20)
        it.write(inode, 0, b"a" * (BATCH_BYTES + P))
        assert inode.file is not None
        file, write = inode.file, store.write

        async def busy(extents: Sequence[tuple[int, list[memoryview]]]) -> tuple[int, OSError | None]:
            result = await write(extents)
            it.cache.write(file, 0, b"b" * BATCH_BYTES)
            return result

        store.write = busy  # type: ignore[method-assign]
        await trio.sleep(1)
        assert len(store.data) == BATCH_BYTES + P


@run
async def test_flush_waits_for_a_batch_under_way() -> None:
    async with stack(background=0) as it:
        inode, store = it.file()
        store.gate = trio.Event()
        it.write(inode, 0, b"a")
        await wait_all_tasks_blocked()
        done = False

        async def flush() -> None:
            nonlocal done
            await it.writeback.flush(inode)
            done = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush)
            await wait_all_tasks_blocked()
            assert not done
            store.gate.set()
        assert done and store.data == b"a"


@run
async def test_flush_all_writes_all_and_returns_the_failed() -> None:
    async with stack(running=False) as it:
        files = [it.file() for _ in range(10)]
        for number, (inode, store) in enumerate(files):
            it.write(inode, 0, bytes([number]) * 3 * P)
            store.fail_from = 0 if number in (3, 7) else None
        some = [inode for inode, _ in files[:5]]
        assert await it.writeback.flush_all(some) == [files[3][0]]
        assert [bool(store.data) for _, store in files] == [True] * 3 + [False, True] + [False] * 5
        failed = await it.writeback.flush_all()
        assert {id(inode) for inode in failed} == {id(files[3][0]), id(files[7][0])}
        assert it.writeback.unwritten_pages == 6
        assert all(len(store.data) == 3 * P for number, (_, store) in enumerate(files) if number not in (3, 7))


# --- errors -------------------------------------------------------------------------------------------------------------


@run
async def test_what_cannot_be_written_stays_dirty_and_is_tried_again_after_a_pause_that_doubles() -> None:
    async with stack(background=0, interval=0.1) as it:
        inode, store = it.file()
        store.fail_from = 0
        it.write(inode, 0, b"a" * 3 * P)
        await trio.sleep(100)
        assert it.cache.dirty_pages == 3 and inode.error_errno == errno.EIO
        assert it.writeback.errors == {"EIO": len(store.calls)}
        figures = it.writeback.statistics()
        assert figures.retries == len(store.calls) - 1 and figures.failing_files == 1
        assert figures.oldest_dirty_seconds == pytest.approx(100)
        pauses = [b - a for a, b in zip(store.at, store.at[1:], strict=False)]
        assert all(0.5 * 2**i <= pause <= 0.5 * 2**i + 0.2 for i, pause in enumerate(pauses[:6]))
        assert max(pauses) <= 30.2
        store.fail_from = None
        await trio.sleep(31)
        assert store.data == b"a" * 3 * P and not it.cache.dirty_pages and not inode.retry_seconds
        assert not it.writeback.statistics().failing_files and it.writeback.retries == len(store.calls) - 1


@run
async def test_what_hangs_on_its_way_to_the_backing_grows_old_too() -> None:
    async with stack(background=0) as it:
        inode, store = it.file()
        store.gate = trio.Event()
        it.write(inode, 0, b"a" * P)
        await trio.sleep(100)
        assert it.cache.writeback_pages == 1 and not it.cache.dirty_pages
        it.write(inode, 0, b"b" * P)
        await trio.sleep(10)
        figures = it.writeback.statistics()
        assert figures.oldest_dirty_seconds == pytest.approx(110) and figures.dirty_bytes == P
        store.gate.set()
        await trio.sleep(10)
        assert it.writeback.statistics().oldest_dirty_seconds == 0 and store.data == b"b" * P


@run
async def test_extents_before_the_one_that_failed_are_clean() -> None:
    async with stack(running=False) as it:
        inode, store = it.file()
        for page in (0, 10, 20):
            it.write(inode, page * P, b"a" * P)
        store.fail_from = 1
        with pytest.raises(OSError):
            await it.writeback.flush(inode)
        assert inode.file is not None and inode.file.groups[0].dirty == 1 << 10 | 1 << 20
        assert inode.file.dirty_extents() == [(10 * P, P), (20 * P, P)]


@run
async def test_other_files_go_on_while_one_fails() -> None:
    async with stack(background=0) as it:
        bad, bad_store = it.file()
        good, store = it.file()
        bad_store.fail_from = 0
        it.write(bad, 0, b"b")
        it.write(good, 0, b"g")
        await trio.sleep(1)
        it.write(good, 0, b"h")
        await trio.sleep(2)
        assert store.data == b"h" and bad.unwritten


@run
async def test_a_batch_that_is_cancelled_leaves_its_pages_dirty() -> None:
    async with stack(running=False) as it:
        inode, store = it.file()
        store.gate = trio.Event()
        it.write(inode, 0, b"a" * P)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.writeback.flush, inode)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        it.cache.check_invariants()
        assert it.cache.dirty_pages == 1 and inode in it.writeback.dirty


# --- writers ------------------------------------------------------------------------------------------------------------


@run
async def test_writers_slow_down_smoothly_and_never_pass_the_limit() -> None:
    async with stack(pages=8192, limit=1024, background=256) as it:
        inode, _ = it.file(bytes_per_second=100 << 20)
        pauses = []
        start = trio.current_time()
        for number in range(800):
            before = trio.current_time()
            size = 64 * P
            if it.writeback.must_throttle(size):
                await it.writeback.throttle(size)
            while it.cache.dirty_pages + it.cache.writeback_pages + 64 > 1024:  # as Filler does on TooDirty
                it.writeback.need_room()
                await it.cache.room.park()
            it.write(inode, number * size, b"a" * size)
            assert it.writeback.unwritten_pages <= 1024
            pauses.append(trio.current_time() - before)
        seconds = trio.current_time() - start
        assert max(pauses) < 0.5
        assert seconds < 1.3 * 800 * 64 * P / (100 << 20), "slower than the backing"
        assert it.writeback.throttle_seconds > 0.5 * seconds


@pytest.mark.parametrize("limit", [1, 2, 4, 64])
def test_regression_a_write_larger_than_the_limit(limit: int) -> None:
    """`throttle` waited until all of it would fit below the limit: for ever, at --dirty-limit 512K and 1 MiB a write."""

    async def main() -> None:
        async with stack(limit=limit, background=limit // 2) as it:
            with trio.fail_after(10):
                if it.writeback.must_throttle(GROUP_SIZE):
                    await it.writeback.throttle(GROUP_SIZE)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@run
async def test_regression_a_writer_at_the_limit_does_not_wait_for_old_age() -> None:
    """Below the background threshold nothing was due yet, and the writer slept until it was."""
    async with stack(limit=64, background=60, expire=1000) as it:
        inode, store = it.file()
        it.write(inode, 0, b"a" * 55 * P)
        with trio.fail_after(1):
            await it.writeback.throttle(16 * P)
        assert store.data


@run
async def test_regression_a_throttled_writer_wakes_when_dirty_pages_are_dropped() -> None:
    """It waited for the end of a batch, and with nothing left to write there never was one."""
    async with stack(limit=64, background=32, expire=1000) as it:
        inode, _ = it.file()
        it.write(inode, 0, b"a" * 64 * P)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery, inode.lock:  # a truncate that waits for the backing
                nursery.start_soon(it.writeback.throttle, 8 * P)
                await wait_all_tasks_blocked()
                assert inode.file is not None
                leaving.truncate(it.cache, inode.file, 0)


@run
async def test_writers_get_the_error_when_nothing_can_be_written() -> None:
    async with stack(limit=64, background=16) as it:
        inode, store = it.file()
        store.fail_from, store.error = 0, OSError(errno.ENOSPC, "full")
        it.write(inode, 0, b"a" * 64 * P)
        await trio.sleep(0.1)
        with pytest.raises(OSError) as caught:
            await it.writeback.throttle(8 * P)
        assert caught.value.errno == errno.ENOSPC
        store.fail_from = None
        await it.writeback.flush(inode)
        await it.writeback.throttle(8 * P)


# --- with files over a real directory -------------------------------------------------------------------------------------


def over(top: Path, test: Callable[[World], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top, **options)  # type: ignore[arg-type]
            nursery.start_soon(world.writeback.run)
            await test(world)
            world.check()
            world.backing.set_plan([])
            await world.writeback.flush_all()
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0) if options.get("seed") is not None else None)


both = pytest.mark.parametrize("blocking", [False, True])


@both
def test_the_time_of_a_write_is_kept_on_the_backing(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"x" * 10_000)
        shown = inode.attributes()
        await trio.sleep(0.05)
        await world.files.fsync(handle, False)
        assert os.stat(tmp_path / "file").st_mtime_ns == shown.mtime_ns == inode.attributes().mtime_ns
        assert inode.attributes().ctime_ns == shown.ctime_ns
        await world.files.attributes.refresh(inode)
        assert inode.attributes().mtime_ns == shown.mtime_ns and not world.changed
        assert world.cache.resident_pages == 3

    over(tmp_path, main, blocking=blocking)


@both
def test_each_handle_reports_an_error_once(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        inode, first = await world.open("file")
        _, second = await world.open("file")
        await world.files.write(first, 0, b"x" * 10_000)
        world.backing.set_plan([{"op": "pwritev", "errno": "EIO", "count": 1}])
        with pytest.raises(OSError) as caught:
            await world.files.fsync(first, False)
        assert caught.value.errno == errno.EIO and inode.unwritten
        assert world.io.errors == world.writeback.errors == {"EIO": 1}
        await world.files.fsync(first, False)
        assert (tmp_path / "file").read_bytes() == b"x" * 10_000
        with pytest.raises(OSError):
            await world.files.flush(second)
        await world.files.flush(second)
        await world.files.fsync(second, False)
        _, third = await world.open("file")
        await world.files.flush(third)

    over(tmp_path, main, blocking=blocking)


def test_close_writes_out_on_a_backing_far_away(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        _, handle = await world.open("file")
        await world.files.write(handle, 0, b"x" * 10_000)
        await world.files.flush(handle)
        assert (tmp_path / "file").read_bytes() == b"x" * 10_000

    over(tmp_path, main, blocking=True)


@both
def test_regression_long_writes_through_a_tiny_cache(tmp_path: Path, blocking: bool) -> None:
    """1 MiB writes at the smallest cache: a hang in `throttle`, and another one where writeback knew of no dirty file."""

    async def main(world: World) -> None:
        _, handle = await world.open("file")
        data = os.urandom(GROUP_SIZE + 1234)
        with trio.fail_after(30):
            for number in range(3):
                assert await world.files.write(handle, number * len(data) + 5, data) == len(data)
            await world.files.fsync(handle, False)
        assert (tmp_path / "file").read_bytes() == bytes(5) + data * 3

    over(tmp_path, main, blocking=blocking, pages=16, limit_pages=4)


def test_regression_attributes_of_a_file_that_is_always_written_to(tmp_path: Path) -> None:
    """stat(2) was repeated until no write came in between: on a slow backing it never returned."""

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def writer() -> None:
                    while True:
                        await world.files.write(handle, 0, b"x")
                        await trio.lowlevel.checkpoint()

                world.backing.set_plan([{"op": "fstat", "delay_seconds": 0.01}])
                nursery.start_soon(writer)
                await world.files.attributes.refresh(inode)
                nursery.cancel_scope.cancel()

    over(tmp_path, main, blocking=True)


@pytest.mark.parametrize("seed", range(20))
def test_regression_an_overtaken_lookup_does_not_cut_the_file(tmp_path: Path, seed: int) -> None:
    """A look-up read the size, a write and its writeback came and went, then the old size was taken for a change.

    The file looked cut, and the next write into its last page filled the rest of it with zeros.
    """

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        for number in range(1, 20):
            await world.files.write(handle, number * 5000, b"x" * 5000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.files.fsync, handle, False)
                for _ in range(5):
                    nursery.start_soon(world.fs.lookup, world.table.root, b"file")
            assert inode.file is not None and inode.file.size == number * 5000 + 5000
        assert not world.changed

    over(tmp_path, main, blocking=True, seed=seed)


@both
def test_regression_two_writes_beyond_a_tebibyte_at_once(tmp_path: Path, blocking: bool) -> None:
    """The nearer one cut the backing behind the farther one's back, data written there included."""

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        far, near = 3 << 40, 2 << 40
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.files.write, handle, far, b"far")
            nursery.start_soon(world.files.write, handle, near, b"near")
        assert inode.file is not None and inode.file.size == far + 3
        await world.files.fsync(handle, False)
        wishes.drop(world.cache, inode.file)
        assert await world.read(handle, far, 10) == b"far"
        assert await world.read(handle, near, 4) == b"near"
        assert os.stat(tmp_path / "file").st_size == far + 3
        await world.truncate(inode, 0)

    over(tmp_path, main, blocking=blocking)


def test_regression_truncate_keeps_its_descriptor_open(tmp_path: Path) -> None:
    """The last close came while ftruncate ran: its descriptor was closed under it, and might have been another file's."""

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"x" * 100)
        await world.files.fsync(handle, False)
        world.backing.set_plan([{"op": "truncate", "hang": True}])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.truncate, inode, 50)
            await wait_all_tasks_blocked(0.05)
            await world.release(handle)
            assert inode.writer >= 0
            world.backing.set_plan([])
        assert os.stat(tmp_path / "file").st_size == 50
        world.fs.drop(inode)

    over(tmp_path, main, blocking=True)


def test_regression_writing_many_small_files_out_lets_others_have_their_turn(tmp_path: Path) -> None:
    """Short batches of local files wait for nothing: `cachefs sync` kept hits waiting until all were written."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, tmp_path, pages=256, at_once_bytes=1 << 16)
            for number in range(50):
                _, handle = await world.open(str(number))
                await world.files.write(handle, 0, b"x")
            written: list[int] = []

            async def watch() -> None:
                while world.writeback.dirty:
                    written.append(len(world.writeback.dirty))
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(watch)
            assert await world.writeback.flush_all() == []
            assert len(set(written)) >= 5
            await world.shut()

    trio.run(main)

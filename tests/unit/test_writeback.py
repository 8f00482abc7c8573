"""Writeback under a clock that jumps: what is written when, and what a flush waits for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from cachefs.cache import leaving
from cachefs.cache.page import GROUP_SIZE, PAGE_SIZE
from cachefs.writeback import BATCH_BYTES
from stores import run, stack

P = PAGE_SIZE
wait_all_tasks_blocked = trio.testing.wait_all_tasks_blocked


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

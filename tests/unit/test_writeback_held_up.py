"""Writeback under a clock that jumps: what happens to errors, and how writers are held back."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing

from cachefs.cache import leaving
from cachefs.cache.page import GROUP_SIZE, PAGE_SIZE
from stores import run, stack

P = PAGE_SIZE
wait_all_tasks_blocked = trio.testing.wait_all_tasks_blocked


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

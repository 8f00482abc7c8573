"""Filler: fills that are shared, fail, or meet truncates and invalidations; room that has to be waited for."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.cache import leaving
from cachefs.cache.file import CachedFile
from cachefs.cache.fill import Filler
from cachefs.cache.page import GROUP_PAGES, PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.cache.policy import POLICIES, make
from cachefs.cache.readahead import Window
from stores import run

P = PAGE_SIZE
wait_all_tasks_blocked = trio.testing.wait_all_tasks_blocked


def contents(size: int) -> bytes:
    return b"".join(bytes([page % 251 + 1]) * P for page in range(-(-size // P)))[:size]


class FakeSource:
    """A backing file in memory. While `gate` is closed, reads wait; `inline` ones are answered at once."""

    def __init__(self, data: bytes, inline: bool = False) -> None:
        self.data = data
        self.inline = inline
        self.error: OSError | None = None
        self.calls: list[tuple[int, int]] = []  # (first page, pages)
        self.gate = trio.Event()
        self.gate.set()

    def close(self) -> None:
        self.gate = trio.Event()

    def read_now(self, buffers: Sequence[memoryview], offset: int) -> int:
        if not self.inline or self.error is not None:
            raise BlockingIOError
        return self._copy(buffers[0], offset)

    async def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        data, error = self.data, self.error  # as they were when the call began
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if error is not None:
            raise error
        return self._copy(buffers[0], offset, data)

    async def write(self, extents: Sequence[tuple[int, list[memoryview]]]) -> tuple[int, OSError | None]:
        raise AssertionError("nobody writes back here")

    def _copy(self, buffer: memoryview, offset: int, data: bytes | None = None) -> int:
        self.calls.append((offset // P, len(buffer) // P))
        piece = (self.data if data is None else data)[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


class Fixture:
    def __init__(self, nursery: trio.Nursery, pages: int, policy: str) -> None:
        self.cache = PageCache(make(policy, pages), pages, trio.current_time)
        self.wanted_room = 0
        self.filler = Filler(self.cache, nursery, self.need_room)

    def need_room(self) -> None:
        self.wanted_room += 1

    def file(self, size: int, inline: bool = False) -> tuple[CachedFile, FakeSource]:
        source = FakeSource(contents(size), inline)
        return self.cache.add_file(source, size), source

    async def read(self, file: CachedFile, offset: int, size: int, window: Window | None = None) -> bytes:
        view = self.cache.lookup(file, offset, size)
        if view is None:
            view = await self.filler.read(file, offset, size, window)
        data = bytes(view)
        self.cache.check_invariants()
        return data

    async def write(self, file: CachedFile, offset: int, data: bytes) -> None:
        await self.filler.write(file, offset, data, lambda offset, nbytes: None)
        self.cache.check_invariants()

    def write_when_wanted(self, file: CachedFile) -> None:
        """Stands in for writeback: somebody waiting for room gets it a little later."""

        async def write() -> None:
            self.written(file)

        self.filler.need_room = lambda: self.filler.nursery.start_soon(write)

    def written(self, file: CachedFile) -> None:
        """All that is dirty goes to the backing."""
        for index in list(file.dirty_groups):
            group, mask = file.groups[index], file.groups[index].dirty
            self.cache.start_writeback(group, mask)
            self.cache.finish_writeback(group, mask, None)


@asynccontextmanager
async def stack(pages: int = 64, policy: str = "lru") -> AsyncIterator[Fixture]:
    async with trio.open_nursery() as nursery:
        it = Fixture(nursery, pages, policy)
        yield it
        with trio.fail_after(60):
            await wait_all_tasks_blocked()
        it.cache.check_invariants()
        assert not it.cache.filling_pages
        nursery.cancel_scope.cancel()


@run
async def test_a_miss_reads_what_is_missing() -> None:
    async with stack() as it:
        file, source = it.file(10 * P + 5)
        assert await it.read(file, 2 * P, P) == source.data[2 * P : 3 * P]
        assert await it.read(file, P + 1, 4 * P) == source.data[P + 1 : 5 * P + 1]
        assert source.calls == [(2, 1), (3, 3), (1, 1)] or sorted(source.calls) == [(1, 1), (2, 1), (3, 3)]
        assert await it.read(file, 10 * P, P) == source.data[10 * P :]
        assert await it.read(file, 11 * P, P) == b""


@run
async def test_what_is_at_hand_is_read_inline() -> None:
    async with stack() as it:
        file, source = it.file(10 * P, inline=True)
        source.close()
        assert await it.read(file, 0, 10 * P) == source.data


@run
async def test_concurrent_misses_share_one_fill() -> None:
    async with stack() as it:
        file, source = it.file(10 * P)
        source.close()
        replies: list[bytes] = []

        async def read(offset: int, size: int) -> None:
            replies.append(await it.read(file, offset, size))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(read, 0, 4 * P)
            await wait_all_tasks_blocked()
            nursery.start_soon(read, P, P)
            await wait_all_tasks_blocked()
            source.gate.set()
        assert source.calls == [(0, 4)]
        assert sorted(replies) == sorted([source.data[: 4 * P]] * 5 + [source.data[P : 2 * P]])


@run
async def test_a_demanded_fill_that_fails_raises_and_others_try_again() -> None:
    async with stack() as it:
        file, source = it.file(10 * P)
        source.close()
        source.error = OSError(errno.EIO, "broken")
        results: list[object] = []

        async def read() -> None:
            try:
                results.append(await it.read(file, 0, P))
            except OSError as error:
                results.append(error.errno)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            source.error = None  # the second one's own call will work
            source.gate.set()
        assert results == [errno.EIO, source.data[:P]]


@run
async def test_errors_of_readahead_are_dropped() -> None:
    async with stack() as it:
        file, source = it.file(60 * P)
        assert await it.read(file, 0, P, None) == source.data[:P]
        source.error = OSError(errno.EIO, "broken")
        it.filler.prefetch(file, Window(1, 50))
        await wait_all_tasks_blocked()
        assert it.cache.resident_pages == 1
        source.error = None
        assert await it.read(file, P, P) == source.data[P : 2 * P]


@run
async def test_readahead_joins_the_call_of_a_small_miss() -> None:
    async with stack(256) as it:
        file, source = it.file(100 * P)
        assert await it.read(file, 0, P, Window(0, 16)) == source.data[:P]
        assert source.calls == [(0, 16)]
        assert await it.read(file, P, 15 * P) == source.data[P : 16 * P]
        assert it.cache.readahead_used == 15


@run
async def test_truncate_while_filling() -> None:
    async with stack() as it:
        file, source = it.file(8 * P)
        source.close()
        replies: list[bytes] = []

        async def read() -> None:
            replies.append(await it.read(file, 0, 8 * P))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            leaving.truncate(it.cache, file, 2 * P + 7)  # the call that is under way has read the old bytes
            source.data = source.data[: 2 * P + 7]
            await wait_all_tasks_blocked()
            leaving.truncate(it.cache, file, 4 * P)
            source.data = source.data.ljust(4 * P, b"\0")
            source.gate.set()
        assert replies == [source.data]
        assert await it.read(file, 0, 8 * P) == source.data


@run
async def test_truncate_to_nothing_while_a_reader_waits() -> None:
    async with stack() as it:
        file, source = it.file(8 * P)
        source.close()
        async with trio.open_nursery() as nursery:
            replies: list[bytes] = []

            async def read() -> None:
                replies.append(await it.read(file, 3 * P, P))

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            leaving.truncate(it.cache, file, 0)
            source.gate.set()
        assert replies == [b""] and not it.cache.resident_pages


@run
async def test_invalidate_while_filling() -> None:
    async with stack() as it:
        file, source = it.file(8 * P)
        source.close()
        replies: list[bytes] = []

        async def read() -> None:
            replies.append(await it.read(file, 0, 8 * P))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            source.data = b"n" * 8 * P
            leaving.invalidate(it.cache, file)
            source.gate.set()
        assert replies == [b"n" * 8 * P]


@run
async def test_a_write_waits_for_a_fill_and_is_not_overwritten_by_it() -> None:
    async with stack() as it:
        file, source = it.file(8 * P)
        source.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, file, 0, 8 * P)
            await wait_all_tasks_blocked()
            nursery.start_soon(it.write, file, P + 10, b"new")
            await wait_all_tasks_blocked()
            assert not it.cache.dirty_pages
            source.gate.set()
        assert await it.read(file, P, 20) == source.data[P : P + 10] + b"new" + source.data[P + 13 : P + 20]


@run
async def test_a_partial_write_reads_the_rest_of_its_pages_first() -> None:
    async with stack() as it:
        file, source = it.file(8 * P)
        await it.write(file, P - 2, b"w" * (2 * P + 4))
        assert sorted(source.calls) == [(0, 1), (3, 1)]
        assert await it.read(file, 0, 4 * P) == source.data[: P - 2] + b"w" * (2 * P + 4) + source.data[3 * P + 2 : 4 * P]


@run
async def test_a_partial_write_whose_fill_fails_writes_nothing() -> None:
    async with stack() as it:
        file, source = it.file(8 * P)
        source.error = OSError(errno.EIO, "broken")
        with pytest.raises(OSError):
            await it.write(file, 10, b"abc")
        source.error = None
        assert not it.cache.dirty_pages
        assert await it.read(file, 0, 20) == source.data[:20]


@run
async def test_a_partial_write_behind_a_truncate_that_came_between() -> None:
    async with stack() as it:
        file, source = it.file(8 * P)
        source.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.write, file, 5 * P + 10, b"new")
            await wait_all_tasks_blocked()
            leaving.truncate(it.cache, file, P)
            source.data = source.data[:P]
            source.gate.set()
        assert file.size == 5 * P + 13
        assert await it.read(file, 0, 8 * P) == source.data + bytes(4 * P + 10) + b"new"


@run
async def test_a_reader_waits_for_room_and_says_so() -> None:
    async with stack(16) as it:
        file, _ = it.file(0)
        await it.write(file, 0, b"d" * 16 * P)
        other, source = it.file(4 * P)
        async with trio.open_nursery() as nursery:
            replies: list[bytes] = []

            async def read() -> None:
                replies.append(await it.read(other, 0, 2 * P))

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            assert it.wanted_room and not replies
            it.written(file)
        assert replies == [source.data[: 2 * P]]


@run
async def test_regression_dropped_pages_wake_who_waits_for_room() -> None:
    """A file with all the dirty pages was unlinked or truncated: writers of other files slept on, for ever."""
    async with stack(16) as it:
        file, _ = it.file(0)
        await it.write(file, 0, b"d" * 16 * P)
        other, _ = it.file(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.write, other, 0, b"o" * P)
            await wait_all_tasks_blocked()
            leaving.truncate(it.cache, file, 0)
            with trio.fail_after(1):
                await wait_all_tasks_blocked()
                assert other.size == P
            nursery.cancel_scope.cancel()
        assert other.size == P


@run
async def test_regression_nobody_asks_for_room_while_a_fill_will_make_some() -> None:
    """Readers got the errno of a writeback that was stuck, though the pages in their way were being filled."""
    async with stack(16) as it:
        file, source = it.file(64 * P)
        source.close()
        async with trio.open_nursery() as nursery:
            for i in range(4):
                nursery.start_soon(it.read, file, 4 * i * P, 4 * P)
            await wait_all_tasks_blocked()
            nursery.start_soon(it.read, file, 40 * P, P)
            await wait_all_tasks_blocked()
            assert it.wanted_room == 0
            source.gate.set()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("inline", [False, True])
def test_tiny_cache_large_reads_many_readers(policy: str, inline: bool) -> None:
    async def main() -> None:
        async with stack(16, policy) as it:
            file, source = it.file(300 * P + 9, inline)

            async def reader(start: int) -> None:
                for offset in range(start, start + 3 * 41 * P, 41 * P):
                    window = Window(offset // P, 64)
                    assert await it.read(file, offset, 256 * P, window) == source.data[offset : offset + 256 * P]

            with trio.fail_after(600):
                async with trio.open_nursery() as nursery:
                    for number in range(8):
                        nursery.start_soon(reader, number * 5 * P + number)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("inline", [False, True])
def test_regression_a_write_with_two_ends_to_fill_where_one_page_is_left(policy: str, inline: bool) -> None:
    """Each fill pushed the other end's page out. Inline that was a loop without an await: the daemon stood still."""

    async def main() -> None:
        async with stack(16, policy) as it:
            dirty, _ = it.file(0)
            await it.write(dirty, 0, b"d" * 15 * P)
            file, source = it.file(8 * P, inline)
            turns = 0
            fill_once = it.filler._fill_once

            async def counting(*args: object) -> None:
                nonlocal turns
                turns += 1
                assert turns < 50, "no progress"
                await fill_once(*args)  # type: ignore[arg-type]

            it.filler._fill_once = counting  # type: ignore[method-assign]
            it.write_when_wanted(dirty)
            await it.write(file, P - 10, b"w" * 20)
            assert await it.read(file, 0, 2 * P) == source.data[: P - 10] + b"w" * 20 + source.data[P + 10 : 2 * P]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@run
async def test_regression_writeback_hears_of_every_piece_of_a_long_write() -> None:
    """It heard of a file when the write was done: one that had to wait for room half way waited for ever."""
    async with stack(16) as it:
        it.cache.dirty_limit_pages = 4
        file, _ = it.file(0)
        known = False

        def dirtied(offset: int, nbytes: int) -> None:
            nonlocal known
            known = True

        it.write_when_wanted(file)
        write = it.filler.need_room

        def need_room() -> None:
            assert known
            write()

        it.filler.need_room = need_room
        with trio.fail_after(10):
            await it.filler.write(file, 5, b"w" * 40 * P, dirtied)
        it.written(file)
        assert file.size == 40 * P + 5


@run
async def test_a_write_of_two_pages_with_a_limit_of_one() -> None:
    async with stack(16) as it:
        it.cache.dirty_limit_pages = 1
        file, _ = it.file(0)
        it.write_when_wanted(file)
        with trio.fail_after(10):
            await it.write(file, P - 5, b"w" * 10)


@pytest.mark.parametrize("first", [0, 128])
def test_regression_a_stream_lies_in_huge_pages_however_it_is_read_ahead(
    first: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In windows that begin in the middle of a group, too: the one before is FILLING then, and not all of it is UPTODATE."""
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    monkeypatch.setattr("cachefs.cache.arena.HUGE_PAGES", str(enabled))

    async def main() -> None:
        async with stack(16 * GROUP_PAGES) as it:
            file, _ = it.file(8 * GROUP_PAGES * P)
            for start in (0, *range(first, 8 * GROUP_PAGES, GROUP_PAGES)):
                it.filler.prefetch(file, Window(start, GROUP_PAGES))
                await wait_all_tasks_blocked()
            whole = [it.cache.arena._whole.has(group.base) for group in it.cache.groups()]
            assert len(whole) == 8 and all(whole[1:])

    trio.run(main)


@run
async def test_prefetch_never_takes_the_pages_of_a_reply() -> None:
    async with stack(32) as it:
        file, source = it.file(200 * P, inline=True)
        for offset in range(0, 150 * P, 8 * P):
            view = it.cache.lookup(file, offset, 8 * P)
            if view is None:
                view = await it.filler.read(file, offset, 8 * P, Window(offset // P + 5, 31))
            assert view == source.data[offset : offset + 8 * P]


@run
async def test_a_cancelled_reader_leaves_a_fill_that_ends() -> None:
    async with stack(16) as it:
        file, source = it.file(8 * P)
        source.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, file, 0, 4 * P)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            it.cache.check_invariants()
            source.gate.set()  # until then the thread would write into the pages
        assert it.cache.filling_pages == 0
        assert await it.read(file, 0, 4 * P) == source.data[: 4 * P]
